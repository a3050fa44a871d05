import json
from pathlib import Path
from typing import Any

import pytest

from dash_train.data import records, sources
from dash_train.data.config import SourceConfig
from dash_train.data.errors import DataError
from dash_train.data.sources import Document, read_documents, source_files, split_source


def read(bad: list[str] | None = None, **source: Any) -> list[Document]:
    rejected = [] if bad is None else bad
    return list(read_documents(SourceConfig(**source), rejected.append))


def test_stdlib_is_this_pythons_source_in_a_fixed_order() -> None:
    files = source_files(SourceConfig())
    names = [file.name for file in files]
    assert "argparse.py" in names and files == sorted(files)
    assert not any("site-packages" in file.parts for file in files)
    texts = read_documents(SourceConfig(), reject=print)
    assert next(texts).text == files[0].read_bytes().decode()


def test_text_is_one_document_a_file_kept_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_bytes(b"line\r\nline\rx")
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "none.txt").write_text("")
    assert [document.text for document in read(type="text", path=str(tmp_path))] == ["line\r\nline\rx", "one"]
    assert [document.text for document in read(type="text", path=str(tmp_path / "*.txt"))] == ["one"]


def test_text_that_is_not_utf8_is_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    bad: list[str] = []
    assert read(bad, type="text", path=str(tmp_path)) == []
    assert bad == [f"{tmp_path}/latin.txt: not UTF-8 text (unexpected end of data at byte 0)"]


BAD_LINES = [
    ('{"text": "cut', "not a JSON object"),
    ('{"text": "\xff"}'.encode("latin-1"), "not a JSON object"),
    ('["text"]', "expected an object with fields, found list"),
    ('{"body": "x"}', "no field 'text' among ['body']; set data.sources.field"),
    ('{"text": ["x"]}', "field 'text' holds list, expected a string"),
    ('{"text": "\\ud800"}', "holds half of a surrogate pair"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_jsonl_rejects_a_bad_line_with_its_number(tmp_path: Path, line: str | bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'{"text": "one"}\n\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"text": "two"}\n'
    )
    bad: list[str] = []
    documents = read(bad, type="jsonl", path=str(path))
    assert documents == [Document("one", f"{path}:1"), Document("two", f"{path}:4")]
    assert len(bad) == 1 and bad[0].startswith(f"{path}:3: ") and message in bad[0] and "\n" not in bad[0]


def test_parquet_reads_the_named_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ["one", None, "two"]}), path)
    bad: list[str] = []
    documents = read(bad, type="parquet", path=str(tmp_path), field="body")
    assert documents == [Document("one", f"{path}:1"), Document("two", f"{path}:3")]
    assert bad == [f"{path}:2: field 'body' holds NoneType, expected a string"]
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as parquet ") as error:
        read(type="parquet", path=str(path))
    assert "\n" not in str(error.value)


def test_huggingface_goes_through_load_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    documents = read(type="huggingface", path=str(folder))
    assert documents == [Document("one", f"{folder}:1"), Document("two", f"{folder}:2")]


@pytest.mark.parametrize("type", ["text", "jsonl", "parquet"])
def test_a_path_without_files_is_one_clear_line(tmp_path: Path, type: str) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/missing: no {type} file here"):
        read(type=type, path=str(tmp_path / "missing"))
    with pytest.raises(DataError, match=f"a {type} source needs path"):
        read(type=type)


def test_deep_nesting_is_rejected_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "x", "m": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"text": "two"}\n')
    bad: list[str] = []
    assert [document.text for document in read(bad, type="jsonl", path=str(path))] == ["one", "two"]
    assert len(bad) == 1 and bad[0].startswith(f"{path}:2: not a JSON object (maximum recursion depth")


def test_a_field_may_be_a_path_of_names(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows: list[Any] = [{"data": {"text": "one"}}, {"data": {"body": "x"}}, {"data": "x"}, {"data.text": "dotted"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    bad: list[str] = []
    assert [d.text for d in read(bad, type="jsonl", path=str(path), field="data.text")] == ["one", "dotted"]
    assert [message.split(";")[0] for message in bad] == [
        f"{path}:{line}: no field 'data.text' among ['data']" for line in (2, 3)
    ]
    parquet.write_table(pyarrow.table({"data": [rows[0], None]} | {"n": [1, 2]}), tmp_path / "a.parquet")
    found = read([], type="parquet", path=str(tmp_path), field="data.data.text")
    assert [document.text for document in found] == ["one"]


def test_parquet_shards_without_rows_or_without_the_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a[0].parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "n": [1, 2]}), tmp_path / "a[1].parquet")
    parquet.write_table(pyarrow.table({"body": ["x", "y", "z"]}), tmp_path / "b.parquet")
    bad: list[str] = []
    documents = read(bad, type="parquet", path=str(tmp_path))
    assert [document.text for document in documents] == ["one", "two"]
    assert bad == [f"{tmp_path}/b.parquet: no field 'text' among ['body'] in its 3 rows; set data.sources.field"]


def test_csv_reads_the_named_column_and_rejects_rows_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    long = "x" * 300_000
    path.write_bytes(
        b'\xef\xbb\xbfid,text\n1,"a ""b"", c\nd"\n\n2,' + long.encode() + b"\n3,too,many\n4\n5,caf\xe9\n6,last\n"
    )
    bad: list[str] = []
    documents = read(bad, type="csv", path=str(path))
    assert [document.text for document in documents] == ['a "b", c\nd', long, "last"]
    assert documents[0].origin == f"{path}:3"
    assert [message.removeprefix(f"{path}:") for message in bad] == [
        "6: more values than the header has names",
        "7: field 'text' holds NoneType, expected a string",
        "8: field 'text' holds half of a surrogate pair, or bytes that are not UTF-8",
    ]
    path.write_text('text\n"never closed\n')
    with pytest.raises(DataError, match=r"rows.csv:1: not CSV \(unexpected end of data\); mend the file"):
        read([], type="csv", path=str(path))


def test_folders_of_save_to_disk_are_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    plain = Dataset.from_dict({"text": ["one", "two"]})
    plain.save_to_disk(tmp_path / "plain")
    DatasetDict(train=plain, test=plain.select([0])).save_to_disk(tmp_path / "splits")
    assert [d.text for d in read(type="huggingface", path=str(tmp_path / "plain"))] == ["one", "two"]
    assert [d.text for d in read(type="huggingface", path=str(tmp_path / "splits"), split="test")] == ["one"]
    assert source_files(SourceConfig(type="huggingface", path=str(tmp_path / "plain")))  # a change is seen
    with pytest.raises(DataError, match=r"splits: no split 'dev' among \['test', 'train'\]; set data.sources.split"):
        read(type="huggingface", path=str(tmp_path / "splits"), split="dev")


@pytest.mark.parametrize("wrong", [{"path": ""}, {"weight": float("inf")}, {"weight": float("nan")}])
def test_an_empty_path_and_an_endless_weight_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SourceConfig(type="text", **wrong)


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_template_joins_columns(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"title": "One", "meta": {"body": "text {title} $1"}}, {"title": "Two", "meta": {"body": "more"}}]
    write_lines(tmp_path / "rows.jsonl", rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for kind in ("jsonl", "parquet"):
        documents = read(type=kind, path=str(tmp_path / f"rows.{kind}"), template="# {title}\n\n{meta.body}\n{title}")
        assert [d.text for d in documents] == ["# One\n\ntext {title} $1\nOne", "# Two\n\nmore\nTwo"]
    (tmp_path / "rows.csv").write_text('title,body\r\nOne,"a\r\nb"\r\n', newline="")
    documents = read(type="csv", path=str(tmp_path / "rows.csv"), template="{title}: {body}")
    assert [d.text for d in documents] == ["One: a\r\nb"]
    rejected: list[str] = []
    source = SourceConfig(type="jsonl", path=str(tmp_path / "rows.jsonl"), template="{title} {author}")
    assert list(read_documents(source, rejected.append)) == []
    assert rejected[0].startswith(f"{tmp_path}/rows.jsonl:1: no field 'author' among ['meta', 'title']; set data.sourc")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"type": "text", "path": "a", "template": "{x}"}, "template: a text source does not use it"),
        ({"type": "jsonl", "path": "a", "template": "x"}, "template: no {field} in 'x'"),
        ({"data_files": "a"}, "data_files: a stdlib source does not use it"),
        ({"type": "jsonl", "path": "a", "streaming": True}, "streaming: a jsonl source does not use it"),
        ({"type": "huggingface", "path": "a", "documents": 3}, "documents: only with streaming: true"),
        ({"type": "huggingface", "path": "a", "streams": 3}, "streams: only with streaming: true"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceConfig(**wrong)


def test_data_files_choose_below_the_path(tmp_path: Path) -> None:
    for name in ("en/a.jsonl", "en/b.jsonl", "de/c.jsonl", "de/d.jsonl"):
        write_lines(tmp_path / name, [{"text": name}])

    def texts(**options: Any) -> list[str]:
        return [d.text for d in read(type="jsonl", **options)]

    assert texts(path=str(tmp_path), data_files="en/*.jsonl") == ["en/a.jsonl", "en/b.jsonl"]
    assert texts(path=str(tmp_path), data_files=["de/d.jsonl", "*/[ad].jsonl"]) == [
        "de/d.jsonl",
        "en/a.jsonl",
    ], "in the order given, each once"
    assert texts(data_files=f"{tmp_path}/en/b.jsonl") == ["en/b.jsonl"]
    with pytest.raises(DataError, match=r"fr/\*.jsonl: no jsonl file here; data.sources.path takes"):
        texts(path=str(tmp_path), data_files="fr/*.jsonl")


def test_data_files_of_a_hugging_face_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name in ("a", "b"):
        write_lines(tmp_path / "set" / f"{name}.jsonl", [{"text": name}])
    assert [d.text for d in read(type="huggingface", path=str(tmp_path / "set"), data_files="b*.jsonl")] == ["b"]


ARRAYS = [
    '[{"text": "one"}, {"text": "two [\\n] é"}]',
    '\ufeff  [\n {"text": "one"},\n\n {"text": "two [\\n] é"}\n]\n\n',
    '[\r\n{"text":"one","more":[1,{"a":"]"}]}\r\n,{"text":"two [\\n] \\u00e9"}]',
]


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("read_at_once", [1, 7, 2**20])
def test_one_json_array_in_a_file_is_read(
    tmp_path: Path, array: str, read_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "READ", read_at_once)
    (tmp_path / "all.json").write_text(array, encoding="utf-8", newline="")
    for path in (tmp_path, tmp_path / "all.json"):
        assert [d.text for d in read(type="jsonl", path=str(path))] == ["one", "two [\n] é"]


def test_places_in_an_array_are_lines(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text('[\n{"text": "one"},\n 5,\n{"text":\n null}, {"text": "last"}]')
    rejected: list[str] = []
    found = read_documents(SourceConfig(type="jsonl", path=str(tmp_path / "all.json")), rejected.append)
    assert [(d.text, str(d.origin)) for d in found] == [
        ("one", f"{tmp_path}/all.json:2"),
        ("last", f"{tmp_path}/all.json:5"),
    ]
    assert [message.split(": ")[0] for message in rejected] == [f"{tmp_path}/all.json:{line}" for line in (3, 4)]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ('[{"text": "one"}', "all.json:1: not a JSON array of objects .cut short."),
        ('[{"text": "one"},\n{"text": "tw', "all.json:2: not a JSON array of objects .Unterminated string"),
        ('[{"text": "one"}\n {"text": "two"}]', "all.json:2: not a JSON array of objects .expected , or ], found '{'"),
        ('[{"text": "one"}]\n{"text": "two"}', "all.json:2: not a JSON array of objects .it goes on after its end"),
        ('[{"text": one}]', "all.json:1: not a JSON array of objects .Expecting value"),
        ("[" * 100_000, "all.json:1: not a JSON array of objects .nested without end"),
        ('[{"text": "one"}, ]', "all.json:1: not a JSON array of objects .Expecting value"),
    ],
)
def test_a_broken_array_is_one_clear_line(tmp_path: Path, array: str, message: str) -> None:
    (tmp_path / "all.json").write_text(array)
    with pytest.raises(DataError, match=message):
        list(read_documents(SourceConfig(type="jsonl", path=str(tmp_path / "all.json")), lambda _: None))


def test_lines_of_which_the_first_is_an_array_stay_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('[1, 2]\n{"text": "one"}\n[{"text": "x"}]\n')
    rejected: list[str] = []
    found = read_documents(SourceConfig(type="jsonl", path=str(tmp_path / "rows.jsonl")), rejected.append)
    assert [d.text for d in found] == ["one"]
    assert [message.split(": ")[0] for message in rejected] == [f"{tmp_path}/rows.jsonl:{line}" for line in (1, 3)]


def test_streams_are_fixed_and_come_after_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    for number in range(4):
        write_lines(tmp_path / "set" / f"{number}.jsonl", [{"text": f"{number}-{row}"} for row in range(5)])
    everything = [f"{number}-{row}" for number in range(4) for row in range(5)]

    def texts(path: str = "set", **options: Any) -> list[str]:
        return [d.text for d in read(type="huggingface", path=str(tmp_path / path), streaming=True, **options)]

    assert texts() == texts(streams=2) == texts(streams=3) == everything
    assert len(split_source(SourceConfig(type="huggingface", path=str(tmp_path / "set"), streaming=True))) == 4
    assert texts(streams=2, documents=6) == ["0-0", "0-1", "0-2", "2-0", "2-1", "2-2"]
    assert len(texts(documents=7)) == 7
    Dataset.from_dict({"text": everything}).save_to_disk(tmp_path / "saved")
    assert texts("saved", streams=3) == everything


def test_large_datasets_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    everything = [f"row {number}" for number in range(100)]
    Dataset.from_dict({"text": everything}).save_to_disk(tmp_path / "saved")
    source = SourceConfig(type="huggingface", path=str(tmp_path / "saved"))
    monkeypatch.setattr(sources, "PART_BYTES", 100)
    assert len(split_source(source)) > 3
    found = list(read_documents(source, print))
    assert [(d.text, d.origin) for d in found] == [
        (text, f"{tmp_path}/saved:{number}") for number, text in enumerate(everything, start=1)
    ]
