"""Finding steps that wait for the GPU, and a loader of given batches: for the tests of training there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import torch


@contextlib.contextmanager
def no_host_waits(given: list, device: str) -> Iterator[Iterator]:
    """The batches of an epoch, between which any wait for a GPU is an error: from the third step on, when all
    memory is there, to the last, which reports. On the CPU just the batches."""

    def guarded() -> Iterator:
        for i, batch in enumerate(given):
            if device == "cuda" and i == 3:
                torch.cuda.set_sync_debug_mode("error")
            if device == "cuda" and i == len(given) - 1:
                torch.cuda.set_sync_debug_mode("default")
            yield batch

    try:
        yield guarded()
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class GivenBatches:
    """A loader, as `Training.start` takes it, of one epoch of given batches."""

    def __init__(self, batches: Iterable, n: int):
        self.batches = batches
        self.batch_sampler = SimpleNamespace(steps_per_epoch=n, batch=lambda epoch, step: [step])

    def __iter__(self) -> Iterator:
        return iter(self.batches)
