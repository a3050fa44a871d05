"""The configuration of an exported Dash model, as transformers sees it."""

from typing import Any

from transformers import PretrainedConfig

MODELING_FILE = "modeling_dash_train"
AUTO_MAP = {
    "AutoConfig": f"{MODELING_FILE}.DashConfig",
    "AutoModel": f"{MODELING_FILE}.DashModel",
    "AutoModelForCausalLM": f"{MODELING_FILE}.DashForCausalLM",
}


class DashConfig(PretrainedConfig):
    """config.json of a Dash model. Lists have one value a layer; docs/kernels.md says what the routing fields mean."""

    model_type = "dash_train"
    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    rope_theta: float = 500000.0
    rope_scaling: dict[str, Any] | None = None
    nope_layers: list[int] | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_types: list[str] | None = None
    chunk_size: int = 64
    routing_block: list[int] | None = None
    routing_window: list[int] | None = None
    routing_scale: list[float] | None = None
    prior_normalizer: str = "peak"
    prior_temperature: float = 1.0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: transformers would copy the file of this class; saving a model writes the one that is needed."""
