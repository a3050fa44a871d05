"""Exports where dash-train is not installed: a Python of its own, in which it cannot be imported."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported import export_folder

from dash_train.huggingface.generated import END, modeling_code
from dash_train.inference.generation import generate
from dash_train.model.config import RopeScaling
from dash_train.model.transformer import LanguageModel

WITHOUT = """
import sys
sys.modules["dash_train"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM

expected = torch.load("expected.pt")
model = AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)
model.generation_config.eos_token_id = None
tokens, options = expected["tokens"], {"max_new_tokens": 30, "do_sample": False}
out = model(tokens, labels=tokens)
out.loss.backward()
torch.testing.assert_close(out.logits, expected["logits"], atol=1e-4, rtol=0)
for name, parameter in model.named_parameters():
    torch.testing.assert_close(parameter.grad, expected["gradients"][name], atol=1e-5, rtol=1e-3)
new = model.generate(tokens[:, :24], attention_mask=torch.ones_like(tokens[:, :24]), **options)[:, 24:]
assert torch.equal(new, expected["new"]), (new, expected["new"])
model.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
torch.testing.assert_close(again(tokens).logits, out.logits)
AutoModel.from_pretrained("again", trust_remote_code=True)
try:
    model.generation_config.update(decode="vattention", allow_custom_entries=True)
    model.generate(tokens, max_new_tokens=1)
except ValueError as error:
    assert "need the dash-train package" in str(error)
else:
    raise AssertionError("vattention needs kernels")
print(type(model).__module__)
"""


def test_the_modelling_file_defines_all_that_it_names() -> None:
    """Whatever moves from module to module."""
    ruff = Path(sys.executable).with_name("ruff")
    command = [ruff, "check", "--isolated", "--select", "F821,F811,E9", "--output-format", "concise", "-"]
    text = modeling_code().removesuffix(END)
    done = subprocess.run(command, input=text, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    imported = {
        line.split()[1].partition(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported <= {*sys.stdlib_module_names, "torch", "transformers"}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dash", {"qk_norm": True, "tie_embeddings": True}),
        ("mixed", {"rope_scaling": RopeScaling(type="dynamic", factor=2, original_seq=32), "nope_layers": [1]}),
        ("blocks", {"qkv_bias": True, "embedding_scale": 2.0, "residual_scale": 0.5, "logits_scale": 0.25}),
    ],
)
def test_an_export_opens_without_the_package(
    kind: str, changes: dict, tiny_model: Callable[..., LanguageModel], tmp_path: Path
) -> None:
    """Logits, gradients and greedy tokens are ours; saved again, it opens again."""
    model = tiny_model(kind, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    export_folder(model, tmp_path)
    tokens = torch.randint(4, 64, (2, 70))
    logits = model(tokens)["logits"]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    new = torch.tensor(list(generate(model.eval(), tokens[:, :24].tolist(), max_new_tokens=30))).T
    expected = {"tokens": tokens, "logits": logits.detach(), "gradients": gradients, "new": new}
    torch.save(expected, tmp_path / "expected.pt")
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "transformers_modules." in done.stdout
