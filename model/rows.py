"""What every block of a model is told of the rows besides their hidden states."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dash_train.model.cache import Cache
from dash_train.model.context import WHOLE_ROWS, Context
from dash_train.model.full_attention import BlockMask

# (layer, (q, k, v, chunk_query, out), the function of q that makes the routers' queries, dash_attention's options)
Watch = Callable[[int, tuple[Tensor, ...], Callable[[Tensor], Tensor], dict[str, Any]], None]


@dataclass(frozen=True)
class Rows:
    """Rows `[batch, seq]` on their way through the blocks.

    Where `context` shares them among ranks, `document_starts` are those of whole rows, `real` and `mask` those of the
    queries that attend on this rank. With a cache there are no documents, masks or shares.
    """

    document_starts: Tensor | None = None  # [batch, seq] int32
    real: Tensor | None = None  # [batch, queries] bool: False for padding, which no statistic counts
    mask: Tensor | BlockMask | None = None  # full attention's; None: causality is all
    cache: Cache | None = None
    context: Context = WHOLE_ROWS
    router_warmup: bool = False  # Dash layers attend to everything, and their routers learn where that goes
    watch: Watch | None = None  # called by Dash layers with each forward's inputs and output
