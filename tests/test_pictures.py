"""The pictures of README.md and docs/concepts.md are those that their script draws, and none is missing."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs/figures"


def test_pictures_are_current(tmp_path):
    subprocess.run([sys.executable, FIGURES / "pictures.py", tmp_path], check=True)
    drawn = {picture.name: picture.read_text() for picture in tmp_path.iterdir()}
    assert drawn == {picture.name: picture.read_text() for picture in FIGURES.glob("*.svg")}


def test_documents_show_pictures_that_exist():
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for shown in re.findall(r"!\[[^]]*]\(([^)]+)\)", document.read_text()):
            assert (document.parent / shown).exists(), (document.name, shown)
