"""DashAttention in plain PyTorch: the definition, on any device. `stages.py` first."""
