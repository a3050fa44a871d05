"""Tells transformers of exported Dash models, without importing it before somebody else does."""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def register() -> None:
    """From now on `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know ours: at once, or as soon as they exist."""
    for module, tell in TELL.items():
        if module in sys.modules:
            tell()
        else:
            sys.meta_path.insert(0, _WhenImported(module, tell))


def _register_config() -> None:
    from transformers import AutoConfig

    from dash_train.huggingface.config import DashConfig

    AutoConfig.register(DashConfig.model_type, DashConfig, exist_ok=True)


def _register_models() -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    from dash_train.huggingface.config import DashConfig
    from dash_train.huggingface.modeling import DashForCausalLM, DashModel

    AutoModel.register(DashConfig, DashModel, exist_ok=True)
    AutoModelForCausalLM.register(DashConfig, DashForCausalLM, exist_ok=True)


TELL: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _WhenImported:
    """Finds a module as Python does, and calls `tell` after it has been executed."""

    def __init__(self, module: str, tell: Callable[[], None]) -> None:
        self.module, self.tell = module, tell

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            self.tell()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec
