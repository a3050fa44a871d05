"""Exported Dash models inside transformers: `AutoModelForCausalLM.from_pretrained(folder)`, `generate` and all.

`import dash_train` is enough for transformers to know the classes. Arguments that `forward` does not name are refused,
as any Python function refuses them: nothing that a caller asks for is swallowed.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from dash_train.huggingface.config import DashConfig
from dash_train.huggingface.conversion import AUTO_MAP, MODELING_CODE, MODELING_FILE, dash_config
from dash_train.inference.decode_report import DecodeReport
from dash_train.inference.generation import choose_decoding
from dash_train.model.attention import Attention
from dash_train.model.cache import PIECE_SIZE, Cache, LayerCache
from dash_train.model.full_attention import document_mask
from dash_train.model.fused import RMSNorm
from dash_train.model.layers import Embedding, Linear
from dash_train.model.loss import LanguageModelHead
from dash_train.model.rotary import rotary_tables
from dash_train.model.transformer import Block

__all__ = ["DashConfig", "DashForCausalLM", "DashModel"]

# What transformers calls the cache of a model: `cache` of late, `past_key_values` before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class GenerationCache(Cache):
    """Our cache, with what transformers' `generate` asks of one; it grows with its rows."""

    is_compileable = False
    is_linear = (False,)
    filled = 0  # tokens a row, with padding: `lengths` without waiting for the device

    def get_seq_length(self) -> int:
        """Tokens a row that have gone in, with padding."""
        return self.filled

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

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back, as assisted decoding does: not where routing looks back over its block."""
        return all(layer.routing is None for layer in self.layers)

    def activate_past_recording(self) -> None:
        """Nothing has to be kept for `crop` that is not."""

    def crop(self, tokens: int) -> None:
        """Take back the last so many tokens of every row; `tokens` is negative."""
        self.lengths += tokens
        self.filled += tokens

    def make_room(self, tokens: int) -> None:
        """Room for so many more tokens a row; their number is added to `filled`."""
        self.filled += tokens
        if self.filled > self.capacity:
            self.layers = [_grown(layer, max(self.filled, 2 * self.capacity)) for layer in self.layers]


def _grown(layer: LayerCache, tokens: int) -> LayerCache:
    """A copy with room for at least so many tokens a row."""
    capacity = layer.keys.shape[1]
    multiple = -(-tokens // capacity)  # of whole chunks, since the capacity is

    def grow(tensor: Tensor, dim: int) -> Tensor:
        return torch.cat([tensor, *[torch.zeros_like(tensor)] * (multiple - 1)], dim)

    routing = layer.routing
    if routing is not None:
        lists = routing.lists
        lists = lists._replace(chunks=grow(lists.chunks, 2), log_pbar=grow(lists.log_pbar, 2))
        routing = routing._replace(lists=lists)
    summaries = None if layer.summaries is None else grow(layer.summaries, 1)
    return LayerCache(grow(layer.keys, 1), grow(layer.values, 1), summaries, routing)


class Rows(NamedTuple):
    """Rows as the blocks take them: padding at their end, every document from a chunk's border on."""

    hidden: Tensor  # [batch, width, hidden_size]
    positions: Tensor  # [1 or batch, width], in their documents
    real: Tensor | None  # [batch, width] bool, None where all are
    document_starts: Tensor | None  # [batch, width] int32, None where every row is one document
    back: Tensor | None  # [batch, seq]: where the tokens that came in stand, None where they stand as they came

    def restore(self, hidden: Tensor) -> Tensor:
        """Hidden states `[batch, width, hidden_size]` in the order of the tokens that came in.

        Padding gets those of its row's last token: from the last column a generation goes on, on whichever side the
        padding is.
        """
        return hidden if self.back is None else hidden.gather(1, _wide(self.back, hidden))


def arrange_rows(
    hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, chunk_size: int, *, packed: bool = True
) -> Rows:
    """Rows `[batch, seq, hidden_size]` as the blocks take them.

    Dash chunks and positions count a document's own tokens, so that it gives the same on either side of its padding,
    without it, and packed with others: a document begins wherever `position_ids` `[1 or batch, seq]` is 0.

    Raises:
        ValueError: the mask is not `[batch, seq]`, the positions do not count a document's tokens from 0, or there are
            several documents in a row where `packed` is False.
    """
    batch, seq, _ = hidden.shape
    index = torch.arange(seq, device=hidden.device)[None]
    real = order = back = None
    if attention_mask is not None:
        _check_mask(attention_mask, batch, seq)
        real = attention_mask.bool()
        order = real.int().argsort(dim=1, descending=True, stable=True)
        last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
        back = torch.where(real, order.argsort(dim=1), last)
        hidden, real = hidden.gather(1, _wide(order, hidden)), real.gather(1, order)
    if position_ids is None:
        return Rows(hidden, index, real, None, back)
    positions = position_ids.expand(batch, seq)
    if order is not None:
        positions = positions.gather(1, order)
    counted = torch.ones_like(positions, dtype=torch.bool) if real is None else real
    begins = (positions == 0) & (index > 0) & counted
    starts = torch.where(begins, index, 0).cummax(1).values
    if ((positions != index - starts) & counted).any():
        raise ValueError("position_ids: expected every document's tokens counted from 0, one by one")
    if not begins.any():
        return Rows(hidden, index, real, None, back)
    if not packed:
        raise ValueError("position_ids begin anew within a row: a cache holds one document a row")
    return _spread(hidden, real, begins, starts, back, chunk_size)


def _spread(
    hidden: Tensor, real: Tensor | None, begins: Tensor, starts: Tensor, back: Tensor | None, chunk_size: int
) -> Rows:
    """Documents that begin at `starts` `[batch, seq]` moved apart, each to the border of a chunk."""
    batch, seq, _ = hidden.shape
    index = torch.arange(seq, device=hidden.device).expand(batch, seq)
    gaps = torch.where(begins, -(index - starts.roll(1, 1)) % chunk_size, 0)
    moved = gaps.cumsum(1)
    places = index + moved
    width = int(places.max()) + 1

    def place(values: Tensor) -> Tensor:
        where = _wide(places, values) if values.dim() == 3 else places
        return values.new_zeros(batch, width, *values.shape[2:]).scatter(1, where, values)

    document_starts = place(starts + moved).cummax(1).values  # a gap belongs to the document before it
    positions = torch.arange(width, device=hidden.device) - document_starts
    real = place(torch.ones_like(begins) if real is None else real)
    back = places if back is None else places.gather(1, back)
    return Rows(place(hidden), positions, real, document_starts.int(), back)


def _wide(places: Tensor, hidden: Tensor) -> Tensor:
    """Places `[batch, seq]` for the gathering of hidden states `[batch, any, hidden_size]`."""
    return places[..., None].expand(-1, -1, hidden.shape[-1])


def document_positions(
    seq: int,
    position_ids: Tensor | None,
    seq_idx: Tensor | None,
    borders: tuple[Tensor | None, ...],
    device: torch.device,
) -> Tensor | None:
    """`position_ids` `[1 or batch, seq]` by all that a collator says of packed documents; None where it says nothing.

    Raises:
        ValueError: one contradicts the other, or borders are not those of a single row.
    """
    index = torch.arange(seq, device=device)
    ways = [] if position_ids is None else [position_ids]
    if seq_idx is not None:
        begins = seq_idx.diff(dim=1, prepend=seq_idx[:, :1]) != 0
        ways.append(index - torch.where(begins, index, 0).cummax(1).values)
    for starts in borders:
        if starts is not None:
            if starts[0] != 0 or starts[-1] != seq:
                raise ValueError(f"cu_seq_lens: expected the borders of one row, from 0 to its {seq} tokens")
            ways.append((index - starts[torch.searchsorted(starts, index, right=True, out_int32=True) - 1])[None])
    if any((way != ways[0]).any() for way in ways[1:]):
        raise ValueError("position_ids, seq_idx and cu_seq_lens: they place documents differently")
    return ways[0] if ways else None


def _check_mask(mask: Tensor, batch: int, seq: int) -> None:
    if mask.shape != (batch, seq):
        raise ValueError(f"attention_mask has shape {list(mask.shape)}, expected {[batch, seq]}: 0 at padding, else 1")


class DashPreTrainedModel(PreTrainedModel):
    """What the models with and without a head have in common."""

    config_class = DashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Linear | Embedding | nn.RMSNorm | Attention):
            module.reset_parameters()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize as transformers does, and our part of the configuration with it."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.config.model = {**self.config.model, "vocab_size": self.config.vocab_size}
        return embeddings

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save as transformers does, with the file by which `trust_remote_code=True` finds the classes."""
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            (Path(save_directory) / f"{MODELING_FILE}.py").write_text(MODELING_CODE)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: transformers would copy this file, which is no use alone, into what is saved."""


class DashModel(DashPreTrainedModel):
    """Everything between token ids and the output projection."""

    def __init__(self, config: DashConfig) -> None:
        super().__init__(config)
        self.shape = dash_config(config.to_dict())
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
        position_ids = document_positions(
            hidden.shape[1], position_ids, seq_idx, (cu_seq_lens_q, cu_seq_lens_k), hidden.device
        )
        if use_cache and cache is None:
            batch, seq, _ = hidden.shape
            cache = GenerationCache.allocate(self.shape, batch, seq, hidden.dtype, hidden.device)
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
        """The states of prompts, piece by piece, or of tokens that continue rows, one by one."""
        batch, seq, _ = hidden.shape
        if attention_mask is not None:
            _check_mask(attention_mask, batch, cache.filled + seq)
        continued = cache.filled > 0
        cache.make_room(seq)
        if continued:
            self._check_continuation(attention_mask, position_ids, cache, seq)
            steps = (step for token in hidden.split(1, 1) for step in cache.pieces(token, None))
            return _joined([self._blocks(*step, cache=cache, keep=keep) for step in steps])
        rows = arrange_rows(hidden, attention_mask, position_ids, self.shape.attention.chunk_size, packed=False)
        pieces = cache.pieces(rows.hidden, rows.real)
        states = _joined([self._blocks(*piece, cache=cache, keep=keep) for piece in pieces])
        cache.totals.zero_()  # the report is on the steps
        return [rows.restore(state) for state in states]

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
        rotary = rotary_tables(positions, self.shape)
        states = [hidden]
        for block in self.layers:
            inputs = (hidden, rotary, document_starts, real, mask, cache)
            recomputed = self.gradient_checkpointing and self.training and cache is None
            hidden, _ = self._gradient_checkpointing_func(block, *inputs) if recomputed else block(*inputs)
            states = [*states, hidden] if keep else [hidden]
        return states


def _joined(pieces: list[list[Tensor]]) -> list[Tensor]:
    """States of pieces as those of the whole."""
    return [torch.cat(states, dim=1) for states in zip(*pieces, strict=True)]


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
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )

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
        names = ("epsilon", "delta", "verify", "routing_every")
        options = {name: getattr(generation_config, name) for name in names if hasattr(generation_config, name)}
        shape = self.model.shape
        model_kwargs[CACHE] = GenerationCache.allocate(
            shape,
            rows,
            max_cache_length,
            self.dtype,
            self.device,
            decoding=choose_decoding(shape, getattr(generation_config, "decode", None), **options),
            piece_size=getattr(generation_config, "piece_size", PIECE_SIZE),
        )


AutoModel.register(DashConfig, DashModel, exist_ok=True)
AutoModelForCausalLM.register(DashConfig, DashForCausalLM, exist_ok=True)
