"""Bytes that a training step needs on each GPU, part by part.

With P parameters on N GPUs: bf16 weights take 2 P, the gradients of a backward pass 2 P, fp32 master weights, sums of
gradients and AdamW's moments 16 P. ZeRO divides by N the latter (stage 1), the gradients (stage 2) and the weights
(stage 3). Activations are proportional to a GPU's tokens; their factors were measured.
"""

import torch

from dash_train.model.config import ModelConfig
from dash_train.model.loss import CHUNK_LOGITS
from dash_train.model.transformer import MLP_TOKENS, LanguageModel
from dash_train.recipe.schema import Recipe

BLOCK_STATES = 6.0  # tensors as large as the hidden states that stand while one block is computed backward
MLP_STATES = 2.0  # and tensors of the MLP's inner width, of at most MLP_TOKENS tokens of a row
BUCKET = 500_000_000  # elements of DeepSpeed's buffers for gradients (reduce_bucket_size)
PREFETCHED = 2  # blocks whose weights stage 3 has gathered at a time
LISTS = 0.6e9  # the routing kernels' lists and what they keep


def parameters(config: ModelConfig) -> int:
    """Of the whole model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LanguageModel(config).parameters())


def memory_parts(recipe: Recipe, gpus: int) -> dict[str, float]:
    """Bytes on each GPU by part; `host` is what one GPU's process holds in host memory."""
    config, train, parallel = recipe.model, recipe.train, recipe.parallel
    count = parameters(config)
    size = 2 if train.precision == "bf16" else 4
    share = [gpus if parallel.zero_stage >= stage else 1 for stage in range(4)]
    weights = size * count / share[3]
    if parallel.zero_stage == 3:
        weights += size * (count - _embeddings(config)) / config.layers * PREFETCHED + size * _embeddings(config)
    gradients = size * count / share[2]
    optimizer = (16 if size == 2 else 8) * count / share[1]
    host = 0.0
    if parallel.offload_optimizer == "cpu":
        host, optimizer = optimizer, 0.0
    if parallel.offload_parameters == "cpu":
        host += size * count / share[3]
        weights -= size * count / share[3]
    kept, passing = _activations(recipe, size)
    if train.activation_offload:
        host, kept = host + kept, 0.0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimizer": optimizer,
        "gradient buckets": size * min(count, _bucket(recipe)) if gpus > 1 and parallel.zero_stage else 0.0,
        "kept activations": kept,
        "one block at work": passing,
        "context exchange": _exchange(recipe, size),
        "logits": (2 + 4) * CHUNK_LOGITS + 4 * config.hidden_size * (config.vocab_size or 0),
        "host": host,
    }


def on_gpu(parts: dict[str, float]) -> float:
    """The sum of what is on the GPU."""
    return sum(value for name, value in parts.items() if name != "host")


def own_tokens(recipe: Recipe) -> int:
    """Tokens that a GPU computes at a time."""
    return recipe.train.micro_batch_size * recipe.train.seq // recipe.parallel.context


def _activations(recipe: Recipe, size: int) -> tuple[float, float]:
    """What the layers keep for the backward pass, and what one block needs while it is computed."""
    config, tokens = recipe.model, own_tokens(recipe)
    hidden, attended = size * config.hidden_size, size * config.heads * config.head_dim
    per_layer = float(hidden)  # the block's input
    if recipe.train.activation_checkpointing != "full":
        per_layer += attended + 4 * config.heads  # attention's output and log-sum-exp
    if recipe.train.activation_checkpointing == "none":
        keys = size * 2 * config.kv_heads * config.head_dim
        per_layer += 3 * hidden + attended + keys + 3 * size * config.mlp_size
    mlp = MLP_STATES * size * config.mlp_size * min(tokens, MLP_TOKENS * recipe.train.micro_batch_size)
    routes = any(config.attention_type(layer) == "dash" for layer in range(config.layers))
    passing = BLOCK_STATES * hidden * tokens + mlp + (LISTS if routes else 0.0)
    return config.layers * per_layer * tokens, passing


def _exchange(recipe: Recipe, size: int) -> float:
    """Keys, values and their gradients of whole rows, where ranks share them."""
    if recipe.parallel.context == 1:
        return 0.0
    config = recipe.model
    rows = recipe.train.micro_batch_size * recipe.train.seq
    return 2 * 2 * size * config.kv_heads * config.head_dim * rows


def _bucket(recipe: Recipe) -> int:
    return int(recipe.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size", BUCKET))


def _embeddings(config: ModelConfig) -> int:
    rows = config.vocab_size or 0
    return rows * config.hidden_size * (1 if config.tie_embeddings else 2)
