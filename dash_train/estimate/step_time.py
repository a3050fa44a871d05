"""Seconds that a training step takes, part by part."""

from dash_train.estimate.machine import GB, NODE, Gpu
from dash_train.estimate.memory import own_tokens, parameters
from dash_train.model.config import ModelConfig
from dash_train.recipe.schema import Recipe

BACKWARD = 2.5  # an attention backward pass over its forward pass: five products for two
UNION = 1.7  # what a token that routes by itself costs in a trained model, for one that shares its routing
BLOCK_BYTES = 60  # bytes of device memory per element of the hidden states that a block moves besides its products
TILE_ROWS = 64  # queries that read a key together: products per byte of keys and values


def step_seconds(recipe: Recipe, gpus: int, gpu: Gpu) -> dict[str, float]:
    """Seconds of one optimizer step by part."""
    config, train = recipe.model, recipe.train
    count = parameters(config)
    tokens = train.global_batch_size * train.seq / gpus  # of one GPU
    again = {"none": 0, "selective": 1, "full": 1}[train.activation_checkpointing]
    attended_again = 1 if train.activation_checkpointing == "full" else 0
    products = 2 * _matrix_parameters(config, count) * tokens * (3 + again) / gpu.matmul
    attention = sum(_attention_seconds(config, layer, train.seq, gpu) for layer in range(config.layers))
    attention *= tokens * (1 + attended_again + BACKWARD)
    elementwise = BLOCK_BYTES * config.hidden_size * config.layers * tokens * (2 + again) / 2 / gpu.bandwidth
    shards = gpus if recipe.parallel.zero_stage else 1
    optimizer = 28 * count / shards / gpu.bandwidth  # read and write weights, moments and the gradient
    if recipe.parallel.offload_optimizer == "cpu":
        optimizer = 16 * count / shards / (10 * GB)
    return {
        "products": products,
        "attention": attention,
        "elementwise": elementwise,
        "optimizer": optimizer,
        "exchange of gradients and weights": _zero_bytes(recipe, count, gpus, tokens) / _speed(gpus, gpu),
        "exchange of context": _context_bytes(recipe, tokens) / _speed(recipe.parallel.context, gpu),
    }


def _attention_seconds(config: ModelConfig, layer: int, seq: int, gpu: Gpu) -> float:
    """Of one token, forward: two products with the keys that it attends to. Lists of keys come from the device's
    memory where its cache does not hold those of a KV head.
    """
    flops = 4 * config.heads * config.head_dim
    if config.attention_type(layer) == "full":
        return flops * seq / 2 / gpu.full_attention
    attention = config.attention
    union = 1 if config.routing_block(layer) > 1 else UNION
    keys = attention.initial_density * union * seq / 2 + attention.chunk_size
    missed = max(0.0, 1 - gpu.cache / (4 * config.head_dim * seq))
    return flops * keys * ((1 - missed) / gpu.dash_attention + missed / (TILE_ROWS * gpu.bandwidth))


def _zero_bytes(recipe: Recipe, count: int, gpus: int, tokens: float) -> float:
    """What a GPU sends in a step: gradients, updated weights, and in stage 3 weights three times a micro-batch."""
    if gpus == 1:
        return 0.0
    size = 2 if recipe.train.precision == "bf16" else 4
    micro_batches = max(1, round(tokens / own_tokens(recipe)))
    gathers = 3 * micro_batches if recipe.parallel.zero_stage == 3 else 1
    reductions = micro_batches if recipe.parallel.zero_stage >= 2 else 1
    return size * count * (gathers + reductions)


def _context_bytes(recipe: Recipe, tokens: float) -> float:
    """Keys and values to all ranks of a row and their gradients back: forward, again in the backward pass."""
    ranks = recipe.parallel.context
    if ranks == 1:
        return 0.0
    config = recipe.model
    size = 2 if recipe.train.precision == "bf16" else 4
    passes = 3 if recipe.train.activation_checkpointing != "none" else 2
    return passes * config.layers * 2 * size * config.kv_heads * config.head_dim * tokens * (ranks - 1)


def _speed(ranks: int, gpu: Gpu) -> float:
    return gpu.link if ranks <= NODE else gpu.network


def _matrix_parameters(config: ModelConfig, count: int) -> int:
    return count - (0 if config.tie_embeddings else (config.vocab_size or 0) * config.hidden_size)
