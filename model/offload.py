"""Hidden states that wait for the backward pass in host memory.

A checkpointed block keeps its input. With many layers and a long sequence those inputs are most of the memory: 24
layers of a million tokens of width 2048 hold 96 GiB. Each is copied to a pinned host buffer while its block computes,
and comes back while the block after it does its backward pass; the copies have a stream of their own. On the CPU the
same code makes plain copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class HostMemory:
    """The buffers, which outlive the step, and the stream of the copies."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []
        self.stream: torch.cuda.Stream | None = None

    def buffer_like(self, hidden: Tensor) -> Tensor:
        """A buffer of this shape and type: one that is free, else a new one, pinned for a CUDA tensor."""
        for index, buffer in enumerate(self.free):
            if buffer.shape == hidden.shape and buffer.dtype == hidden.dtype:
                return self.free.pop(index)
        self.free.clear()  # of another shape: the sequence length has changed
        return torch.empty(hidden.shape, dtype=hidden.dtype, device="cpu", pin_memory=hidden.is_cuda)

    @contextmanager
    def copying(self, device: torch.device) -> Iterator[None]:
        """Run on the stream of the copies what follows all that the current stream was given."""
        if device.type != "cuda":
            yield
            return
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            yield


class OffloadedHidden:
    """A hidden state in host memory, and the one that was offloaded before it, which is needed after it."""

    def __init__(self, hidden: Tensor, buffer: Tensor, memory: HostMemory, previous: "OffloadedHidden | None") -> None:
        self.buffer, self.memory, self.previous, self.device = buffer, memory, previous, hidden.device
        self.returning: Tensor | None = None
        with memory.copying(self.device):
            buffer.copy_(hidden, non_blocking=True)
            if hidden.is_cuda:  # its memory is not given away before the copy is done
                hidden.record_stream(torch.cuda.current_stream(self.device))

    def start_return(self) -> None:
        """Begin the copy to the device, unless it was begun."""
        if self.returning is None:
            self.returning = torch.empty(self.buffer.shape, dtype=self.buffer.dtype, device=self.device)
            with self.memory.copying(self.device):
                self.returning.copy_(self.buffer, non_blocking=True)
                self.arrived = torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None

    def take(self) -> Tensor:
        """The hidden state on its device; the previous one sets out."""
        self.start_return()
        if self.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(self.arrived)
        if self.previous is not None:
            self.previous.start_return()
        hidden, self.returning = self.returning, None
        assert hidden is not None
        return hidden

    def __del__(self) -> None:
        """The graph has let go of it. Later copies into the buffer come after this one's: they share a stream."""
        self.memory.free.append(self.buffer)


class Offload:
    """The hidden states of one forward pass."""

    def __init__(self, memory: HostMemory) -> None:
        self.memory = memory
        self.last: OffloadedHidden | None = None

    @contextmanager
    def of(self, hidden: Tensor) -> Iterator[None]:
        """A context in which autograd saves `hidden` in host memory."""
        address = hidden.data_ptr()

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() != address:
                return tensor
            self.last = OffloadedHidden(tensor, self.memory.buffer_like(tensor), self.memory, self.last)
            return self.last

        def unpack(saved: Any) -> Tensor:
            return saved.take() if isinstance(saved, OffloadedHidden) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
