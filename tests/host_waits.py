"""Epochs of given batches, and finding steps that wait for the GPU: for the tests of training there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from util.distributed import Ranks
from util.lr_sched import parameter_groups
from util.output import Progress
from util.stop import GO_ON
from util.training import Training

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
NO_SIGNALS = SimpleNamespace(request=GO_ON)


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


def pinned(batch: dict | tuple, device: str) -> dict | tuple:
    """A batch as the loader gives it: in pinned memory for a GPU."""
    if device == "cpu":
        return batch
    if isinstance(batch, tuple):
        return tuple(tensor.pin_memory() for tensor in batch)
    return {name: tensor.pin_memory() for name, tensor in batch.items()}


class GivenBatches:
    """A loader, as `Training.start` takes it, of one epoch of given batches."""

    def __init__(self, batches: Iterable, n: int):
        self.batches = batches
        self.batch_sampler = SimpleNamespace(steps_per_epoch=n, batch=lambda epoch, step: [step])

    def __iter__(self) -> Iterator:
        return iter(self.batches)


def training_of(core: nn.Module, args, ranks: Ranks, n_values: int, losses, **changed) -> Training:
    """Training by a program's options, less those that are `changed`, without data, files and signals."""
    return Training(
        core=core,
        optimizer=torch.optim.AdamW(parameter_groups(core, 0.05), lr=0.0, fused=True),
        ranks=ranks,
        signals=NO_SIGNALS,
        options=vars(args) | {"print_every": None, **changed},
        n_values=n_values,
        losses=losses,
    )


def begin(training: Training, given: Iterable, n: int) -> None:
    """Start an epoch of n given batches, without files."""
    training.start(GivenBatches(given, n), log=object(), progress=Progress("training", n, "steps", enabled=False))


def means_of_epoch(training: Training, given: Iterable, n: int) -> list[float]:
    """Train an epoch of n given batches; returns the means of its values."""
    begin(training, given, n)
    assert training.train_epoch() == GO_ON and training.step == n
    return training.sums.means()
