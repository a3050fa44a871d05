import gzip
import json
import math
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_runs import write_recipe

from dash_train.errors import UserError
from dash_train.evaluation import loss_by_position, needle
from dash_train.evaluation.forced import decode_along
from dash_train.evaluation.subject import Subject, read_documents
from dash_train.huggingface.export import export_run
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.generation import choose_decoding
from dash_train.inference.trained import Trained, load_trained
from dash_train.recipe.load import load_recipe
from dash_train.training.trainer import Trainer

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(folder / "recipe.yaml", corpus, train__steps=2, train__validate_every=0)
    Trainer(load_recipe(recipe)).train()
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run_dir: Path) -> Trained:
    return load_trained(run_dir)


def subject(trained: Trained, mode: str | None = None, documents: list[list[int]] | None = None) -> Subject:
    decoding = choose_decoding(trained.model.config, mode)
    return Subject(trained, decoding, 64, documents or read_documents(trained, None), seed=0)


LOSS = {"length": 300, "documents": 3, "batch": 2, "steps": None}


def test_ranges_add_up_to_the_loss_of_the_documents(trained: Trained) -> None:
    dash = subject(trained)
    result = loss_by_position.run(dash, Namespace(**LOSS))
    assert [(r["from"], r["to"]) for r in result["ranges"]] == [(0, 128), (128, 256), (256, 300)]
    tokens = torch.tensor([document[:301] for document in dash.documents[:3]])
    with torch.no_grad():
        outputs = trained.model(tokens[:, :-1], labels=tokens[:, 1:])
    assert sum(r["loss"] * r["tokens"] for r in result["ranges"]) == pytest.approx(outputs["loss"].item(), rel=1e-4)
    expected = outputs["active_chunks"].sum() / outputs["eligible_chunks"].sum()
    assert result["ranges"][0]["density"] == pytest.approx(expected.item(), rel=1e-6)
    text_bytes = trained.tokenizer.token_bytes[tokens[:, 1:129].numpy()].sum()
    first = result["ranges"][0]
    assert first["bits_per_byte"] == pytest.approx(first["loss"] * first["tokens"] / text_bytes / math.log(2), rel=1e-4)


@pytest.mark.parametrize("mode", ["dash", "vattention"])
def test_decoded_losses_are_those_of_the_forward(mode: str, trained: Trained) -> None:
    """vattention too, since it reads everything of so short a context."""
    documents = subject(trained).documents[:2]
    whole = subject(trained, documents=[document[:301] for document in documents])
    report = DecodeReport()
    forced = decode_along(
        subject(trained, mode, whole.documents), [d[:200] for d in documents], [d[200:301] for d in documents], report
    )
    tokens = torch.tensor(whole.documents)
    with torch.no_grad():
        expected = trained.model(tokens[:, :-1], labels=tokens[:, 1:])["token_losses"][:, 200:]
    torch.testing.assert_close(forced.losses, expected, rtol=1e-3, atol=1e-3)
    assert report.decode == mode
    assert report.half_width == (0.0 if mode == "vattention" else None)


def test_vattention_decodes_the_end_of_each_range(trained: Trained) -> None:
    result = loss_by_position.run(subject(trained, "vattention"), Namespace(**LOSS))
    assert result["steps"] == 64
    assert (result["epsilon"], result["delta"], result["verify"]) == (0.05, 0.05, "output")
    # The last range, of 44 tokens, is too short for 64.
    assert [(r["from"], r["to"], r["tokens"]) for r in result["ranges"]] == [(64, 128, 192), (192, 256, 192)]
    assert all(r["density"] == 1.0 and r["half_width"] == 0.0 for r in result["ranges"])


def test_the_needle_is_where_the_depth_says(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(subject, contexts, continuations, report):
        seen.append((contexts, continuations))
        return decode_along(subject, contexts, continuations, report)

    monkeypatch.setattr(needle, "decode_along", spy)
    result = needle.run(subject(trained), Namespace(lengths=[200, 300], depths=[0.0, 0.5, 1.0], samples=2))
    assert len(result["cells"]) == 6
    decode = trained.tokenizer.decode
    for (contexts, continuations), cell in zip(seen, result["cells"], strict=True):
        for context, continuation in zip(contexts, continuations, strict=True):
            question = decode(continuation)
            number = question.split()[-1]
            text = decode(context)
            assert question.startswith("\nThe secret number of ") and len(number) == 5
            assert text.count(number) == 1
            place = text.index(question) / (len(text) - len(question))
            assert place == pytest.approx(cell["depth"], abs=0.15)
            assert abs(len(context) + len(continuation) - cell["length"]) <= 8  # a padded answer
        assert 0 <= cell["accuracy"] <= 1 and cell["answer_loss"] > 0


def test_an_answer_is_right_when_every_token_is(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong token of one of two answers."""

    def half_right(subject, contexts, continuations, report):
        forced = decode_along(subject, contexts, continuations, report)
        forced.is_likeliest[:] = True
        last = max(i for i, token in enumerate(continuations[0]) if token != trained.tokenizer.eos_id)
        forced.is_likeliest[0, last - 1] = False
        return forced

    monkeypatch.setattr(needle, "decode_along", half_right)
    result = needle.run(subject(trained), Namespace(lengths=[200], depths=[0.5], samples=2))
    assert result["cells"][0]["accuracy"] == 0.5


def evaluate(monkeypatch: pytest.MonkeyPatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    runpy.run_path(str(LAUNCH / "evaluate.py"), run_name="__main__")


def test_the_command(
    run_dir: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run on its own text, its export on a folder of text."""
    small = ("--depths", 0, 1, "--lengths", 100, 128, "--samples", 2, "--documents", 2)
    evaluate(monkeypatch, run_dir, *small, "--out", tmp_path / "run", "--decode", "vattention", "--epsilon", 0.1)
    printed = capsys.readouterr().out
    assert "Loss by position, vattention" in printed and "Needle in a haystack, vattention" in printed
    export_run(run_dir, tmp_path / "export")
    evaluate(monkeypatch, tmp_path / "export", *small, "--out", tmp_path / "exported", "--text", corpus / "json")
    for out, mode in (("run", "vattention"), ("exported", "dash")):
        for task in ("loss", "needle"):
            result = json.loads((tmp_path / out / f"{task}.json").read_text())
            assert (result["task"], result["decode"]) == (task, mode)
            assert (tmp_path / out / f"{task}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lengths", "30"], "--lengths: 30 tokens have no room for a needle"),
        (["--lengths", "100000000"], "--lengths: 100000000 tokens wanted, the text has"),
        (["--depths", "2"], "expected --depths from 0 to 1"),
        (["--length", "0"], "found 0, 16, 4, None"),
        (["--steps", "5000"], "--steps: no range of positions holds 5000 tokens"),
        (["--text", "/nowhere"], "--text: /nowhere: no such file"),
        (["--epsilon", "2"], "found epsilon 2.0"),
    ],
)
def test_mistakes_are_named(
    args: list[str], message: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "needle" if args[0] in ("--lengths", "--depths") else "loss"
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, run_dir, "--tasks", task, *args)
    assert message in capsys.readouterr().err


def test_text_is_read_as_training_reads_it(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "old.txt").write_text("old")
    (folder / "crlf.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (folder / "more.txt.gz").write_bytes(gzip.compress(b"three"))
    texts = [trained.tokenizer.decode(document) for document in read_documents(trained, folder)]
    assert sorted(texts) == ["three", "\ufeffone\r\ntwo\r"]
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=rf"--text: {folder}/latin.txt: not UTF-8 text .* at byte 3"):
        read_documents(trained, folder)


def test_an_export_needs_a_text(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_run(run_dir, tmp_path / "export")
    with pytest.raises(SystemExit):
        evaluate(monkeypatch, tmp_path / "export")
    assert "--text: an exported model comes without documents" in capsys.readouterr().err
