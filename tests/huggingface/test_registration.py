"""Each in a Python of its own, since what has been imported is the point."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from exported import export_folder

from dash_train.huggingface.generated import modeling_code
from dash_train.model.transformer import LanguageModel


def run_python(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, text=True, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    ("imports", "trust"),
    [
        ("from transformers import AutoModelForCausalLM; import dash_train", False),
        ("import dash_train; from transformers import AutoModelForCausalLM", False),
        ("from transformers import AutoModelForCausalLM", True),
    ],
)
def test_transformers_finds_dash_models(
    imports: str, trust: bool, tiny_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    export_folder(tiny_model("dash"), tmp_path)
    code = f"{imports}; print(type(AutoModelForCausalLM.from_pretrained('out', trust_remote_code={trust})).__name__)"
    assert run_python(code, tmp_path) == "DashForCausalLM\n"


def test_what_transformers_saves_finds_its_code(tiny_model: Callable[..., LanguageModel], tmp_path: Path) -> None:
    """Loaded by the folder's own code, saved, and loaded elsewhere: as a Trainer's checkpoint is, or a merge."""
    export_folder(tiny_model("dash"), tmp_path)
    load = "from transformers import AutoModel, AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained('{}', "
    run_python(load.format("out") + "trust_remote_code=True).save_pretrained('again')", tmp_path)
    again = load.format("again") + "trust_remote_code=True)"
    headless = "; print(type(AutoModel.from_pretrained('again', trust_remote_code=True)).__name__)"
    assert run_python(again + headless, tmp_path) == "DashModel\n"
    assert (tmp_path / "again/modeling_dash_train.py").read_text() == modeling_code()
