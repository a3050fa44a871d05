"""The configuration of an exported Dash model, as transformers sees it."""

from typing import Any

from transformers import PreTrainedConfig


class DashConfig(PreTrainedConfig):
    """`model` holds the fields of our ModelConfig; the rest of config.json repeats some under transformers' names."""

    model_type = "dash_train"
    model: dict[str, Any] | None = None
    vocab_size: int = 0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # Who makes a configuration is about to need the model; importing that takes too long to do it before.
        import dash_train.huggingface.modeling  # noqa: F401
