"""The `model` section of a recipe: the shape of the transformer as plain typed data."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

AttentionType = Literal["dash", "full"]
ActivationCheckpointing = Literal["none", "full", "selective"]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A recipe section: unknown keys are refused, and values are checked again when they change."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True)


class AttentionConfig(Section):
    type: AttentionType | list[AttentionType] = "dash"
    """`dash` (DashAttention) or `full` (causal softmax attention); a list gives one type per layer."""
    chunk_size: Literal[16, 32, 64, 128] = 64
    """Tokens per chunk, the unit of routing; `train.seq` must be a multiple of it."""
    routing_block: PositiveInt | list[PositiveInt] = 1
    """Consecutive tokens that share one choice of chunks, a power of two up to `chunk_size`; 1 is the paper's. A list
    gives one number per layer (full attention has no use for its)."""
    routing_window: PositiveInt | list[PositiveInt] = 1
    """Queries whose mean chooses for a routing block: the last so many up to the block's first token. A list gives one
    number per layer."""
    routing_scale: PositiveFloat | Literal["auto"] | list[PositiveFloat] = "auto"
    """Factor on the routing scores: larger is sparser. `auto` finds, before step 0, the scale per layer at which the
    density of the run's first rows is `initial_density`, and freezes it; a list gives one number per layer."""
    initial_density: Annotated[float, Field(gt=0, le=1)] = 0.25
    """The density that `routing_scale: auto` aims at."""
    prior_normalizer: Literal["geometric_mean", "none", "peak"] = "peak"
    """How the log-prior of routed chunks is centred: on their mean (the authors' choice), not at all, or on their
    maximum (continuous when a chunk enters the support)."""
    prior_temperature: PositiveFloat = 1.0
    """Divides the log-prior; large values turn the prior into a hard mask. Ignored by the normalizer `none`."""
    backend: Literal["auto", "triton", "reference"] = "auto"
    """What computes DashAttention in training: the Triton kernels, the plain torch reference in fp32 (slow; for
    comparisons), or `auto`: Triton on CUDA where it can, else the reference."""

    @model_validator(mode="after")
    def _blocks_divide_chunks(self) -> "AttentionConfig":
        for block in self.routing_block if isinstance(self.routing_block, list) else [self.routing_block]:
            if self.chunk_size % block:
                raise ValueError(f"routing_block ({block}) must divide chunk_size ({self.chunk_size})")
        return self


class RopeScaling(Section):
    type: Literal["linear", "yarn", "llama3"]
    """How rotary frequencies are stretched to a longer context."""
    factor: Annotated[float, Field(ge=1)]
    """New context length over the original one."""
    original_seq: Annotated[int, Field(gt=0)]
    """Context length the weights were trained at (`original_max_position_embeddings`)."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this over `original_seq` are left alone."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this over `original_seq` are interpolated."""
    low_freq_factor: PositiveFloat = 1.0
    """Llama 3: wavelengths above original_seq / low_freq_factor are interpolated."""
    high_freq_factor: PositiveFloat = 4.0
    """Llama 3: wavelengths below original_seq / high_freq_factor are left alone."""


class ModelConfig(Section):
    layers: Annotated[int, Field(gt=0)] = 12
    """Transformer blocks."""
    hidden_size: Annotated[int, Field(gt=0)] = 768
    """Width of the residual stream."""
    heads: Annotated[int, Field(gt=0)] = 12
    """Query heads; a multiple of kv_heads."""
    kv_heads: Annotated[int, Field(gt=0)] = 2
    """Key/value heads."""
    head_dim: Annotated[int, Field(ge=8, le=256, multiple_of=2)] = 64
    """Width of a head."""
    mlp_size: Annotated[int, Field(gt=0)] = 2048
    """Inner width of the SwiGLU MLP."""
    vocab_size: Annotated[int, Field(gt=0)] | None = None
    """Rows of the embedding; null takes the tokenizer's size, rounded up to a multiple of 64."""
    tie_embeddings: bool = False
    """Share the input embedding with the output projection."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE (as in Qwen3)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretches RoPE to a longer context than the weights were trained at; null (the default) leaves it alone."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; projections into the residual stream get init_std / sqrt(2 layers)."""
    attention: AttentionConfig = AttentionConfig()
    """The attention of the blocks."""

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        for name in ("type", "routing_block", "routing_window", "routing_scale"):
            value = getattr(self.attention, name)
            if isinstance(value, list) and len(value) != self.layers:
                raise ValueError(f"attention.{name} lists {len(value)} values for {self.layers} layers")
        return self

    def attention_type(self, layer: int) -> AttentionType:
        """The attention type of one layer."""
        kind = self.attention.type
        return kind[layer] if isinstance(kind, list) else kind

    def routing_block(self, layer: int) -> int:
        """The tokens of one layer's routing blocks."""
        block = self.attention.routing_block
        return block[layer] if isinstance(block, list) else block

    def routing_window(self, layer: int) -> int:
        """The queries in the mean that chooses for a routing block of one layer."""
        window = self.attention.routing_window
        return window[layer] if isinstance(window, list) else window

    def routing_scale(self, layer: int) -> float:
        """The routing scale of one layer; 1 until `auto` has been resolved."""
        scale = self.attention.routing_scale
        if isinstance(scale, list):
            return scale[layer]
        return 1.0 if isinstance(scale, str) else scale
