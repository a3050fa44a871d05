"""Folders that hold no model of ours, or not all of one: each is refused in one line that says what is wrong where."""

import json
import pickle
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from dash_train.data.errors import DataError
from dash_train.errors import UserError
from dash_train.huggingface.export import import_folder

LAUNCH = Path(__file__).parents[2] / "launch"
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
Spoil = Callable[[Path], Any]


class Evil:
    """What a pickle can do: it writes a file when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.file, "executed")


def config(**values: Any) -> Spoil:
    """Change values of config.json; `...` takes one out."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        changed = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({name: value for name, value in changed.items() if value is not ...}))

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Change the weights of the first shard."""

    def spoil(folder: Path) -> None:
        file = min(folder.glob("model-*.safetensors"))
        found = load_file(file)
        change(found)
        save_file(found, file)

    return spoil


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def as_pickle(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "executed")))


def lose_a_shard(folder: Path) -> None:
    max(folder.glob("model-*.safetensors")).unlink()


def cut_a_shard(folder: Path) -> None:
    file = max(folder.glob("model-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def lose_an_entry(folder: Path) -> None:
    """A weight that the index promises is not in its file."""
    name = next(iter(load_file(min(folder.glob("model-*.safetensors")))))
    weights(lambda found: found.pop(name))(folder)


def index_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "../other.safetensors"}}')


def code_for_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": [null, "own.Own"]}}')
    (folder / "own.py").write_text(f"open({str(folder / 'executed')!r}, 'w').write('executed')")


EMBEDDING = "model.embed_tokens.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
BAD: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json here"),
    "config cut off": (write("config.json", b'{"model_type": "lla'), "config.json: not JSON"),
    "config a list": (write("config.json", b"[]"), "config.json: expected an object with fields, found list"),
    "no model_type": (config(model_type=...), "config.json: no model_type"),
    "no size": (config(hidden_size=...), "config.json: no hidden_size"),
    "a size in words": (config(num_hidden_layers="two"), "config.json: num_hidden_layers: "),
    "a null size": (config(num_attention_heads=None), "config.json: num_attention_heads: "),
    "another architecture": (config(model_type="gpt2"), "model_type 'gpt2' is not supported; expected one of llama"),
    "MoE": (config(model_type="mixtral", num_local_experts=8), "model_type 'mixtral' is not supported"),
    "MoE that calls itself llama": (config(num_local_experts=8), "num_local_experts: not supported"),
    "sliding window": (
        config(model_type="mistral", sliding_window=512),
        "sliding_window 512, shorter than max_position_embeddings 2048: not supported",
    ),
    "layers with windows": (config(layer_types=["sliding_attention"] * 2), "layer_types sliding_attention: not"),
    "linear attention": (config(layer_types=["linear_attention"] * 2), "layer_types linear_attention: not supported"),
    "unknown rope": (config(rope_parameters={"rope_type": "spiral"}), "rope_scaling .*spiral.* is not supported"),
    "half of a head turns": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5: not supported"),
    "longrope of another head": (
        config(rope_parameters={"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [2.0]}),
        "short_factor and long_factor need 4 values each",
    ),
    "another activation": (config(hidden_act="gelu"), "hidden_act gelu: not supported"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), "quantization_config: not supported"),
    "heads that share unevenly": (config(num_key_value_heads=3), r"heads \(4\) must be a multiple of kv_heads \(3\)"),
    "a layer too many": (config(num_hidden_layers=3), "9 missing"),
    "missing shard": (lose_a_shard, "safetensors: not here, though model.safetensors.index.json names it"),
    "truncated shard": (cut_a_shard, "safetensors: not a safetensors file"),
    "missing weight": (lose_an_entry, "holds no .*, though model.safetensors.index.json says so"),
    "index without a map": (write("model.safetensors.index.json", b"{}"), "index.json: expected"),
    "index that leads elsewhere": (index_elsewhere, "index.json: expected"),
    "extra weight": (weights(lambda w: w.update(surplus=torch.ones(2))), r"1 unknown \(first: \['surplus'\]"),
    "bias": (weights(lambda w: w.update({BIAS: torch.ones(32)})), r"1 unknown \(first: .*q_proj.bias"),
    "wrong shape": (weights(lambda w: w.update({EMBEDDING: torch.ones(64, 16)})), r"shape \[64, 16\], by config.json"),
    "integers": (weights(lambda w: w.update({EMBEDDING: torch.ones(64, 32, dtype=torch.int8)})), "is torch.int8"),
    "an indexer without its fields": (
        weights(lambda w: w.update({f"model.layers.{n}.self_attn.indexer_q": torch.ones(32) for n in range(2)})),
        "no chunk_size, estimate_diagonal, sigma, scaling_factor, which the weights self_attn.indexer_q need",
    ),
    "pickle": (as_pickle, "no model.safetensors here.*pytorch_model.bin is not read"),
    "broken tokenizer": (write("tokenizer.json", b"{"), "transformers cannot load this tokenizer"),
    "a tokenizer with code": (code_for_the_tokenizer, "transformers cannot load this tokenizer"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Writes a good folder of several shards."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **SHAPE))

    def make(folder: Path) -> Path:
        model.save_pretrained(folder, max_shard_size="30KB")
        return folder

    return make


@pytest.mark.parametrize("what", BAD)
def test_a_bad_folder_is_one_line(what: str, good: Callable[[Path], Path], tmp_path: Path) -> None:
    spoil, message = BAD[what]
    folder = good(tmp_path / "folder")
    spoil(folder)
    with pytest.raises((UserError, DataError), match=message) as error:
        import_folder(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert not (folder / "executed").exists(), "nothing in a folder is executed"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"], "nothing is left half-written"


def test_the_same_folder_is_good(good: Callable[[Path], Path], tmp_path: Path) -> None:
    import_folder(good(tmp_path / "folder"), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("command", [("import.py", "out"), ("generate.py", "--prompt", "x"), ("evaluate.py",)])
def test_every_command_says_so(
    command: tuple[str, ...],
    good: Callable[[Path], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = good(tmp_path / "folder")
    weights(lambda found: found.update(surplus=torch.ones(2)))(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command[0], str(folder), *command[1:]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(LAUNCH / command[0]), run_name="__main__")
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "1 unknown (first: ['surplus'])" in lines[0]


def test_a_window_that_hides_nothing_is_taken_and_said(
    good: Callable[[Path], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = good(tmp_path / "folder")
    config(model_type="mistral", sliding_window=512)(folder)
    with caplog.at_level("INFO"):
        import_folder(folder, tmp_path / "out", max_seq=512)
    assert "its sliding window of 512 tokens hides nothing from rows of 512" in caplog.text
    assert json.loads((tmp_path / "out/config.json").read_text())["max_position_embeddings"] == 512
    with pytest.raises(UserError, match="sliding_window 512, shorter than rows of 513"):
        import_folder(folder, tmp_path / "other", max_seq=513)
