"""One decoding step in Triton: six launches of fixed size, nothing that waits for the device.

Score and choose the chunks; read the certain ones and the base sample; find the budget; read the rest; merge.
"""

from torch import Tensor

from dash_train.kernels.dash.triton.summaries import summarize_chunks
from dash_train.kernels.vattention.reference.attention import VAttentionReport
from dash_train.kernels.vattention.reference.population import VAttentionConfig
from dash_train.kernels.vattention.triton.attend import attend_sample
from dash_train.kernels.vattention.triton.budget import find_budget, merge
from dash_train.kernels.vattention.triton.select import score_summaries, select_chunks
from dash_train.kernels.vattention.triton.workspace import Workspace, decode_shape, new_workspace


def vattention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    summaries: Tensor | None,
    chunk_bias: Tensor | None,
    bounds: tuple[Tensor, Tensor] | None,
    seed: Tensor,
    config: VAttentionConfig,
) -> tuple[Tensor, VAttentionReport, Workspace]:
    """Arguments as in vattention_decode, checked. The workspace is what tests compare with the reference."""
    q, lengths, seed = q.contiguous(), lengths.int(), seed.long()
    if summaries is None:
        no_query = k_cache.new_zeros(k_cache.shape[2:])
        summaries, _ = summarize_chunks(k_cache, no_query, config.chunk_size)
    if chunk_bias is not None:
        chunk_bias = chunk_bias.float().contiguous()
    shape = decode_shape(q, k_cache, config)
    work = new_workspace(shape, v_cache, bounded=bounds is not None)
    read = (q, k_cache, v_cache, lengths, chunk_bias, seed, shape, config, work)
    score_summaries(q, summaries, bounds, lengths, shape, work)
    select_chunks(lengths, chunk_bias, shape, config, work)
    attend_sample(*read, extra=False)
    find_budget(v_cache, shape, config, work)
    attend_sample(*read, extra=True)
    out, report = merge(q, shape, config, work)
    return out, report, work
