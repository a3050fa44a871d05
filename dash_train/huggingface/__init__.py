"""Dash models as transformers knows them, and Hugging Face folders.

Exported folders import DashConfig, DashModel and DashForCausalLM from here. Each is imported when it is asked for:
torch and transformers take seconds.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash_train.huggingface.config import DashConfig
    from dash_train.huggingface.modeling import DashForCausalLM, DashModel

__all__ = ["DashConfig", "DashForCausalLM", "DashModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dash_train.huggingface import modeling

    return getattr(modeling, name)
