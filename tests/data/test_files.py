"""Which files a path stands for, and how each is opened."""

import bz2
import gzip
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.files import find_all, find_files, open_file, stamp
from dash_train.data.sources import passed_over, read_documents

ODD = "\ufeffone\r\ntwo\rthree\x00\u2028\u0085 ▁ naïve 👨‍👩‍👧 \ud7ff\n\n"


def zstd(data: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write them."""
    import pyarrow

    codec = pyarrow.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:20], data[20:]))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


def names(path: Path, kind: str = "text") -> list[str]:
    """The names of the files found, in order."""
    return [file.name for file in find_files(path, kind).files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """corpus/own.txt, corpus/in/deep.txt, and corpus/linked -> a folder with shared.txt."""
    for name in ("corpus/own.txt", "corpus/in/deep.txt", "store/shared.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "store")
    return tmp_path / "corpus"


def test_links_to_folders_are_followed_as_a_pattern_follows_them(tree: Path) -> None:
    assert names(tree) == ["deep.txt", "shared.txt", "own.txt"]
    assert names(tree / "**" / "*.txt") == names(tree)


def test_a_link_back_is_said_and_read_once(tree: Path) -> None:
    (tree / "in" / "back").symlink_to(tree)
    assert names(tree) == names(tree / "**") == ["deep.txt", "shared.txt", "own.txt"]
    assert find_files(tree, "text").passed_over == {"links back to a folder around them": 1}
    assert list(find_files(tree / "**", "text").passed_over) == ["paths through links back to a folder around them"]


def test_dots_in_a_path_are_no_link_back(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree / "in")
    assert names(Path("../in/../**/*.txt")) == ["deep.txt", "shared.txt", "own.txt"]


def test_hidden_files_and_folders_are_passed_over_and_counted(tree: Path) -> None:
    (tree / ".git").mkdir()
    (tree / ".git" / "index").write_bytes(b"\xff")
    (tree / "in" / ".hidden.txt").write_text("x")
    (tree / "gone.txt").symlink_to(tree / "missing")
    (tree / "self.txt").symlink_to(tree / "self.txt")
    os.mkfifo(tree / "pipe")
    found = find_files(tree, "text")
    assert [file.name for file in found.files] == ["deep.txt", "shared.txt", "own.txt"]
    assert found.passed_over == {"hidden folders": 1, "hidden files": 1, "broken links": 2, "devices and pipes": 1}
    message = passed_over(SourceConfig(type="text", path=str(tree)))
    assert message == f"{tree}: not read: 2 broken links, 1 devices and pipes, 1 hidden files, 1 hidden folders"
    assert find_files(tree / "*.txt", "text").passed_over == {"broken links": 2}


@pytest.mark.parametrize("name", ["part[1].txt", "what?.txt", "all*.txt", "{a,b}.txt", "~x.txt"])
def test_a_path_that_exists_is_no_pattern(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "corpus [2020]*"
    folder.mkdir()
    (folder / name).write_text("x")
    (folder / "p.txt").write_text("y")
    assert names(folder / name) == [name]
    assert names(folder) == sorted([name, "p.txt"])
    assert names(folder / "*.txt") == sorted([name, "p.txt"])


def test_every_kind_of_json_lines_in_a_folder_is_read_or_named(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.gz", "c.ndjson", "d.jsonl.zst", "e.json", "f.csv", "a.jsonl.gz", "README"):
        (tmp_path / name).write_text("")
    found = find_files(tmp_path, "jsonl")
    assert [file.name for file in found.files] == ["a.jsonl", "b.jsonl.gz", "c.ndjson", "d.jsonl.zst"]
    assert found.passed_over == {
        "compressed copies of files beside them": 1,
        ".json files": 1,
        ".csv files": 1,
        "nameless files": 1,
    }


def test_a_folder_with_only_json_files_holds_json_lines(tmp_path: Path) -> None:
    (tmp_path / "c4-0.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert [document.text for document in read_documents(SourceConfig(type="jsonl", path=str(tmp_path)), print)] == [
        "one"
    ]


def test_a_folder_without_a_file_of_the_kind_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(DataError, match=r"no jsonl file here \(but 1 .parquet files\); data.sources.path takes"):
        list(read_documents(SourceConfig(type="jsonl", path=str(tmp_path)), print))


@pytest.mark.parametrize("ending", ["", *COMPRESS])
@pytest.mark.parametrize("kind", ["text", "jsonl", "csv"])
def test_odd_text_comes_back_to_the_byte_through_every_opener(tmp_path: Path, kind: str, ending: str) -> None:
    quoted = ODD.replace('"', '""')
    data = {"text": ODD, "jsonl": json.dumps({"text": ODD}), "csv": f'id,text\r\n1,"{quoted}"\r\n'}[kind].encode()
    path = tmp_path / f"odd.{kind}{ending}"
    path.write_bytes(COMPRESS[ending](data) if ending else data)
    for place in (path, tmp_path, tmp_path / "*"):
        documents = list(read_documents(SourceConfig(type=kind, path=str(place)), pytest.fail))
        assert [document.text for document in documents] == [ODD]


def test_odd_text_comes_back_through_tables_arrays_and_streams(tmp_path: Path) -> None:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [ODD]}), tmp_path / "odd.parquet")
    (tmp_path / "odd.json").write_text(json.dumps([{"text": ODD}], ensure_ascii=False), encoding="utf-8", newline="")
    Dataset.from_dict({"text": [ODD]}).save_to_disk(tmp_path / "saved")
    for kind, name, options in (
        ("parquet", "odd.parquet", {}),
        ("jsonl", "odd.json", {}),
        ("huggingface", "saved", {}),
        ("huggingface", "saved", {"streaming": True}),
    ):
        documents = list(read_documents(SourceConfig(type=kind, path=str(tmp_path / name), **options), pytest.fail))
        assert [document.text for document in documents] == [ODD]


@pytest.mark.parametrize("ending", COMPRESS)
def test_damaged_compressed_files_are_one_clear_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    whole = COMPRESS[ending](b"".join(b'{"text": "line %d"}\n' % number for number in range(1000)))
    for data in (whole[:-9], whole[: len(whole) // 2], b"plain text, not compressed"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{path}: damaged, cut short or not {ending[1:]} data \(.*\); fetch the"):
            list(read_documents(SourceConfig(type="jsonl", path=str(path)), lambda _: None))


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_archives_are_refused_by_name(tmp_path: Path, mode: str) -> None:
    (tmp_path / "one.txt").write_text("one")
    tar, archive = tmp_path / f"all.tar{mode[1:].replace(':', '.')}", tmp_path / "all.bin"
    with tarfile.open(tar, mode) as files:
        files.add(tmp_path / "one.txt")
    with zipfile.ZipFile(archive, "w") as files:
        files.write(tmp_path / "one.txt")
    for path, message in (
        (tar, "is a tar archive; unpack it"),
        (archive, "is compressed; unpack it, .zip is not read"),
    ):
        for kind in ("text", "jsonl", "csv"):
            with pytest.raises(DataError, match=f"{path}:1: {message}"):
                list(read_documents(SourceConfig(type=kind, path=str(path)), lambda _: None))


def test_a_compressed_file_under_a_plain_name_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    with pytest.raises(DataError, match=rf"{path}:1: is compressed; rename it to a.jsonl.gz"), open_file(path):
        pass


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    import fsspec

    system = fsspec.filesystem("memory")
    yield "memory:///bucket"
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("ending", ["", *COMPRESS])
def test_remote_files_are_read_to_the_byte(bucket: str, ending: str) -> None:
    import fsspec

    system = fsspec.filesystem("memory")
    text = json.dumps({"text": ODD}).encode()
    for name in (f"in/a.jsonl{ending}", f"b.jsonl{ending}", ".hidden/c.jsonl", "README"):
        system.pipe(f"/bucket/{name}", COMPRESS[ending](text) if ending else text)
    for path, count in ((bucket, 2), (f"{bucket}/b.jsonl{ending}", 1), (f"{bucket}/*/*.jsonl*", 1)):
        documents = list(read_documents(SourceConfig(type="jsonl", path=path), pytest.fail))
        assert [document.text for document in documents] == [ODD] * count
    found = find_all([bucket], "jsonl")
    assert [file.name for file in found.files] == [f"b.jsonl{ending}", f"a.jsonl{ending}"]
    assert found.passed_over == {"hidden files": 1, "nameless files": 1}
    assert str(found.files[0]) == f"{bucket}/b.jsonl{ending}"
    before = [stamp(file) for file in found.files]
    system.pipe(f"/bucket/b.jsonl{ending}", COMPRESS[ending](text + b"\n") if ending else text + b"\n")
    assert [stamp(file) for file in find_all([bucket], "jsonl").files] != before


def test_remote_parquet_and_csv_and_text(bucket: str) -> None:
    import fsspec
    import pyarrow
    from pyarrow import parquet

    system = fsspec.filesystem("memory")
    with system.open("/bucket/rows.parquet", "wb") as file:
        parquet.write_table(pyarrow.table({"text": ["one", "two"]}), file)
    system.pipe("/bucket/rows.csv", b"text\none\ntwo\n")
    system.pipe("/bucket/page.txt", ODD.encode())
    for kind in ("parquet", "csv"):
        documents = list(read_documents(SourceConfig(type=kind, path=f"{bucket}/rows.{kind}"), pytest.fail))
        assert [document.text for document in documents] == ["one", "two"]
    (page,) = read_documents(SourceConfig(type="text", path=f"{bucket}/page.txt"), pytest.fail)
    assert (page.text, str(page.origin)) == (ODD, f"{bucket}/page.txt")


def test_what_is_wrong_with_a_remote_path_is_one_clear_line(bucket: str) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/bad.txt", b"\xff")
    rejected: list[str] = []
    assert list(read_documents(SourceConfig(type="text", path=bucket), rejected.append)) == []
    assert rejected[0].startswith(f"{bucket}/bad.txt: not UTF-8 text")
    for path, message in (
        (f"{bucket}/none.jsonl", f"{bucket}/none.jsonl: no jsonl file here"),
        ("nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl: cannot be listed"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_documents(SourceConfig(type="jsonl", path=path), print))
