"""vAttention (arXiv 2510.05688): sparse decoding attention with a verified (epsilon, delta) error bound."""
