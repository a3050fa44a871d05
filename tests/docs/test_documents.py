"""Documents point at what is there: links, headings, files of the code."""

import re
from pathlib import Path

import pytest
from commands import fenced
from tiny_runs import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CODE = ("dash_train", "kernels", "model", "data", "launch", "recipes", "tests", "docs")


def slugs(document: Path) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", document.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        found = document.parent / name if name else document
        assert found.exists(), target
        assert not anchor or anchor in slugs(found), target


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if "lab" not in path.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_that_are_named_exist(document):
    """Paths in backquotes that begin with a folder of the repository; the lab's pages keep the names of their day."""
    for name in re.findall(rf"`((?:{'|'.join(CODE)})/[\w/.-]+\.\w+)`", document.read_text()):
        assert (ROOT / name).exists(), name


def test_internals_name_files_of_the_kernels():
    text = (ROOT / "docs/internals.md").read_text()
    names = {path.name for path in ROOT.glob("kernels/**/*.py")}
    assert set(re.findall(r"`([\w/]*?)(\w+\.py)`", text)) <= {("", name) for name in names} | {
        (str(path.parent.relative_to(ROOT / "kernels")) + "/", path.name) for path in ROOT.glob("kernels/**/*.py")
    }


@pytest.mark.parametrize("document", ["kernels.md", "data.md", "inference.md"])
def test_python_blocks_compile_and_import(document):
    """Blocks need tensors, models or shards of the reader's own: their imports run, the rest is compiled."""
    for block in fenced((ROOT / "docs" / document).read_text(), "python"):
        compile(block, document, "exec")
        for line in re.findall(r"(?m)^(?:from dash_train\S* )?import .*$|^from dash_train\S* import .*$", block):
            exec(line, {})
