"""Exported Dash models inside transformers: `AutoModelForCausalLM.from_pretrained(folder)`, `generate` and all.

`import dash_train` is enough for transformers to know the classes. Arguments that `forward` does not name are refused,
as any Python function refuses them: nothing that a caller asks for is swallowed.

The text of this module also goes into the modelling file of every export (generated.py), where plain.py stands for what
it imports: it may use of our models what plain.py has, and of transformers what version 4.57 has.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from dash_train.huggingface.cache import GenerationCache
from dash_train.huggingface.config import AUTO_MAP, MODELING_FILE, DashConfig
from dash_train.huggingface.documents import arrange_rows, check_mask, document_positions
from dash_train.huggingface.families import shape_of
from dash_train.huggingface.generated import modeling_code
from dash_train.model.attention import Attention
from dash_train.model.full_attention import document_mask
from dash_train.model.fused import RMSNorm
from dash_train.model.layers import Embedding, Linear
from dash_train.model.loss import LanguageModelHead
from dash_train.model.rotary import rotary_tables
from dash_train.model.rows import Rows as BlockRows
from dash_train.model.transformer import Block

__all__ = ["DashConfig", "DashForCausalLM", "DashModel"]

# What transformers calls the cache of a model: `cache` of late, `past_key_values` before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class DashPreTrainedModel(PreTrainedModel):
    """What the models with and without a head have in common."""

    config_class = DashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Linear | Embedding | nn.RMSNorm | Attention):
            module.reset_parameters()

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save as transformers does, with the file by which `trust_remote_code=True` finds the classes."""
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{MODELING_FILE}.py").write_text(modeling_code())
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this file, which is no use alone, into what is saved."""


class DashModel(DashPreTrainedModel):
    """Everything between token ids and the output projection."""

    def __init__(self, config: DashConfig) -> None:
        super().__init__(config)
        self.shape = shape_of(config)
        self.embed_tokens = Embedding(config.vocab_size, self.shape.hidden_size, self.shape.init_std)
        self.layers = nn.ModuleList(Block(self.shape, layer) for layer in range(self.shape.layers))
        self.norm = RMSNorm(self.shape.hidden_size, eps=self.shape.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GenerationCache | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states `[batch, seq, hidden_size]` of the tokens `[batch, seq]`, or of their embeddings.

        Args:
            attention_mask: `[batch, seq]`, 0 at padding, on any side; with a cache it may be the whole rows'.
            position_ids: `[1 or batch, seq]`; where they are 0 a document begins, which sees none before it.
            cache: filled by the prompts when it is empty, continued by any number of tokens a row when it is not;
                older versions of transformers call it `past_key_values`.
            use_cache: make a cache where none is given.
            output_hidden_states: return those before every block too.
            seq_idx: `[1 or batch, seq]`, the number of each token's document: said beside `position_ids`, or in place
                of them, as are
            cu_seq_lens_q, cu_seq_lens_k: `[documents + 1]`, where the documents of a single row begin, and its length.
                With them come `max_length_q` and `max_length_k`, which nothing here needs.

        Raises:
            ValueError: not one of tokens and embeddings, `output_attentions`, or see `arrange_rows`.
        """
        cache = past_key_values if cache is None else cache
        if output_attentions:
            raise ValueError("output_attentions: not supported, attention weights are never held")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.shape.embedding_scale != 1:
            hidden = hidden * self.shape.embedding_scale
        position_ids = document_positions(
            hidden.shape[1], position_ids, seq_idx, (cu_seq_lens_q, cu_seq_lens_k), hidden.device
        )
        if use_cache and cache is None:
            batch, seq, _ = hidden.shape
            cache = GenerationCache.begin(self.shape, batch, seq, hidden.dtype, hidden.device)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is None:
            states = self._whole_rows(hidden, attention_mask, position_ids, output_hidden_states)
        else:
            states = self._cached(hidden, attention_mask, position_ids, cache, output_hidden_states)
        last = self.norm(states[-1])
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=(*states[:-1], last) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _whole_rows(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, keep: bool
    ) -> list[Tensor]:
        """The states of a forward without a cache."""
        rows = arrange_rows(hidden, attention_mask, position_ids, self.shape.attention.chunk_size)
        mask, starts = None, rows.document_starts
        if starts is not None and "full" in map(self.shape.attention_type, range(self.shape.layers)):
            mask = document_mask(starts, torch.arange(starts.shape[1], device=starts.device))
        states = self._blocks(rows.hidden, rows.positions, rows.real, starts, mask, keep=keep)
        return [rows.restore(state) for state in states]

    def _cached(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: GenerationCache,
        keep: bool,
    ) -> list[Tensor]:
        """The states of prompts, or of tokens that continue rows, in the pieces that the cache takes them in."""
        batch, seq, _ = hidden.shape
        if attention_mask is not None:
            check_mask(attention_mask, batch, cache.filled + seq)
        if cache.filled > 0:
            self._check_continuation(attention_mask, position_ids, cache, seq)
            attention_mask = position_ids = None
        rows = arrange_rows(hidden, attention_mask, position_ids, self.shape.attention.chunk_size, packed=False)
        pieces = [self._blocks(*piece, cache=cache, keep=keep) for piece in cache.pieces(rows.hidden, rows.real)]
        return [rows.restore(torch.cat(states, dim=1)) for states in zip(*pieces, strict=True)]

    def _check_continuation(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, cache: GenerationCache, seq: int
    ) -> None:
        if attention_mask is not None and not attention_mask[:, -seq:].all():
            raise ValueError("attention_mask: tokens that continue a cache cannot be padding")
        expected = cache.lengths[:, None] + torch.arange(seq, device=cache.lengths.device)
        if position_ids is not None and not (position_ids == expected).all():
            raise ValueError("position_ids: tokens that continue a cache stand right after what it holds")

    def _blocks(
        self,
        hidden: Tensor,
        positions: Tensor,
        real: Tensor | None,
        document_starts: Tensor | None = None,
        mask: Any = None,
        cache: GenerationCache | None = None,
        *,
        keep: bool,
    ) -> list[Tensor]:
        """The hidden states before every block and after the last; only the latter unless they are to be kept."""
        rotary = rotary_tables(positions, self.shape, _longest(positions, real) if cache is None else cache.longest)
        states = [hidden]
        for block in self.layers:
            inputs = (hidden, rotary, BlockRows(document_starts, real, mask, cache))
            recomputed = self.gradient_checkpointing and self.training and cache is None
            hidden, _ = self._gradient_checkpointing_func(block, *inputs) if recomputed else block(*inputs)
            states = [*states, hidden] if keep else [hidden]
        return states


def _longest(positions: Tensor, real: Tensor | None) -> Tensor:
    """Tokens of the longest document, 0-dim."""
    return (positions if real is None else positions.masked_fill(~real, 0)).max() + 1


class DashForCausalLM(DashPreTrainedModel, GenerationMixin):
    """`LanguageModel` with transformers' interface."""

    accepts_loss_kwargs = True  # `num_items_in_batch`: Trainer leaves the division by the counted tokens to the model
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DashConfig) -> None:
        super().__init__(config)
        self.model = DashModel(config)
        self.lm_head = LanguageModelHead(self.model.shape.hidden_size, config.vocab_size, self.model.shape.init_std)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GenerationCache | None = None,
        past_key_values: GenerationCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits `[batch, seq, vocab]` of the tokens `[batch, seq]`, and with labels the loss. Beside `DashModel`'s:

        Args:
            labels: `[batch, seq]`, the tokens themselves; -100 does not count.
            logits_to_keep: of the last so many tokens only (0: of all), or of those at these indices `[any]`.
            num_items_in_batch: the loss is the sum over it; None is the mean of the counted tokens.
            shift_labels: `[batch, seq]`, the tokens after each, in place of labels' own shifting.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            seq_idx=seq_idx,
            cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept] * self.model.shape.logits_scale)
        loss = None
        if labels is not None or shift_labels is not None:
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does, without the `cache_position` of version 4, which the cache knows."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs

    def _prepare_position_ids_for_generation(self, *_: Any) -> None:
        """None: every row counts its own tokens, which transformers cannot tell of padding on the right."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], _mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """`generate` asks for its cache here. How to decode stands in the generation config: `decode`, `epsilon`,
        `delta`, `verify`, `routing_every`, `piece_size`."""
        if generation_config.use_cache is False or model_kwargs.get(CACHE) is not None:
            return
        rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        model_kwargs[CACHE] = GenerationCache.begin(
            self.model.shape, rows, max_cache_length, self.dtype, self.device, generation_config
        )
