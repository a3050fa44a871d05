"""vAttention (arXiv 2510.05688): sparse decoding attention with a verified (epsilon, delta) error bound.

See docs/kernels.md.
"""

from dash_train.kernels.vattention.decode import vattention_decode
from dash_train.kernels.vattention.reference.attention import VAttentionReport

__all__ = ["VAttentionReport", "vattention_decode"]
