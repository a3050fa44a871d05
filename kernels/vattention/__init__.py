"""vAttention (arXiv 2510.05688): sparse decoding attention with a verified (epsilon, delta) error bound.

See docs/kernels.md and docs/vattention.md.
"""

from dash_train.kernels.vattention.decode import vattention_decode
from dash_train.kernels.vattention.reference.attention import VAttentionReport
from dash_train.kernels.vattention.reference.sketch import make_sketch

__all__ = ["VAttentionReport", "make_sketch", "vattention_decode"]
