"""Finding steps that wait for the GPU: for the tests of training there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
