"""What the kernels of all attentions share."""
