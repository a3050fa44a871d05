"""Decoding: the chunks to which the newest token of each sequence attends."""

from typing import NamedTuple

from torch import Tensor


class ChunkLists(NamedTuple):
    """A list a KV head and sequence. It has room for the whole history."""

    chunks: Tensor  # [batch, kv_heads, chunks] int32: the routed chunks, ascending, then the own chunk
    log_pbar: Tensor  # the same shape, fp32: log max(pbar, 1e-20); the normalizer for the own chunk, so its prior is 0
    keys: Tensor  # [batch, kv_heads] int32: in these chunks, up to the newest; 0 for a sequence of length 0
    normalizer: Tensor  # [batch, kv_heads] fp32: what b_c subtracts from log pbar
