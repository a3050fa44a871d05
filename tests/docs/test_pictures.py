"""The pictures of README.md and docs/ are those that their scripts draw."""

import importlib.util
import re
import subprocess
import sys
from types import ModuleType
from xml.etree import ElementTree

from tiny_runs import ROOT

FIGURES = ROOT / "docs/figures"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FIGURES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_are_current(tmp_path):
    subprocess.run([sys.executable, FIGURES / "pictures.py", tmp_path], check=True)
    for picture in tmp_path.iterdir():
        assert picture.read_text() == (FIGURES / picture.name).read_text(), "run `make docs`"


def test_the_speed_figure_was_drawn_from_the_committed_results(tmp_path):
    """Compared by what was drawn, which the SVG carries as its description: letters may differ between machines."""
    speed = script("speed")
    speed.draw(tmp_path / "speed.svg")
    for picture in (tmp_path, FIGURES):
        described = re.search(r"<dc:description>(.*)</dc:description>", (picture / "speed.svg").read_text())
        assert described and described[1] == speed.fingerprint(), f"{picture}: run `make docs`"


def test_pictures_are_well_formed():
    pictures = sorted(FIGURES.glob("*.svg"))
    assert {picture.stem for picture in pictures} == {*script("pictures").PICTURES, "speed"}
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().get("viewBox"), picture
