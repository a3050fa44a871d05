from collections.abc import Callable

import pytest
import torch

from dash_train.model.transformer import LanguageModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("attention", ["full", "dash", "blocks"])
@pytest.mark.parametrize("packed", [False, True])
def test_cuda_equals_cpu(attention: str, packed: bool, tiny_model: Callable[..., LanguageModel]) -> None:
    """Loss and gradients in fp32: the fused pieces and FlexAttention against plain torch."""
    tokens = torch.randint(64, (2, 512))
    inputs = {"tokens": tokens, "labels": tokens.roll(-1)}
    if packed:
        inputs["document_starts"] = torch.zeros(2, 512, dtype=torch.int32)
        inputs["document_starts"][0, 208:] = 208
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(attention, activation_checkpointing="full").to(device)
        loss = model(**{name: tensor.to(device) for name, tensor in inputs.items()})["loss"]
        loss.backward()
        results.append([loss.cpu(), *(parameter.grad.cpu() for parameter in model.parameters())])
    for on_cpu, on_cuda in zip(*results, strict=True):
        assert (on_cuda - on_cpu).norm() <= 1e-3 * on_cpu.norm()


@pytest.mark.parametrize("attention", ["full", "dash", "blocks"])
def test_packed_rows_never_wait_for_the_host(attention: str, tiny_model: Callable[..., LanguageModel]) -> None:
    model = tiny_model(attention, head_dim=32).to("cuda", torch.bfloat16)
    tokens = torch.randint(64, (2, 512), device="cuda")
    starts = torch.zeros(2, 512, dtype=torch.int32, device="cuda")
    starts[0, 208:] = 208
    model(tokens, labels=tokens, document_starts=starts)["loss"].backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, labels=tokens, document_starts=starts)["loss"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
