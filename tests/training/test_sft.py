"""Fine-tuning on conversations: the vocabulary grows by the template's tokens, and the export knows how a turn ends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from dash_train.huggingface.export import export_run, import_folder
from dash_train.inference.trained import load_trained
from dash_train.recipe.load import load_recipe
from dash_train.tracking.metrics import read_metrics
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer

RECIPES = Path(__file__).parents[2] / "recipes"


def write_chats(path: Path, count: int = 60) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count {n}"},
                {"role": "assistant", "content": f"{n}, then {n + 1}"},
            ]
        }
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The export of a run with a tokenizer of its own, as if it were a model that several tokens can end."""
    folder = tmp_path_factory.mktemp("base")
    Trainer(load_recipe(write_recipe(folder / "recipe.yaml", corpus, train__steps=4, train__validate_every=0))).train()
    export_run(folder / "run", folder / "export")
    path = folder / "export/generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 7], "temperature": 0.6}))
    return folder / "export"


def sft_recipe(path: Path, base: Path, chats: Path, **options: Any) -> Path:
    """recipes/finetune-sft.yaml with another base and other text, in small."""
    recipe = yaml.safe_load((RECIPES / "finetune-sft.yaml").read_text())
    recipe["run_dir"], recipe["init"]["from"] = str(path.parent / "run"), str(base)
    recipe["data"]["sources"][0]["path"] = str(chats)
    recipe["data"]["cache"] = str(path.parent / "cache")
    small = {"steps": 12, "seq": 128, "micro_batch_size": 2, "global_batch_size": 4, "validate_every": 12}
    recipe["train"].update(small, precision="fp32", validation_rows=4, **options)
    recipe["checkpoint"], recipe["optimizer"]["lr"] = {"every": 12}, 3e-3
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_model_learns_to_answer(base: Path, tmp_path: Path) -> None:
    recipe = load_recipe(sft_recipe(tmp_path / "recipe.yaml", base, write_chats(tmp_path / "chats.jsonl")))
    trainer = Trainer(recipe)
    before = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    embedding = trainer.engine.module.model.embed_tokens.weight.detach()
    assert trainer.tokenizer.vocab_size == 514
    assert embedding.shape[0] == 576, "grown to a multiple of 64"
    torch.testing.assert_close(embedding[:512], before, rtol=0, atol=0)
    torch.testing.assert_close(embedding[512], before.mean(0))
    trainer.train()
    training, validation = read_metrics(tmp_path / "run")
    assert validation[-1]["validation_loss"] < validation[0]["validation_loss"] - 0.1
    assert training[0]["tokens"] < 4 * 128 / 2, "responses alone count"

    export_run(tmp_path / "run", tmp_path / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "out"), load_trained(tmp_path / "out").model
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7, end]
    assert generation["temperature"] == 0.6
    assert model.config.vocab_size == len(tokenizer) == 514
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for folder in (tmp_path / "run", tmp_path / "out"):
        assert load_trained(folder).eos_ids == {2, 7, end}
    import_folder(tmp_path / "out", tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_fine_tuned_run_goes_on(base: Path, tmp_path: Path) -> None:
    path = sft_recipe(tmp_path / "recipe.yaml", base, write_chats(tmp_path / "chats.jsonl"))
    Trainer(load_recipe(path, ["train.steps=2", "checkpoint.every=2"])).train()
    trainer = Trainer(load_recipe(path, ["train.steps=3"]))
    assert trainer.step == 2
    trainer.train()
    assert checkpoint.load_model_config(checkpoint.find(tmp_path / "run")).vocab_size == 576
