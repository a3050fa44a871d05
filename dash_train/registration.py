"""Makes transformers know exported Dash models, without importing transformers, which takes seconds.

AutoConfig learns of DashConfig as soon as somebody imports it, before or after dash_train; a DashConfig then brings the
model's class along (dash_train/huggingface_config.py).
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"


class _AutoConfigFinder(MetaPathFinder):
    """Finds AutoConfig's module as Python does, and registers DashConfig once it has run."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path) if fullname == AUTO_CONFIG_MODULE else None
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def _register(auto: ModuleType) -> None:
    from dash_train.huggingface_config import DashConfig

    auto.AutoConfig.register(DashConfig.model_type, DashConfig, exist_ok=True)


def register_with_transformers() -> None:
    """Register with transformers now if its AutoConfig is imported, otherwise when it is."""
    if AUTO_CONFIG_MODULE in sys.modules:
        _register(sys.modules[AUTO_CONFIG_MODULE])
    else:
        sys.meta_path.insert(0, _AutoConfigFinder())
