import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dash_train.data import integrity
from dash_train.data import prepare as prepare_module
from dash_train.data.config import DataConfig
from dash_train.data.errors import DataError
from dash_train.data.loader import RowDataset
from dash_train.data.prepare import prepare
from dash_train.data.shards import ShardWriter, TokenShards
from dash_train.data.sources import read_documents
from dash_train.data.tokenizer import Tokenizer, load_tokenizer

Configure = Callable[..., DataConfig]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def jsonl_source(tmp_path: Path, lines: list[str]) -> list[dict[str, str]]:
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return [{"type": "jsonl", "path": str(tmp_path / "rows.jsonl")}]


def test_documents_come_back_with_their_ends_marked(data_config: Configure, corpus: Path) -> None:
    config = data_config(shard_tokens=1024)
    folder = prepare(config)
    tokenizer = load_tokenizer(folder / "tokenizer")
    found = []
    for split in ("train", "validation"):
        shards = TokenShards(folder / split)
        assert shards.meta.documents == len(shards.lengths)
        assert shards.meta.tokens == shards.lengths.sum()
        texts = []
        for document in range(shards.meta.documents):
            ids = shards.tokens(document, 0, 10**9).tolist()
            assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
            texts.append(tokenizer.decode(ids))
        assert shards.meta.text_bytes == sum(len(text.encode()) for text in texts)
        found += texts
    assert len(TokenShards(folder / "train").meta.shards) > 3
    assert sorted(found) == sorted(document.text for document in read_documents(config.sources[0], print))


def test_a_second_call_finds_the_first_ones_work(data_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepare(data_config())
    monkeypatch.setattr(prepare_module, "_write", pytest.fail)
    assert prepare(data_config()) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_cache_follows_what_the_data_is_made_from(data_config: Configure, corpus: Path) -> None:
    config = data_config()
    key = prepare_module.cache_key(config)
    for change in ({"seed": 1}, {"validation_fraction": 0.3}, {"tokenizer": {"vocab_size": 301}}):
        assert prepare_module.cache_key(data_config(**change)) != key
    source = {"type": "text", "path": str(corpus), "weight": 2.0}
    assert prepare_module.cache_key(data_config(workers=2, sources=[source])) == key
    (corpus / "new.txt").write_text("one more document")
    assert prepare_module.cache_key(config) != key


def test_the_number_of_workers_changes_nothing(data_config: Configure, tmp_path: Path) -> None:
    folders = [prepare(data_config(workers=workers, cache=str(tmp_path / str(workers)))) for workers in (1, 2)]
    assert contents(folders[0]) == contents(folders[1])


def test_a_given_tokenizer_is_used(data_config: Configure, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "given")
    folder = prepare(data_config(tokenizer={"path": str(tmp_path / "given")}))
    assert load_tokenizer(folder / "tokenizer").hash == tokenizer.hash
    assert TokenShards(folder / "train").meta.tokenizer_hash == tokenizer.hash


def test_large_vocabularies_take_four_bytes_a_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.vocab_size, before = 2**16 + 1, tokenizer.vocab_size
    writer = ShardWriter(tmp_path / "train", tokenizer, ["made up"], shard_tokens=1024)
    tokenizer.vocab_size = before
    writer.add([2**16, 7], source=0, text_bytes=5)
    writer.close()
    assert TokenShards(tmp_path / "train").tokens(0, 0, 9).tolist() == [tokenizer.bos_id, 2**16, 7, tokenizer.eos_id]


def test_sources_keep_their_number(data_config: Configure, corpus: Path, tmp_path: Path) -> None:
    rows = jsonl_source(tmp_path, [json.dumps({"text": f"row {number} of many"}) for number in range(30)])
    folder = prepare(data_config(sources=[{"type": "text", "path": str(corpus)}, *rows]))
    shards = TokenShards(folder / "train")
    assert shards.meta.sources == [f"text {corpus}", f"jsonl {tmp_path}/rows.jsonl"]
    second = RowDataset(folder, "train", seq=64, chunk_size=16, weights=[1e-9, 1.0])
    assert {int(shards.sources[document]) for document in second.epochs.block(0, 0).document} == {1}


def test_a_malformed_line_stops_with_its_place_or_is_skipped(
    data_config: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [json.dumps({"text": f"row {number}: the quick brown fox jumps over it"}) for number in range(20)]
    sources = jsonl_source(tmp_path, [*lines[:3], '{"text": "cut', *lines[3:]])
    with pytest.raises(
        DataError, match=r"rows.jsonl:4: not a JSON object .*; mend it, or set data.on_bad_document: skip"
    ):
        prepare(data_config(sources=sources))
    with caplog.at_level("INFO"):
        folder = prepare(data_config(sources=sources, on_bad_document="skip", tokenizer={"vocab_size": 300}))
    documents = sum(TokenShards(folder / split).meta.documents for split in ("train", "validation"))
    assert documents == 20
    assert "1 skipped" in caplog.messages[-1]
    assert sum("rows.jsonl:4" in message for message in caplog.messages) == 1


def test_an_empty_corpus_is_one_clear_line(data_config: Configure, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "nothing.txt").write_text("")
    tokenizer.save(tmp_path / "given")
    sources = [{"type": "text", "path": str(tmp_path / "empty")}]
    for settings in ({"path": str(tmp_path / "given")}, {"vocab_size": 300}):
        with pytest.raises(DataError, match=r"no text in text .*/empty"):
            prepare(data_config(sources=sources, tokenizer=settings))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_is_one_clear_line_and_leaves_the_cache_as_it_was(
    data_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = prepare(data_config())
    before = contents(earlier.parent)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "extend", full)
    with pytest.raises(DataError, match=r"No space left on device; free space, or set data.cache to another disk"):
        prepare(data_config(seed=1))
    assert contents(earlier.parent) == before


def test_of_two_processes_the_first_to_finish_wins(data_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes while this one is at work."""
    write = prepare_module._write

    def slow_write(config: DataConfig, work: Path, folder: Path, part: tuple[int, int]) -> bool:
        made = write(config, work, folder, part)
        shutil.copytree(folder, folder.parent / prepare_module.cache_key(config))
        return made

    monkeypatch.setattr(prepare_module, "_write", slow_write)
    folder = prepare(data_config())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert TokenShards(folder / "train").meta.documents > 0


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.bin"])
def test_a_truncated_or_missing_file_is_refused_by_name(data_config: Configure, name: str) -> None:
    folder = prepare(data_config())
    path = folder / "train" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    expected = f"{path}: holds {len(whole) - 3} bytes, expected {len(whole)} bytes; delete {folder} and prepare again"
    with pytest.raises(DataError, match=expected):
        RowDataset(folder, "train", seq=64, chunk_size=16)
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: is missing, expected {len(whole)} bytes"):
        RowDataset(folder, "train", seq=64, chunk_size=16)


def test_broken_metadata_is_refused_by_name(data_config: Configure, tmp_path: Path) -> None:
    folder = prepare(data_config())
    meta = folder / "train" / "meta.json"
    values = json.loads(meta.read_text())
    meta.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(DataError, match=r"meta.json: format version 99, this program reads"):
        TokenShards(folder / "train")
    meta.write_text("{")
    with pytest.raises(DataError, match=r"meta.json: not readable as JSON"):
        TokenShards(folder / "train")
    with pytest.raises(DataError, match=r"meta.json: not found; the folder is not a prepared data set"):
        TokenShards(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype: Input should be 'uint16' or 'uint32'"),
        ({"dtype": "uint32"}, "its counts, sizes and names contradict each other"),
        ({"documents": 0}, "its counts, sizes and names contradict each other"),
        ({"pad_id": 10**6}, "its counts, sizes and names contradict each other"),
        ({"shards": []}, "shards: List should have at least 1 item"),
        ({"sources": []}, "sources: List should have at least 1 item"),
        ({"tokens": "many"}, "tokens: Input should be a valid integer"),
        ({"format_version": None}, "format version None, this program reads 1"),
    ],
)
def test_metadata_of_another_shape_is_refused_by_name(
    data_config: Configure, change: dict[str, Any], message: str
) -> None:
    folder = prepare(data_config())
    meta = folder / "train" / "meta.json"
    values = json.loads(meta.read_text())
    meta.write_text(json.dumps({**values, **change}))
    with pytest.raises(DataError, match=f"{meta}: {message}.*; delete {folder} and prepare again"):
        TokenShards(folder / "train")
    for text in ("null", "[]", "3"):
        meta.write_text(text)
        with pytest.raises(DataError, match=f"{meta}: format version None"):
            TokenShards(folder / "train")
    del values["dtype"]
    meta.write_text(json.dumps(values))
    with pytest.raises(DataError, match=f"{meta}: dtype: Field required"):
        TokenShards(folder / "train")


PREPARED = ["train/tokens-00000.bin", "train/documents.bin", "validation/tokens-00000.bin", "tokenizer/tokenizer.model"]


@pytest.mark.parametrize("name", [*PREPARED, "train/meta.json"])
def test_a_file_replaced_by_one_of_its_size_is_refused_by_name(data_config: Configure, name: str) -> None:
    folder = prepare(data_config())
    path = folder / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{path}: .*; delete {folder} and prepare again"):
        prepare(data_config())


def test_files_are_hashed_once_and_again_when_they_change(
    data_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(data_config())
    hashed: list[str] = []
    sha256 = integrity._sha256
    monkeypatch.setattr(integrity, "_sha256", lambda file: hashed.append(file.name) or sha256(file))
    prepare(data_config())
    assert hashed == []  # whoever wrote them knows them
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)  # other inodes
    for _ in range(2):
        prepare(data_config())
    assert sorted(hashed) == sorted(
        [*(Path(name).name for name in PREPARED), "documents.bin", "meta.json", "meta.json"]
    )


def test_a_home_that_cannot_be_written_costs_time_only(data_config: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    assert prepare(data_config()) == prepare(data_config())


def test_a_corpus_of_the_first_revision_stays_valid_where_nothing_is_wrong_with_it(
    data_config: Configure, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "given")

    def earlier(**changes: Any) -> tuple[DataConfig, Path]:
        config = data_config(cache=str(tmp_path / f"cache{len(changes)}{changes}"[:40]), **changes)
        made = prepare(config)
        old = made.with_name(prepare_module.cache_keys(config)[1])
        made.rename(old)
        (old / "contents.json").unlink()
        return config, old

    config, old = earlier(tokenizer={"path": str(tmp_path / "given")})
    assert prepare(config) == old
    config, old = earlier()  # a tokenizer trained without the long lines
    assert prepare(config) != old
    assert {k: v for k, v in contents(prepare(config)).items() if k != "contents.json"} == contents(old)
    config, old = earlier(tokenizer={"path": str(tmp_path / "given")}, on_bad_document="skip")
    assert prepare(config) != old


def test_what_is_not_read_is_said_once(data_config: Configure, corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    (corpus / ".ipynb_checkpoints").mkdir()
    (corpus / ".ipynb_checkpoints" / "00.txt").write_text("old")
    prepare(data_config())
    assert [message for message in caplog.messages if "not read" in message] == [
        f"{corpus}: not read: 1 hidden folders"
    ]


def test_a_given_tokenizer_is_refused_or_its_losses_are_said_before_training(
    data_config: Configure, stdlib_texts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import sentencepiece

    for kind in ("bpe", "unigram"):
        (tmp_path / "text").write_text(stdlib_texts[0])
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / kind), model_type=kind, vocab_size=400,
            byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    prepare(data_config(tokenizer={"path": str(tmp_path / "bpe.model")}))
    assert f"{tmp_path}/bpe.model: the tokenizer changes text, the model never sees these as they are: line ends, " in (
        "\n".join(caplog.messages)
    )
    with pytest.raises(DataError, match=r"data.tokenizer.path: a sentencepiece unigram model"):
        prepare(data_config(tokenizer={"path": str(tmp_path / "unigram.model")}))


def test_the_command_counts_rows_with_the_weights(corpus: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": f"row {i} of many"}) + "\n" for i in range(30)))
    weighted = f"data.sources=[{{type: text, path: {corpus}, weight: 3}}, {{type: jsonl, path: {tmp_path}/more.jsonl}}]"
    command = [sys.executable, root / "launch" / "prepare.py", root / "recipes" / "quickstart.yaml", weighted]
    overrides = [f"data.cache={tmp_path}/cache", "data.tokenizer.vocab_size=300", "train.seq=256"]
    chunks = "model.attention.chunk_size=16"
    done = subprocess.run([*command, *overrides, chunks], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train, *sources = done.stdout.splitlines()[:3]
    folder = done.stdout.splitlines()[-1]
    rows = RowDataset(folder, "train", seq=256, chunk_size=16, weights=[3.0, 1.0]).rows(0)
    assert f" {rows:,} rows of 256 tokens" in train
    assert [line.split(":")[0] for line in sources] == [f"  text {corpus}", f"  jsonl {tmp_path}/more.jsonl"]


def test_the_command_prints_what_it_prepared(corpus: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, root / "launch" / "prepare.py", root / "recipes" / "quickstart.yaml"]
    overrides = [f"data.cache={tmp_path}/cache", "data.tokenizer.vocab_size=300", "train.seq=256"]
    source = ["data.sources.0.type=text", f"data.sources.0.path={corpus}"]
    done = subprocess.run([*command, *overrides, *source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *splits, folder = done.stdout.splitlines()
    assert [line.split(":")[0] for line in splits] == ["train", "validation"]
    assert (Path(folder) / "train" / "meta.json").is_file()
    done = subprocess.run([*command, *source, "data.sources.0.path=/missing"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: /missing: no text file here; data.sources.path takes a file, a folder or a glob"
    ]
