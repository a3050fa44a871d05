"""The `model` section of a recipe: the shape of the transformer as plain typed data."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dash_train.recipe.section import PositiveFloat, PositiveInt, Section

AttentionType = Literal["dash", "full"]
Density = Annotated[float, Field(gt=0, le=1)]
ActivationCheckpointing = Literal["none", "full", "selective"]


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
    initial_density: Density = 0.25
    """The density that `routing_scale: auto` aims at."""
    target_density: Density | list[tuple[Annotated[int, Field(ge=0)], Density]] | None = None
    """Steer every Dash layer's routing_scale towards this density while training, by what each step measures, slowly
    (over some 50 steps); a list `[[0, 0.25], [500, 0.1]]` sets it from these steps on. null leaves the scales alone."""
    router_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which Dash layers attend to everything while chunk_query learns where that attention goes; then
    they attend by their routers, with `routing_scale: auto` settled anew. For weights of full attention."""
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

    @model_validator(mode="after")
    def _targets_ascend(self) -> "AttentionConfig":
        if isinstance(self.target_density, list):
            steps = [step for step, _ in self.target_density]
            if not steps or steps != sorted(set(steps)):
                raise ValueError(f"target_density lists the steps {steps}, expected at least one, ascending")
        return self

    def density_at(self, step: int) -> float | None:
        """What target_density says of a step, counted from 0; None where it says nothing."""
        if not isinstance(self.target_density, list):
            return self.target_density
        return next((density for first, density in reversed(self.target_density) if first <= step), None)


class RopeScaling(Section):
    type: Literal["linear", "dynamic", "yarn", "llama3", "longrope"]
    """How rotary frequencies are stretched to a longer context."""
    factor: Annotated[float, Field(ge=1)]
    """New context length over the original one."""
    original_seq: PositiveInt
    """Context length the weights were trained at (`original_max_position_embeddings`)."""
    attention_factor: PositiveFloat | None = None
    """YaRN, LongRoPE: factor on queries and keys; null follows from `factor`, as in their papers."""
    beta_fast: float = 32.0
    """YaRN: dimensions that turn more often than this over `original_seq` are left alone."""
    beta_slow: float = 1.0
    """YaRN: dimensions that turn less often than this over `original_seq` are interpolated."""
    truncate: bool = True
    """YaRN: round the ends of the ramp between the two to whole dimensions."""
    low_freq_factor: PositiveFloat = 1.0
    """Llama 3: wavelengths above original_seq / low_freq_factor are interpolated."""
    high_freq_factor: PositiveFloat = 4.0
    """Llama 3: wavelengths below original_seq / high_freq_factor are left alone."""
    short_factor: list[PositiveFloat] | None = None
    """LongRoPE: divides each frequency while no row is longer than `original_seq`."""
    long_factor: list[PositiveFloat] | None = None
    """LongRoPE: divides each frequency as soon as one is."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeScaling":
        given = self.short_factor is not None, self.long_factor is not None
        if given != (self.type == "longrope",) * 2:
            raise ValueError("rope_scaling: type longrope needs short_factor and long_factor, other types have none")
        if self.attention_factor is not None and self.type not in ("yarn", "longrope"):
            raise ValueError(f"rope_scaling: type {self.type} has no attention_factor")
        return self

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the rows are."""
        return self.type in ("dynamic", "longrope")


class ModelConfig(Section):
    layers: PositiveInt = 12
    """Transformer blocks."""
    hidden_size: PositiveInt = 768
    """Width of the residual stream."""
    heads: PositiveInt = 12
    """Query heads; a multiple of kv_heads."""
    kv_heads: PositiveInt = 2
    """Key/value heads."""
    head_dim: Annotated[int, Field(ge=8, le=256, multiple_of=2)] = 64
    """Width of a head."""
    mlp_size: PositiveInt = 2048
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; null takes the tokenizer's size, rounded up to a multiple of 64."""
    tie_embeddings: bool = False
    """Share the input embedding with the output projection."""
    qk_norm: bool = False
    """RMSNorm on every query and key head before RoPE (as in Qwen3)."""
    qkv_bias: bool = False
    """The projections to queries, keys and values have a bias (as in Qwen2)."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of every RMSNorm."""
    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Stretches RoPE to a longer context than the weights were trained at; null (the default) leaves it alone."""
    nope_layers: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Layers, counted from 0, without RoPE (as in SmolLM3)."""
    embedding_scale: PositiveFloat = 1.0
    """Factor on the embeddings (as in MiniCPM)."""
    residual_scale: PositiveFloat = 1.0
    """Factor on what attention and MLP add to the residual stream (as in MiniCPM)."""
    logits_scale: PositiveFloat = 1.0
    """Factor on the logits (as in MiniCPM)."""
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
        if beyond := [layer for layer in self.nope_layers if layer >= self.layers]:
            raise ValueError(f"nope_layers: there is no layer {beyond[0]}, layers are 0 to {self.layers - 1}")
        scaling = self.rope_scaling
        for factors in (scaling.short_factor, scaling.long_factor) if scaling else ():
            if factors is not None and len(factors) != self.head_dim // 2:
                raise ValueError(
                    f"rope_scaling: short_factor and long_factor need {self.head_dim // 2} values each, half of "
                    f"head_dim; found {len(factors)}"
                )
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
