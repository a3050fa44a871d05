"""DashTrain: a long-context LLM pretraining framework around DashAttention.

Importing it makes exported Dash models known to transformers, so that `AutoModelForCausalLM` loads them.
"""

from dash_train.huggingface.registration import register

register()
