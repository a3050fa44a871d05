"""Reference and Triton against the outputs of the authors' GPU kernels."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dash_train.kernels.dash import chunk_summaries, dash_attention, dash_decode, update_summaries

CHECKOUT = Path(__file__).parents[3]
FOLDERS = [Path(os.environ.get("DASH_GOLDEN", "")), CHECKOUT / ".golden", CHECKOUT.parent / "shared" / "golden"]
FILES = next((files for folder in FOLDERS if (files := sorted(folder.glob("*.safetensors")))), [])


def case_of(path: Path) -> dict[str, Any]:
    """How the file was made."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["case"])


# Left padding is not a feature of dash_attention.
PREFILL_FILES = [path for path in FILES if not any(case_of(path)["left_pad"])]
DECODE_FILES = [path for path in PREFILL_FILES if case_of(path)["decode_steps"]]

pytestmark = pytest.mark.skipif(not FILES, reason="no golden files in $DASH_GOLDEN, .golden or ../shared/golden")


def load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The case, and the tensors with queries, keys, values and outputs as [batch, seq, heads, head_dim]."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in {"queries", "keys", "values", "out", "decode_out"} & tensors.keys():
        tensors[name] = tensors[name].transpose(1, 2)
    return case_of(path), tensors


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    return {
        "chunk_size": case["chunk_size"],
        "routing_scale": case["scaling_factor"],
        "prior_normalizer": "geometric_mean" if case["estimate_diagonal"] else "none",
        "prior_temperature": case["sigma"],
    }


def relative_error(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def tolerance(tensors: dict[str, Tensor]) -> float:
    """Their half-precision files carry the rounding of their kernel's output."""
    return 3e-4 if tensors["queries"].dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", PREFILL_FILES, ids=lambda path: path.stem)
def test_prefill(path, dtype):
    case, tensors = load(path)
    q, k, v = (tensors[name][:, : case["prefill_len"]].to(dtype) for name in ("queries", "keys", "values"))
    out, stats = dash_attention(q, k, v, tensors["head_cls"], **arguments(case), return_stats=True)
    assert relative_error(out, tensors["out"]) < tolerance(tensors)
    assert stats.residual < (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PREFILL_FILES, ids=lambda path: path.stem)
def test_prefill_in_triton(path):
    case, tensors = load(path)
    q, k, v = (tensors[name][:, : case["prefill_len"]].cuda() for name in ("queries", "keys", "values"))
    out = dash_attention(q, k, v, tensors["head_cls"].cuda(), **arguments(case), backend="triton")
    assert relative_error(out.cpu(), tensors["out"]) < tolerance(tensors)


def decode_error(path: Path, device: str, backend: str) -> float:
    """Of all steps after the prefill, the float32 tensors of the file given to both functions token by token."""
    case, tensors = load(path)
    q, k, v = (tensors[name].to(device).float() for name in ("queries", "keys", "values"))
    w, size, prefill = tensors["head_cls"].to(device).float(), case["chunk_size"], case["prefill_len"]
    batch, capacity, kv_heads, head_dim = k.shape
    summaries = torch.zeros(batch, -(-capacity // size), kv_heads, head_dim, device=device)
    summaries[:, : prefill // size] = chunk_summaries(k[:, :prefill], w, chunk_size=size)
    steps = []
    for t in range(prefill, prefill + case["decode_steps"]):
        lengths = torch.full((batch,), t + 1, dtype=torch.int32, device=device)
        update_summaries(k, summaries, lengths, w, chunk_size=size, backend=backend)
        steps.append(dash_decode(q[:, t], k, v, summaries, lengths, **arguments(case), backend=backend))
    return relative_error(torch.stack(steps, 1).cpu(), tensors["decode_out"])


@pytest.mark.parametrize("path", DECODE_FILES, ids=lambda path: path.stem)
def test_decode(path):
    assert decode_error(path, "cpu", "reference") < tolerance(load(path)[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted")
@pytest.mark.parametrize("path", DECODE_FILES, ids=lambda path: path.stem)
def test_decode_in_triton(path):
    assert decode_error(path, "cpu", "triton") < tolerance(load(path)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("path", DECODE_FILES, ids=lambda path: path.stem)
def test_decode_in_triton_on_gpu(path):
    assert decode_error(path, "cuda", "triton") < tolerance(load(path)[1])
