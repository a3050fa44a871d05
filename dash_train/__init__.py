"""DashTrain: a long-context LLM pretraining framework around DashAttention.

Importing it tells transformers of exported Dash models, so that `AutoModelForCausalLM` loads them.
"""

from transformers import AutoConfig

from dash_train.huggingface_config import DashConfig

AutoConfig.register(DashConfig.model_type, DashConfig, exist_ok=True)
