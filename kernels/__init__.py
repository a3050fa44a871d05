"""Attention as functions on tensors. Import `dash_train.kernels`, never `kernels`; nothing is imported here."""
