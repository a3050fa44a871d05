"""An estimate of a recipe as tables, and whether it fits."""

from dataclasses import dataclass

from dash_train.benchmark.report import markdown_table
from dash_train.errors import UserError
from dash_train.estimate.machine import GB, NODE, Gpu
from dash_train.estimate.memory import memory_parts, on_gpu
from dash_train.estimate.step_time import step_seconds
from dash_train.recipe.schema import Recipe

# By the part of memory that is largest: what makes it smaller.
LEVERS = {
    "weights": "parallel.zero_stage: 3 (or parallel.offload_parameters: cpu)",
    "gradients": "parallel.zero_stage: 2, on more GPUs",
    "optimizer": "parallel.zero_stage: 1, on more GPUs (or parallel.offload_optimizer: cpu)",
    "gradient buckets": "deepspeed.zero_optimization.reduce_bucket_size: 100000000",
    "kept activations": "train.activation_checkpointing: full, then train.activation_offload: true",
    "one block at work": "parallel.context, or a smaller train.micro_batch_size or train.seq",
    "context exchange": "parallel.context, smaller",
    "logits": "model.vocab_size, smaller",
}


@dataclass(frozen=True)
class Estimate:
    """Of one training step on each of `gpus` GPUs."""

    gpus: int
    memory: dict[str, float]  # bytes by part; `host` is not on the GPU
    seconds: dict[str, float]  # by part
    tokens: int  # of a step, all GPUs

    @property
    def total_memory(self) -> float:
        return on_gpu(self.memory)

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total_seconds


def estimate(recipe: Recipe, gpus: int, gpu: Gpu) -> Estimate:
    """Memory and time of a recipe's step on so many GPUs.

    Raises:
        UserError: the recipe cannot run on so many GPUs, or its model has no vocabulary yet.
    """
    if recipe.model.vocab_size is None:
        vocab_size = getattr(recipe.data.tokenizer, "vocab_size", None)
        if vocab_size is None:
            raise UserError("model.vocab_size: an estimate needs a number where the tokenizer is not trained here")
        model = recipe.model.model_copy(update={"vocab_size": vocab_size})
        recipe = recipe.model_copy(update={"model": model})
    recipe.train.micro_batches(gpus, recipe.parallel.context)
    tokens = recipe.train.global_batch_size * recipe.train.seq
    return Estimate(gpus, memory_parts(recipe, gpus), step_seconds(recipe, gpus, gpu), tokens)


def check_fit(found: Estimate, gpu: Gpu) -> None:
    """Refuse what a GPU cannot hold.

    Raises:
        UserError: names the largest part and the key that makes it smaller.
    """
    if found.total_memory <= gpu.memory:
        return
    largest = max((name for name in found.memory if name != "host"), key=lambda name: found.memory[name])
    raise UserError(
        f"needs {found.total_memory / GB:.0f} GB on each {gpu.name}, which has {gpu.memory / GB:.0f} GB; the largest "
        f"part is {largest} with {found.memory[largest] / GB:.0f} GB: change {LEVERS[largest]}"
    )


def describe(found: Estimate, gpu: Gpu) -> str:
    """Two tables, and what is taken for granted."""
    memory = [{"part": name, "gb": size / GB} for name, size in found.memory.items() if size]
    memory.append({"part": "**on each GPU**", "gb": found.total_memory / GB})
    seconds = [{"part": name, "seconds": value} for name, value in found.seconds.items() if value]
    seconds.append({"part": "**a step**", "seconds": found.total_seconds})
    lines = [
        markdown_table({"part": "memory", "gb": "GB|.1f"}, memory),
        "",
        markdown_table({"part": "time", "seconds": "seconds|.3f"}, seconds),
        "",
        f"{found.tokens_per_second:,.0f} tokens/s on {found.gpus} x {gpu.name}. Taken for granted: a density of "
        f"initial_density in every Dash layer, {gpu.matmul / 1e12:.0f} TFLOP/s in matrix products, "
        f"{gpu.link / GB:.0f} GB/s between the GPUs of a node",
    ]
    if found.gpus > NODE:
        lines[-1] += f" of {NODE}, {gpu.network / GB:.0f} GB/s a GPU between nodes"
    return "\n".join(lines) + "."
