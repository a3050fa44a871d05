"""Tells transformers of exported Dash models, without importing it before somebody else does."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def register() -> None:
    """From now on `AutoConfig` knows `DashConfig`: at once, or as soon as it exists."""
    if AUTO_CONFIG in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register() -> None:
    from transformers import AutoConfig

    from dash_train.huggingface.config import DashConfig

    AutoConfig.register(DashConfig.model_type, DashConfig, exist_ok=True)


class _WhenImported:
    """Finds the module of `AutoConfig` as Python does, and registers after it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AUTO_CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
