import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import ENVIRONMENT
from torch.nn import functional as F

from dash_train.benchmark import train
from dash_train.benchmark.inputs import Rows, rows_with_locality, set_density, union_factor
from dash_train.benchmark.peer import Peer, PeerOptimizer
from dash_train.data.loader import IGNORE
from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.schema import OptimizerConfig
from dash_train.training.optimizer import parameter_groups

ROOT = Path(__file__).parents[2]
SHAPE = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 48, "vocab_size": 64}
CPU = torch.device("cpu")


def peer(**changes):
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPE, "rope_theta": 1e4, **changes}, attention={"type": "full"})
    return config, Peer(config, max_seq=128, dtype=torch.float32, device=CPU)


def batch(seq=128):
    return next(Rows(seq, 64).micro_batches())


@pytest.mark.parametrize("tied", [False, True])
def test_the_peer_is_our_full_attention_model(tied):
    config, theirs = peer(tie_embeddings=tied)
    ours = LanguageModel(config)
    ours.load_state_dict(theirs.model.state_dict())
    inputs = batch()
    loss = theirs(**inputs)
    loss.backward()
    expected = ours(**inputs)["loss"]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = dict(theirs.model.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)


def test_master_weights_do_the_arithmetic_of_fp32():
    """Two steps of two micro-batches equal plain fp32 AdamW with clipping, though the model's own copy is bf16."""
    options = OptimizerConfig(lr=1e-2, grad_clip=0.1)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False).bfloat16()
    plain = torch.nn.Linear(8, 8, bias=False)
    plain.load_state_dict(model.state_dict())
    optimizer = PeerOptimizer(model, options, "fp32-master")
    adamw = torch.optim.AdamW(parameter_groups(plain, options.weight_decay), lr=options.lr, betas=options.betas)
    inputs = torch.randn(2, 2, 4, 8).bfloat16()
    for step in inputs:
        gradient = torch.zeros(8, 8)
        for micro in step:
            copy = model.weight.detach().clone().requires_grad_()
            F.linear(micro, copy).square().mean().backward()
            gradient += copy.grad
            model(micro).square().mean().backward()
            assert model.weight.grad is None, "the gradient is kept in fp32 alone"
        plain.weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(plain.parameters(), options.grad_clip)
        adamw.step()
        optimizer.step()
        torch.testing.assert_close(optimizer.updated[0], plain.weight)
        assert torch.equal(model.weight, plain.weight.bfloat16())


def test_rows_repeat_their_ids_and_end_without_a_label():
    rows = Rows(64, 1000, repeat=5)
    inputs = next(rows.micro_batches())
    tokens, labels = inputs["tokens"][0], inputs["labels"][0]
    assert len(tokens) == 64 and all(len(set(run.tolist())) == 1 for run in tokens.split(5))
    assert torch.equal(labels[:-1], tokens[1:]) and labels[-1] == IGNORE
    assert not torch.equal(tokens, next(rows.micro_batches(rank=1))["tokens"][0])
    single, pairs = rows.micro_batches(), replace(rows, batch=2).micro_batches()
    for _ in range(2):
        alone = [next(single) for _ in range(2)]
        for name, both in next(pairs).items():
            torch.testing.assert_close(both, torch.cat([row[name] for row in alone]))


def test_text_rows_are_the_standard_library():
    batches = Rows(4096, 32768, text=True).micro_batches()
    text = bytes(torch.cat([next(batches)["tokens"][0] for _ in range(2)]).tolist()).decode(errors="replace")
    assert "import" in text and len(text) > 4000


def test_more_repeats_mean_less_union(monkeypatch):
    """The search finds the number of repeats at which the union factor lies where it was wanted."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(**SHAPE, rope_theta=1e6, attention={"chunk_size": 16, "type": "dash"}))
    unions = []
    for repeat in (1, 41):
        rows = Rows(512, 64, repeat)
        set_density(model, rows, 0.4, CPU)
        unions.append(union_factor(model, rows, CPU))
    assert unions[0] > unions[1] > 1
    wanted = ((unions[0] + unions[1]) / 2 - 0.1, (unions[0] + unions[1]) / 2 + 0.1)
    monkeypatch.setattr("dash_train.benchmark.inputs.UNION", wanted)
    found = rows_with_locality(model, 512, 1, 0.4, CPU)
    assert 1 < found.repeat < 41
    assert sum(wanted) / 2 == pytest.approx(union_factor(model, found, CPU), abs=0.25)


def test_the_whole_program(tmp_path):
    """Two lengths, both attentions and both peers."""
    recipe = tmp_path / "recipe.yaml"
    model = {**SHAPE, "attention": {"chunk_size": 16}}
    options = {"precision": "bf16", "activation_checkpointing": "full"}
    recipe.write_text(yaml.safe_dump({"run_dir": "unused", "model": model, "train": options}))
    command = ["train", "--recipe", recipe, "--seq", "128,256", "--attention", "dash,full", "--peer", "huggingface"]
    command += ["--peer-precision", "fp32-master,bf16", "--step-tokens", "512", "--density", "0.4", "--repeat", "3"]
    command += ["--micro-batch-size", "2", "--json", tmp_path / "rows.json", "model.layers=3"]
    program = [sys.executable, ROOT / "launch" / "benchmark.py", *command]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["arguments"]["seq"] == [128, 256]
    rows = written["rows"]
    names = ["ours, dash", "ours, full", "huggingface, fp32-master", "huggingface, bf16"]
    assert [(row["seq"], row["what"]) for row in rows] == [(seq, name) for seq in (128, 256) for name in names]
    for row in rows:
        phases = sum(row[f"{phase}_s"] for phase in ("data", "forward", "backward", "optimizer"))
        assert phases == pytest.approx(row["seconds"], rel=0.3)
        assert row["tokens_per_second_per_gpu"] == pytest.approx(512 / row["seconds"])
        assert len(row["step_seconds"]) == 2 and row["memory_gb"] > 0
        ours_dash = row["what"] == "ours, dash"
        assert len(row["density_per_layer"]) == 3 and (row["density"] is not None) == ours_dash
        assert not ours_dash or (0.3 < row["density"] < 0.5 and row["union_factor"] >= 1)
    assert rows[2]["over_peer"] == 1 and rows[0]["over_peer"] > 0 and "over_peer" not in rows[3]
    assert "| 256 | huggingface, bf16 |" in done.stdout


def test_a_length_that_does_not_fit_says_so_and_the_next_goes_on(tmp_path, monkeypatch, capsys):
    def measure(trainee, rows, *others):
        if rows.seq == 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return {
            "tokens_per_second_per_gpu": 1.0,
            "memory_gb": 1.0,
            "density_per_layer": [],
            "union_factor_per_layer": [],
        }

    monkeypatch.setattr(train, "_measure", measure)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"run_dir": "unused", "model": SHAPE, "train": {"precision": "fp32"}}))
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(["--recipe", str(recipe), "--seq", "128,256", "--attention", "full"])
    args.json = tmp_path / "rows.json"
    result = train.run(args)
    assert [row.get("error") for row in result["rows"]] == ["out of memory", None]
    assert "ours, full, 128 tokens: out of memory" in capsys.readouterr().out
    assert json.loads(args.json.read_text())["rows"] == result["rows"]
