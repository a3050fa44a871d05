"""vAttention in plain PyTorch: the definition, on any device."""
