import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dash_train.model.config import ModelConfig
from dash_train.model.transformer import LanguageModel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a Triton kernel is first imported

ATTENTION: dict[str, Any] = {
    "full": {"type": "full"},
    "dash": {"type": "dash", "routing_scale": 8.0},
    "mixed": {"type": ["full", "dash"], "routing_scale": 8.0},
    "blocks": {"type": "dash", "routing_scale": 8.0, "routing_block": [1, 16], "routing_window": [4, 16]},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The grid runs only when it is asked for by name: `-m gpu` alone leaves it out."""
    if "grid" not in config.option.markexpr:
        chosen = [item for item in items if not item.get_closest_marker("grid")]
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("grid")])
        items[:] = chosen


@pytest.fixture
def tiny_model() -> Callable[..., LanguageModel]:
    """Builds a model of 2 layers and chunks of 16 with random norms and chunk queries, the same at every call.

    `routing` changes keys of `model.attention`, all others those of `model`.
    """

    def build(
        attention: str = "full",
        activation_checkpointing: Any = "none",
        activation_offload: bool = False,
        routing: dict[str, Any] | None = None,
        **changes: Any,
    ) -> LanguageModel:
        shape = {"layers": 2, "hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp_size": 48}
        options = {**shape, "vocab_size": 64, "init_std": 0.2, **changes}
        config = ModelConfig(**options, attention={"chunk_size": 16, **ATTENTION[attention], **(routing or {})})
        torch.manual_seed(0)
        model = LanguageModel(
            config, activation_checkpointing=activation_checkpointing, activation_offload=activation_offload
        )
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("chunk_query"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return model

    return build


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of some forty real text files, 400 KB: two packages of the standard library."""
    folder = tmp_path_factory.mktemp("data") / "corpus"
    for package in ("email", "json"):
        source = Path(sysconfig.get_path("stdlib")) / package
        shutil.copytree(source, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return folder
