"""Python's garbage collector, kept from delaying the launches of a training step."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_heap() -> Iterator[None]:
    """What exists on entry is not looked at by the collector until exit.

    A full collection visits every object of every imported package, which takes longer than a layer's forward pass, and
    the objects of a few micro-batches of autograd are enough to start one.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
