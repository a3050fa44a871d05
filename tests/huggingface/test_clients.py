"""What transformers, peft and trl take for granted of a model, of an exported Dash model: with kernels, and as the
modelling file of an export computes it where dash-train is not installed."""

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from exported import export_folder
from transformers import AutoModel, AutoModelForCausalLM

from dash_train.huggingface import DashForCausalLM
from dash_train.huggingface.conversion import load_model
from dash_train.huggingface.generated import END, modeling_code
from dash_train.huggingface.modeling import CACHE
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]
KINDS = ["dash", "mixed", "blocks"]


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """DashForCausalLM of an export's modelling file, before that looks for dash-train."""
    file = tmp_path_factory.mktemp("code") / "modeling_without_dash_train.py"
    file.write_text(modeling_code().removesuffix(END))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DashForCausalLM


@pytest.fixture(params=["kernels", "plain"])
def load(
    request: pytest.FixtureRequest, tiny_model: Build, plain_model: Any, tmp_path: Path
) -> Callable[..., DashForCausalLM]:
    def load(kind: str = "dash", **changes: Any) -> DashForCausalLM:
        kind_of_model = plain_model if request.param == "plain" else AutoModelForCausalLM
        model = kind_of_model.from_pretrained(export_folder(tiny_model(kind, **changes), tmp_path))
        model.generation_config.eos_token_id = None  # untrained models end anywhere
        return model

    return load


def tokens(rows: int = 2, seq: int = 70) -> torch.Tensor:
    return torch.randint(4, 64, (rows, seq))


def gradients(model: DashForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_accumulated_gradients_are_those_of_the_whole_batch(load: Any) -> None:
    """As Trainer does it: it counts the labels of all micro-batches, and the model divides by their number."""
    model, rows = load(), tokens(8, 40)
    labels = rows.clone()
    for row, ignored in enumerate((0, 3, 9, 20, 1, 30, 5, 11)):
        labels[row, :ignored] = -100
    whole = model(rows, labels=labels).loss
    whole.backward()
    expected = gradients(model)
    assert model.accepts_loss_kwargs
    count = (labels[:, 1:] != -100).sum()
    losses = [model(rows[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=count).loss for i in range(0, 8, 2)]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_what_forward_does_not_know_is_refused(load: Any) -> None:
    model, rows = load(), tokens()
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    with pytest.raises(TypeError, match="token_type_ids"):
        model(rows, token_type_ids=rows)
    with pytest.raises(ValueError, match="token_type_ids"):
        model.generate(rows, token_type_ids=rows, max_new_tokens=1)
    for wrong, message in (
        ({"output_attentions": True}, "output_attentions: not supported"),
        ({"attention_mask": torch.ones(2, 1, 70, 70)}, r"attention_mask has shape .*expected \[2, 70\]"),
        ({"inputs_embeds": torch.ones(2, 70, 32)}, "expected one of input_ids and inputs_embeds"),
        ({"position_ids": torch.arange(5, 75)[None]}, "position_ids: expected every document's tokens counted from 0"),
        (
            {"seq_idx": torch.arange(2).repeat_interleave(35)[None], "position_ids": torch.arange(70)[None]},
            "differently",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 140])}, "expected the borders of one row"),
    ):
        with pytest.raises(ValueError, match=message):
            model(rows, **wrong)


def test_outputs_are_those_asked_for(load: Any) -> None:
    model, rows = load(), tokens()
    with torch.no_grad():
        logits = model(rows).logits
        torch.testing.assert_close(model(rows, logits_to_keep=3).logits, logits[:, -3:])
        torch.testing.assert_close(model(rows, logits_to_keep=torch.tensor([1, 5])).logits, logits[:, [1, 5]])
        as_tuple = model(rows, labels=rows, return_dict=False)
        assert [x.dim() for x in as_tuple] == [0, 3]
        embeddings = model.get_input_embeddings()(rows)
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, logits)
        states = model(rows, output_hidden_states=True).hidden_states
        torch.testing.assert_close(states[0], embeddings)
        torch.testing.assert_close(model.lm_head(states[-1]), logits)
        assert len(states) == 3
        assert model(rows).hidden_states is None


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_isolated(kind: str, load: Any) -> None:
    """Documents of any lengths, named in each of the ways that collators have, with padding beside them."""
    model, rows = load(kind), tokens(1)
    documents = rows.split([23, 41, 6], dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    borders = torch.tensor([0, 23, 64, 70], dtype=torch.int32)
    with torch.no_grad():
        alone = torch.cat([model(document).logits for document in documents], dim=1)
        for said in (
            {"position_ids": positions},
            {"seq_idx": torch.arange(3).repeat_interleave(borders.diff())[None]},
            {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 41, "position_ids": positions},
        ):
            torch.testing.assert_close(model(rows, **said).logits, alone, rtol=1e-4, atol=1e-4)
        mask = torch.ones(1, 75, dtype=torch.long)
        mask[:, [0, 1, 40, 73, 74]] = 0
        padded = torch.zeros(2, 1, 75, dtype=torch.long)
        padded[:, mask.bool()] = torch.stack([rows, positions])[:, 0]
        logits = model(padded[0], attention_mask=mask, position_ids=padded[1]).logits
        torch.testing.assert_close(logits[mask.bool()], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_grows_and_goes_on(kind: str, load: Any) -> None:
    """Made by the model, filled by a prompt, continued by several tokens and by one."""
    model, rows = load(kind), tokens()
    with torch.no_grad():
        outputs, logits = None, []
        for piece in rows.split([30, 5, 1, 34], dim=1):
            cache = {} if outputs is None else {CACHE: outputs[CACHE]}
            outputs = model(piece, use_cache=True, **cache)
            logits.append(outputs.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(rows).logits, rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match="stand right after what it holds"):
            model(rows[:, :1], position_ids=torch.tensor([[3]]), **{CACHE: outputs[CACHE]})
    options = {"max_new_tokens": 5, "do_sample": False}
    first = model.generate(rows, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, rows[:, :3]], dim=1)
    assert torch.equal(model.generate(longer, **{CACHE: first[CACHE]}, **options), model.generate(longer, **options))


def test_generation_goes_on_from_either_side_of_padding(load: Any) -> None:
    model, rows = load(), tokens()
    expected = model.generate(rows, max_new_tokens=5, do_sample=False)[:, 70:]
    padded, mask = torch.zeros(2, 77, dtype=torch.long), torch.ones(2, 77, dtype=torch.long)
    padded[0, 7:], padded[1, :70] = rows
    mask[0, :7] = mask[1, 70:] = 0
    out = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, 77:], expected)


def test_assisted_decoding_gives_the_same_tokens(load: Any, tiny_model: Build, tmp_path: Path) -> None:
    model, prompt = load(), tokens(1, 40)
    other = AutoModelForCausalLM.from_pretrained(export_folder(tiny_model("dash", init_std=0.21), tmp_path / "other"))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, assistant_model=other, **options), expected)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, load: Any) -> None:
    model, rows = load("mixed").train(), tokens()
    model(rows, labels=rows).loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    block = type(model.model.layers[0])
    with patch.object(block, "forward", autospec=True, side_effect=block.forward) as run:
        model(rows, labels=rows).loss.backward()
    assert run.call_count == 4  # each of two blocks twice
    torch.testing.assert_close(gradients(model), expected)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_added_tokens_are_saved(tie_embeddings: bool, load: Any, tmp_path: Path) -> None:
    model, rows = load(tie_embeddings=tie_embeddings), tokens()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["vocab_size"] == 70
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    ours = load_model(tmp_path / "again", torch.float32, "cpu")
    with torch.no_grad():
        logits = model(rows).logits
        assert logits.shape[-1] == 70
        torch.testing.assert_close(again(rows).logits, logits)
        torch.testing.assert_close(ours(rows)["logits"], logits)


def test_the_model_without_its_head(load: Any, tmp_path: Path) -> None:
    model, rows = load(), tokens()
    headless = AutoModel.from_pretrained(tmp_path / "out")  # of the kernels: the states are the same
    with torch.no_grad():
        states = model(rows, output_hidden_states=True).hidden_states
        torch.testing.assert_close(headless(rows).last_hidden_state, states[-1])
