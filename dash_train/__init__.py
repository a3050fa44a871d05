"""DashTrain: a long-context LLM pretraining framework around DashAttention."""

from dash_train.registration import register_with_transformers

register_with_transformers()
