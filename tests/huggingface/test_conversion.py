import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import export_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dash_train.errors import UserError
from dash_train.huggingface.config import DashConfig
from dash_train.huggingface.conversion import load_model
from dash_train.huggingface.modeling import CACHE
from dash_train.inference.generation import generate
from dash_train.model.cache import Decoding
from dash_train.model.config import RopeScaling
from dash_train.model.transformer import LanguageModel

Build = Callable[..., LanguageModel]
EARLIER_FIELDS = {"vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"}
ROPE = {
    "none": None,
    "linear": RopeScaling(type="linear", factor=2, original_seq=64),
    "yarn": RopeScaling(type="yarn", factor=4, original_seq=32),
    "llama3": RopeScaling(type="llama3", factor=8, original_seq=32),
}


def from_huggingface(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None  # untrained models end anywhere
    return model


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(
    ("attention", "qk_norm", "name"),
    [
        ("full", False, "LlamaForCausalLM"),
        ("full", True, "Qwen3ForCausalLM"),
        ("dash", False, "DashForCausalLM"),
        ("dash", True, "DashForCausalLM"),
    ],
)
def test_exported_logits_equal_ours(
    attention: str, qk_norm: bool, name: str, rope: str, tie_embeddings: bool, tiny_model: Build, tmp_path: Path
) -> None:
    model = tiny_model(attention, qk_norm=qk_norm, rope_scaling=ROPE[rope], tie_embeddings=tie_embeddings)
    out = export_folder(model, tmp_path)
    assert_same_logits(out, model, name)


def assert_same_logits(out: Path, model: LanguageModel, name: str = "DashForCausalLM") -> None:
    """The folder's, loaded by transformers and by us, are the model's."""
    theirs = from_huggingface(out)
    assert type(theirs).__name__ == name
    tokens = torch.randint(64, (2, 80))
    with torch.no_grad():
        logits = model(tokens)["logits"]
        torch.testing.assert_close(theirs(tokens).logits, logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(load_model(out, torch.float32, "cpu")(tokens)["logits"], logits, atol=1e-5, rtol=0)


def test_routing_blocks_are_exported(tiny_model: Build, tmp_path: Path) -> None:
    blocks = tiny_model("dash", routing={"routing_block": [1, 16], "routing_window": [5, 16]})
    out = export_folder(blocks, tmp_path)
    assert_same_logits(out, blocks)
    config = json.loads((out / "config.json").read_text())
    assert (config["routing_block"], config["routing_window"], config["chunk_size"]) == ([1, 16], [5, 16], 16)
    assert config["routing_scale"] == [8.0, 8.0]
    assert config["attention_types"] == ["dash", "dash"]


def test_exports_of_earlier_versions_are_read(tiny_model: Build, tmp_path: Path) -> None:
    """Their config.json holds our configuration as `model`; one from before there were routing blocks has none."""
    model = tiny_model("dash", tie_embeddings=True)
    out = export_folder(model, tmp_path)
    config = json.loads((out / "config.json").read_text())
    for name in DashConfig.__annotations__.keys() - EARLIER_FIELDS:
        config.pop(name, None)
    ours = model.config.model_dump(mode="json")
    for name in ("routing_block", "routing_window"):
        del ours["attention"][name]
    (out / "config.json").write_text(json.dumps({**config, "model": ours}))
    assert_same_logits(out, model)
    from_huggingface(out).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())
    assert again["routing_scale"] == [8.0, 8.0]
    assert again.get("model") is None
    assert_same_logits(tmp_path / "again", model)


@pytest.mark.parametrize("attention", ["dash", "blocks"])
def test_transformers_generates_what_we_do(attention: str, tiny_model: Build, tmp_path: Path) -> None:
    """Across chunk boundaries, with and without its cache, with padding on either side of the shorter row."""
    model = tiny_model(attention)
    theirs = from_huggingface(export_folder(model, tmp_path))
    prompts = torch.randint(4, 64, (2, 24))
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = torch.tensor(list(generate(model, prompts.tolist(), max_new_tokens=20))).T

    plain = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert torch.equal(plain[:, 24:], expected)
    uncached = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), use_cache=False, **options)
    assert torch.equal(uncached, plain)

    pad = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(prompts)], 1)
    padded = theirs.generate(torch.cat([pad, prompts], 1), attention_mask=mask, **options)
    assert torch.equal(padded[:, 29:], expected)

    beams = [
        theirs.generate(prompts, attention_mask=torch.ones_like(prompts), num_beams=3, use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


@pytest.mark.parametrize("mode", ["full", "vattention"])
def test_transformers_decodes_in_other_ways(mode: str, tiny_model: Build, tmp_path: Path) -> None:
    """As the generation config says, to the tokens of ours; ragged prompts, padded on the left."""
    model = tiny_model("dash")
    theirs = from_huggingface(export_folder(model, tmp_path))
    short, long = torch.randint(4, 64, (20,)), torch.randint(4, 64, (40,))
    tokens = torch.stack([torch.cat([torch.zeros(20, dtype=torch.long), short]), long])
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    theirs.generation_config.update(decode=mode, epsilon=0.1, piece_size=16, allow_custom_entries=True)
    out = theirs.generate(tokens, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, do_sample=False)
    ours = generate(model, [short.tolist(), long.tolist()], max_new_tokens=12, decoding=Decoding(mode))
    assert torch.equal(out.sequences[:, 40:], torch.tensor(list(ours)).T)
    report = out[CACHE].report()
    assert (report.decode, report.half_width) == (mode, 0.0 if mode == "vattention" else None)


def test_transformers_padding_does_not_change_logits(tiny_model: Build, tmp_path: Path) -> None:
    theirs = from_huggingface(export_folder(tiny_model("dash"), tmp_path))
    tokens = torch.randint(4, 64, (1, 40))
    mask = torch.ones(1, 47, dtype=torch.long)
    mask[:, :7] = 0
    with torch.no_grad():
        alone = theirs(tokens).logits
        left = theirs(torch.cat([tokens[:, :7], tokens], 1), attention_mask=mask).logits[:, 7:]
        right = theirs(torch.cat([tokens, tokens[:, :7]], 1), attention_mask=mask.flip(1)).logits[:, :40]
    torch.testing.assert_close(left, alone)
    torch.testing.assert_close(right, alone)


def test_transformers_saves_what_it_loads(tiny_model: Build, tmp_path: Path) -> None:
    theirs = from_huggingface(export_folder(tiny_model("dash", tie_embeddings=True), tmp_path))
    theirs.save_pretrained(tmp_path / "again")
    tokens = torch.randint(64, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(tmp_path / "again", torch.float32, "cpu")(tokens)["logits"], theirs(tokens).logits
        )


def test_foreign_llama_loads(tmp_path: Path) -> None:
    """A folder that transformers wrote, in several shards."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    rope = {"rope_type": "llama3", "rope_theta": 1e5, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=64, rope_parameters=rope, **shape))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    tokens = torch.randint(64, (2, 40))
    with torch.no_grad():
        logits = load_model(tmp_path, torch.float32, "cpu")(tokens)["logits"]
        torch.testing.assert_close(logits, theirs(tokens).logits, atol=1e-4, rtol=0)


def test_weights_are_written_in_the_asked_type(tiny_model: Build, tmp_path: Path) -> None:
    out = export_folder(tiny_model(), tmp_path, torch.bfloat16)
    assert from_huggingface(out).dtype == torch.bfloat16


def test_export_overwrites_nothing(tiny_model: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("")
    with pytest.raises(UserError, match="already exists"):
        export_folder(tiny_model(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"attention_bias": True}, "attention_bias: not supported"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "rope_scaling .* is not supported"),
        ({"num_hidden_layers": 3}, "the weights do not fit config.json: 9 missing"),
    ],
)
def test_unknown_folders_are_refused(changes: dict, message: str, tiny_model: Build, tmp_path: Path) -> None:
    config = export_folder(tiny_model(), tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_model(config.parent, torch.float32, "cpu")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json here"):
        load_model(tmp_path, torch.float32, "cpu")
