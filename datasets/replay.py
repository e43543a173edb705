"""What a training step saw, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils.data import default_collate

from datasets.sampler import train_batches
from datasets.shown import Shown, draw_mask
from util.errors import UserError


def take(shown: Shown, places: Sequence[int]) -> Shown:
    """Some of the images, by their places in the batch."""
    batch = {key: value[places] for key, value in shown.batch.items()}
    return Shown(batch, shown.mask[places], [shown.indices[place] for place in places])


def training_batch(
    model: nn.Module, dataset, args: Mapping[str, Any], *, epoch: int, step: int, rank: int = 0, world_size: int = 1
) -> Shown:
    """Exactly what one rank saw in one training step: samples, crops, flips and masks.

    Args:
        model: on the kind of device that it was trained on: CPU and CUDA draw different numbers.
        dataset: of `training_dataset` with augment=True, over the same data.
        args: the run's options.
        epoch, step: 0-based; a step is one forward pass.
        rank, world_size: of the training.

    Raises:
        UserError: no such step or rank in this run.
    """
    batches = train_batches(dataset, args, rank=rank % world_size, world_size=world_size)
    had = {"rank": (rank, world_size), "epoch": (epoch, batches.epochs), "step": (step, batches.steps_per_epoch)}
    for name, (value, n) in had.items():
        if not 0 <= value < n:
            raise UserError(f"--{name} {value}: the run had {n} {name}s, 0 to {n - 1}")
    indices = batches.batch(epoch, step)
    batch = default_collate([dataset[epoch, index] for index in indices])
    return Shown(batch, draw_mask(model, batch, args, (epoch, step, rank), epoch, step), indices)
