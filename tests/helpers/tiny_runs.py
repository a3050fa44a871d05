"""Small real runs for the trainer's tests: a corpus, a recipe, and the command that starts it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from dash_train.distributed.world import free_port

ROOT = Path(__file__).parents[2]
# One thread, so that a sum has one order and two runs agree to the last bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def write_recipe(path: Path, corpus: Path, **overrides: Any) -> Path:
    """Write a recipe of a tiny Dash model on `corpus`; overrides are `section__key=value`."""
    recipe: dict[str, Any] = {
        "run_dir": str(path.parent / "run"),
        "model": {
            "layers": 2,
            "hidden_size": 32,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "mlp_size": 64,
            "tie_embeddings": True,
            "attention": {"chunk_size": 16},
        },
        "data": {
            "cache": str(corpus.parent / "cache"),
            "sources": [{"type": "text", "path": str(corpus)}],
            "tokenizer": {"vocab_size": 512},
            "validation_fraction": 0.2,
        },
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 2},
        "train": {
            "steps": 6,
            "seq": 128,
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "precision": "fp32",
            "validate_every": 3,
            "validation_rows": 6,
        },
        "parallel": {"zero_stage": 1},
        "checkpoint": {"every": 2},
    }
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(script: str, *arguments: str | Path, ranks: int | None = None) -> subprocess.Popen[str]:
    """Start `launch/<script>` by plain python, or by the deepspeed launcher with a number of ranks."""
    command = [sys.executable]
    if ranks is not None:
        port = str(free_port())
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_accelerators",
            str(ranks),
            "--master_port",
            port,
        ]
    command += [str(ROOT / "launch" / script), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run(script: str, *arguments: str | Path, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `launch/<script>` to its end."""
    process = start(script, *arguments, ranks=ranks)
    stdout, stderr = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
