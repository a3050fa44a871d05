"""Exported Dash models inside transformers: `AutoModelForCausalLM.from_pretrained(folder)`, `generate` and all.

`import dash_train` is enough for transformers to know the classes.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from dash_train.decode_report import DecodeReport
from dash_train.generation import choose_decoding
from dash_train.huggingface_config import DashConfig
from dash_train.model.attention import Attention
from dash_train.model.cache import PIECE_SIZE, Cache
from dash_train.model.config import ModelConfig
from dash_train.model.layers import Embedding, Linear
from dash_train.model.loss import LanguageModelHead
from dash_train.model.transformer import Transformer

__all__ = ["DashConfig", "DashForCausalLM"]

# What transformers calls the cache of a model: `cache` of late, `past_key_values` before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class GenerationCache(Cache):
    """Our cache, with what transformers' `generate` asks of one."""

    is_compileable = False
    is_linear = (False,)
    is_croppable = False

    def get_seq_length(self) -> int:
        """Tokens in the longest row."""
        return int(self.lengths.max())

    def report(self) -> DecodeReport:
        """What the steps since the prompts read, and the worst half-width."""
        report = DecodeReport()
        report.count(self)
        return report

    def reorder_cache(self, rows: Tensor) -> None:
        """Row i becomes a copy of `rows[i]` (int `[batch]`): beam search goes on with the best beams."""
        for layer in self.layers:
            for tensor in layer.tensors():
                tensor.copy_(tensor[rows])
        for per_row in (self.lengths, self.requests):
            per_row.copy_(per_row[rows])


class DashForCausalLM(PreTrainedModel, GenerationMixin):
    """`LanguageModel` with transformers' interface."""

    config_class = DashConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DashConfig) -> None:
        super().__init__(config)
        shape = ModelConfig.model_validate(config.model)
        self.model = Transformer(shape, activation_checkpointing="none")
        self.lm_head = LanguageModelHead(shape.hidden_size, config.vocab_size, shape.init_std)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        if isinstance(module, Linear | Embedding | torch.nn.RMSNorm | Attention):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: GenerationCache | None = None,
        past_key_values: GenerationCache | None = None,
        labels: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, seq, vocab]` of the tokens `[batch, seq]`, or of each row's last with a cache.

        Padding, wherever `attention_mask` is 0, is moved to the right first: Dash chunks and positions count a row's
        own tokens, so that a row gives the same on either side of its padding and without it.
        """
        cache = past_key_values if cache is None else cache
        real = order = None
        if attention_mask is not None and attention_mask.shape == input_ids.shape:  # in decoding it is the whole row's
            order = attention_mask.argsort(dim=1, descending=True, stable=True)
            input_ids, real = input_ids.gather(1, order), attention_mask.gather(1, order).bool()
        hidden, _statistics = self.model(input_ids, real=real, cache=cache)
        if cache is not None:
            hidden = cache.last(hidden)
            if cache.start is not None:
                cache.totals.zero_()  # the report is on the steps
        elif order is not None:
            hidden = torch.empty_like(hidden).scatter(1, order[..., None].expand_as(hidden), hidden)
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], _mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """`generate` asks for its cache here. How to decode stands in the generation config: `decode`, `epsilon`,
        `delta`, `verify`, `routing_every`, `piece_size`."""
        if generation_config.use_cache is not False:
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            names = ("epsilon", "delta", "verify", "routing_every")
            options = {name: getattr(generation_config, name) for name in names if hasattr(generation_config, name)}
            model_kwargs[CACHE] = GenerationCache.allocate(
                self.model.config,
                rows,
                max_cache_length,
                self.dtype,
                self.device,
                decoding=choose_decoding(self.model.config, getattr(generation_config, "decode", None), **options),
                piece_size=getattr(generation_config, "piece_size", PIECE_SIZE),
            )


AutoModelForCausalLM.register(DashConfig, DashForCausalLM, exist_ok=True)
