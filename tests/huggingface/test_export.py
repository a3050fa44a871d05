import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import write_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from dash_train.data.tokenizer import load_tokenizer
from dash_train.errors import UserError
from dash_train.huggingface.export import export_run, import_folder
from dash_train.model.transformer import LanguageModel
from dash_train.recipe.load import load_recipe
from dash_train.training import checkpoint
from dash_train.training.trainer import Trainer


def command(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(arg) for arg in args])
    runpy.run_path(str(args[0]), run_name="__main__")


def test_a_run_is_exported_and_generates(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Trainer(load_recipe(write_recipe(tmp_path / "recipe.yaml", corpus))).train()
    run, out = tmp_path / "run", tmp_path / "out"
    found = export_run(run, out)

    model = LanguageModel(checkpoint.load_model_config(found))
    model.load_state_dict(checkpoint.load_weights(found))
    tokenizer, theirs = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    text = "def main(args):\n    return args"
    ids = load_tokenizer(run / "tokenizer").encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    with torch.no_grad():
        tokens = torch.tensor([ids])
        torch.testing.assert_close(theirs(tokens).logits, model(tokens)["logits"], atol=1e-4, rtol=0)
    about = json.loads((out / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast", "a name that transformers 4 knows, too"
    assert about["add_prefix_space"] is False
    assert (out / "tokenizer.model").read_bytes() == (run / "tokenizer/tokenizer.model").read_bytes()
    assert "auto_map" not in about, "a tokenizer runs no code"
    import_folder(out, tmp_path / "again")
    for file in out.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    card = (out / "README.md").read_text()
    assert "| validation_loss | " in card
    assert "run_dir: " in card

    capsys.readouterr()
    launch = Path(__file__).parents[2] / "launch"
    command(monkeypatch, launch / "generate.py", out, "--prompt", "import ", "--max-new-tokens", 4)
    streamed, _, report = capsys.readouterr().out.rpartition("dash: 4 tokens, ")
    (tmp_path / "prompts").write_text("import \ndef ")
    command(monkeypatch, launch / "generate.py", out, "--prompts-file", tmp_path / "prompts", "--max-new-tokens", 4)
    assert streamed.startswith("import ")
    assert " tokens/s, everything read" in report  # all of it in the own chunk
    assert capsys.readouterr().out.startswith(f"[0] {streamed}[1] def ")

    options = ("--decode", "vattention", "--epsilon", 0.05, "--delta", 0.05, "--max-new-tokens", 4)
    for model in (out, run):
        command(monkeypatch, launch / "generate.py", model, "--prompt", "def ", *options)
        text, _, report = capsys.readouterr().out.rpartition("vattention: 4 tokens, ")
        assert text.startswith("def ")
        assert "density 1.000, worst half-width 0.000, 0.0 % dense fallbacks" in report
    with pytest.raises(SystemExit):
        command(monkeypatch, launch / "generate.py", out, "--prompt", "def ", *options[:3], 2)
    assert "error: expected epsilon and delta between 0 and 1; found epsilon 2.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(monkeypatch, launch / "generate.py", tmp_path, "--prompt", "def ")
    assert "expected a run folder, a checkpoint or an exported folder" in capsys.readouterr().err

    lines = (run / "metrics.jsonl").read_text().splitlines()
    broken = json.dumps({**json.loads(lines[-2]), "loss": None})
    (run / "metrics.jsonl").write_text("\n".join([*lines, "null", '{"step": "x"}', "[" * 99999, broken]))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    command(monkeypatch, launch / "export.py", run, ".")
    assert "# here" in (tmp_path / "here" / "README.md").read_text()

    def full_disk(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.save_torch_state_dict", full_disk)
    with pytest.raises(UserError, match=r"full: could not be written \(.*No space left on device\)"):
        export_run(run, tmp_path / "full")
    assert not list(tmp_path.glob(".tmp-*"))

    with pytest.raises(SystemExit):
        command(monkeypatch, launch / "export.py", run, out)
    assert "out: already exists; name a new folder" in capsys.readouterr().err
