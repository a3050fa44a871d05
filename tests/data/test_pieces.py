"""Preparation in pieces: whatever the jobs, threads and kills, the result is the same to the byte."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dash_train.data import pieces as pieces_module
from dash_train.data import sources as sources_module
from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.pieces import Piece, Pieces, Task
from dash_train.data.prepare import prepare, prepare_part
from dash_train.data.shards import TokenShards
from dash_train.data.sources import Part, read_documents, split_source
from dash_train.data.tokenizer import Tokenizer, load_tokenizer

Configure = Callable[..., DataConfig]
SMALL = {"PART_BYTES": 6000, "PIECE_BYTES": 2000}
STOP_AFTER = """
import os, sys
from dash_train.data import pieces, sources
from dash_train.data.config import DataConfig
from dash_train.data.prepare import prepare
sources.PART_BYTES, pieces.PIECE_BYTES = {PART_BYTES}, {PIECE_BYTES}
save, left = pieces.Piece.save, [int(sys.argv[2])]
def save_or_die(piece, path):
    if not left[0]:
        os.kill(os.getpid(), 9)
    left[0] -= 1
    save(piece, path)
pieces.Piece.save = save_or_die
prepare(DataConfig.model_validate_json(sys.argv[1]))
""".format(**SMALL)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts and pieces of a small corpus."""
    monkeypatch.setattr(sources_module, "PART_BYTES", SMALL["PART_BYTES"])
    monkeypatch.setattr(pieces_module, "PIECE_BYTES", SMALL["PIECE_BYTES"])


@pytest.fixture
def configure(data_config: Configure, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> Configure:
    """Builds a configuration of text files, JSON lines in one large file, and a parquet file of four row groups."""
    import pyarrow
    from pyarrow import parquet

    tokenizer.save(tmp_path / "tokenizer")
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    lines = [json.dumps({"text": f"{number}: {text}"}) for number, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines[:30], "", "{bad", *lines[30:]]) + "\n")
    table = pyarrow.table({"text": [f"row {number}: {text}" for number, text in enumerate(texts)]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=10, compression="none")

    def build(cache: str, **changes: object) -> DataConfig:
        sources = [
            {"type": "text", "path": str(corpus)},
            {"type": "jsonl", "path": str(tmp_path / "rows.jsonl")},
            {"type": "parquet", "path": str(tmp_path / "rows.parquet")},
        ]
        options = {
            "sources": sources,
            "cache": str(tmp_path / cache),
            "tokenizer": {"path": str(tmp_path / "tokenizer")},
            "on_bad_document": "skip",
            "shard_tokens": 5000,
            **changes,
        }
        return data_config(**options)

    return build


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small")
def test_parts_after_each_other_are_the_source(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = configure("a").sources
    divided = []
    for source in sources:
        assert len(split_source(source)) > 3
        divided.append([d.text for d in read_documents(source, lambda _: None)])
    monkeypatch.setattr(sources_module, "PART_BYTES", 2**40)
    for source, texts in zip(sources, divided, strict=True):
        assert len(split_source(source)) == 1
        assert [d.text for d in read_documents(source, lambda _: None)] == texts


@pytest.mark.usefixtures("small")
def test_lines_of_a_divided_file_keep_their_numbers(configure: Configure) -> None:
    rejected: list[str] = []
    source = configure("a").sources[1]
    origins = [str(d.origin) for d in read_documents(source, rejected.append)]
    numbers = [*range(1, 31), *range(33, 43)]
    assert origins == [f"{source.path}:{number}" for number in numbers]
    assert [message.split(": ")[0] for message in rejected] == [f"{source.path}:32"]


def test_jobs_threads_and_pieces_change_nothing(configure: Configure, request: pytest.FixtureRequest) -> None:
    whole = contents(prepare(configure("whole")))
    request.getfixturevalue("small")
    assert contents(prepare(configure("pieces", workers=1))) == whole
    for order in ([1, 2, 3], [3, 1, 2]):
        config = configure(f"jobs{order[0]}", workers=2)
        made = [prepare_part(config, part, 3) for part in order]
        assert made[:2] == [None, None] and made[2] is not None
        assert contents(made[2]) == whole
        assert [path.name for path in made[2].parent.iterdir()] == [made[2].name]
        assert prepare_part(config, 1, 3) == made[2]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("pieces", [0, 3, 11])
def test_a_killed_preparation_goes_on_where_it_stopped(
    configure: Configure, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepare(configure("whole")))
    config = configure("killed")
    command = [sys.executable, "-c", STOP_AFTER, config.model_dump_json(), str(pieces)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (work,) = Path(config.cache).iterdir()
    before = {path: path.stat().st_mtime_ns for path in work.glob("pieces-*/*.npz")}
    assert len(before) == pieces
    saved: list[Path] = []
    save = Piece.save
    monkeypatch.setattr(Piece, "save", lambda piece, path: saved.append(path) or save(piece, path))
    folder = prepare(config)
    assert contents(folder) == whole
    assert not set(saved) & set(before), "made again"
    assert list(Path(config.cache).iterdir()) == [folder]


@pytest.mark.usefixtures("small")
def test_what_other_jobs_skipped_is_counted(configure: Configure, caplog: pytest.LogCaptureFixture) -> None:
    config = configure("a")
    for part in range(1, 5):
        caplog.clear()
        with caplog.at_level("INFO"):
            prepare_part(config, part, 4)
    assert "1 skipped" in caplog.messages[-1]


@pytest.mark.usefixtures("small")
def test_an_error_after_little_work_leaves_nothing_behind(configure: Configure) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:32: not a JSON object"):
        prepare(configure("a", on_bad_document="error"))
    assert list(Path(configure("a").cache).iterdir()) == []


@pytest.mark.usefixtures("small")
def test_progress_says_what_is_left(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pieces_module, "LOG_SECONDS", 0.0)
    with caplog.at_level("INFO"):
        prepare(configure("a"))
    lines = [message for message in caplog.messages if message.startswith("tokenized")]
    shares = [float(line.split()[1]) for line in lines]
    assert shares == sorted(shares) and shares[0] < 15 and shares[-1] == 100
    assert " left: " in lines[0] and "MB of text a second" in lines[0]


def test_a_corpus_that_is_all_on_one_side_falls_back(
    data_config: Configure, corpus: Path, small: None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Of three documents chance often holds out none: then it is one of them, as ever."""
    for file in sorted(corpus.iterdir())[3:]:
        file.unlink()
    tokenizer.save(tmp_path / "tokenizer")
    options = {"tokenizer": {"path": str(tmp_path / "tokenizer")}, "validation_fraction": 0.0001}
    folder = prepare(data_config(**options))
    assert [TokenShards(folder / split).meta.documents for split in ("train", "validation")] == [2, 1]


def test_a_validation_set_of_ones_own(data_config: Configure, corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    copied = sorted(corpus.iterdir())[5]
    shutil.copy(copied, own / "copied.txt")
    (own / "new.txt").write_text("a document that is nowhere else")
    config = data_config(validation=[{"type": "text", "path": str(own)}])
    folder = prepare(config)
    tokenizer = load_tokenizer(folder / "tokenizer")
    train, validation = (TokenShards(folder / split) for split in ("train", "validation"))
    assert validation.meta.sources == [f"text {own}"] and train.meta.sources == [f"text {corpus}"]
    texts = [tokenizer.decode(validation.tokens(number, 0, 10**6).tolist()) for number in range(2)]
    assert texts == [copied.read_text(), "a document that is nowhere else"]
    assert train.meta.documents == 39, "the copy is not trained on"
    assert prepare(data_config()) != folder


def test_an_empty_validation_set_is_one_clear_line(data_config: Configure, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match=r"data.validation: no text in text .*empty.txt"):
        prepare(data_config(validation=[{"type": "text", "path": str(tmp_path / "empty.txt")}]))


def test_pieces_are_written_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configure: Configure
) -> None:
    task = Task(configure("a").sources[0], 0, Part([]), lambda _: None)
    pieces = Pieces(tmp_path, [task])
    piece = Piece({}, {}, {}, 0, [])
    monkeypatch.setattr(pieces_module.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        piece.save(pieces.folder / "000000-000000-last.npz")
    assert pieces.missing() == [0]
