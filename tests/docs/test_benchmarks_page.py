"""docs/benchmarks.md is what docs/results/page.py makes of the results, and a page that one can read."""

import importlib.util
import json
import re
from types import ModuleType

import pytest
from commands import check_command
from tiny_runs import ROOT

RESULTS = ROOT / "docs/results"
PAGE = (ROOT / "docs/benchmarks.md").read_text()


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page", RESULTS / "page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(page):
    assert page.page() == PAGE, "run `make docs`"


def test_every_result_is_on_the_page(page):
    assert {path.stem for path in RESULTS.glob("*.json")} == set(page.TABLES)


def test_the_page_is_short():
    tables = re.findall(r"(?m)^(\|.*\|)\n\| ---", PAGE)
    assert 1 <= len(tables) <= 6
    assert all(heading.count("|") - 1 <= 6 for heading in tables)
    assert len(re.findall(r"!\[[^]]*]\(", PAGE)) == 2
    assert PAGE.rindex("\n## ") == PAGE.index("\n## Versions")


def test_every_row_says_where_and_how_it_was_measured(page):
    for name in page.TABLES:
        for row in page.load(RESULTS / f"{name}.json")["rows"]:
            assert all(row[key] for key in page.MEASURED), (name, row)
            assert re.fullmatch(r"[0-9a-f]{7}", row["commit"]), (name, row["commit"])


def test_the_commands_of_the_page_parse(page):
    for name in page.TABLES:
        for command in {row["command"] for row in page.load(RESULTS / f"{name}.json")["rows"]}:
            check_command(re.sub(r"\[--backward\]", "--backward", command))


def test_a_row_shows_its_values_or_an_empty_cell_never_half_of_them(page):
    assert page._cell("{ms:.1f} ms, {x:.2f}x", {"ms": 1.0, "x": 2.0}) == "1.0 ms, 2.00x"
    assert page._cell("{ms:.1f} ms, {x:.2f}x", {"other": 1.0}) == ""
    with pytest.raises(KeyError):
        page._cell("{ms:.1f} ms, {x:.2f}x", {"ms": 1.0})


def test_a_study_that_is_done_needs_no_editing(page, tmp_path):
    """What launch/study.py writes becomes a table with its device, commit and command."""
    written = json.loads((RESULTS / "routing-blocks.json").read_text())
    written["variants"][0] |= {"seeds": 3, "validation_spread": 0.25, "tokens_per_second": 123456.0}
    (tmp_path / "study.json").write_text(json.dumps(written))
    table = page.load(tmp_path / "study.json")
    text = page.section(table)
    assert "3 (0.250)" in text and "123,456" in text and "launch/study.py recipes/study/blocks.yaml" in text
    assert table["device"] == written["environment"]["device"]
