"""Batches to look at: what a training step saw, chosen samples of a data set, or a single image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

import datasets
from datasets.sampler import TrainBatches
from util.errors import UserError
from util.masking import mask_generator


@dataclass(frozen=True)
class Shown:
    """A batch with its masks and the names of its images.

    Attributes:
        batch: as `CXRMIM.prepare_batch` takes it.
        mask: float [B, L], 1 = masked.
        names: B lines of text.
    """

    batch: dict[str, Tensor]
    mask: Tensor
    names: list[str]

    def take(self, places: Sequence[int]) -> Shown:
        """Some of the images, by their places in the batch; `UserError` for a place outside it."""
        places = list(places)
        for place in places:
            if not 0 <= place < len(self.names):
                raise UserError(f"--index {place}: the batch has images 0 to {len(self.names) - 1}")
        batch = {key: value[places] for key, value in self.batch.items()}
        return Shown(batch, self.mask[places], [self.names[place] for place in places])


def training_dataset(args: Mapping[str, Any], data_path: Sequence[str] | None, input_size: int, augment: bool):
    """The data set with a run's stored options; `data_path` where the data lie elsewhere now.

    Options that a checkpoint of another program lacks have the published defaults.
    """
    path = data_path or args.get("data_path")
    if not path:
        raise UserError("--data_path is needed: the checkpoint does not say where its data were")
    return datasets.build_dataset(
        path,
        input_size=input_size,
        min_crop_ratio=args.get("min_crop_ratio", 0.2),
        seed=args.get("seed", 0),
        preload=args.get("preload", False),
        augment=augment,
        # A few samples are read faster from their files; a replay takes its pixels where training did.
        use_cache=augment and args.get("use_cache", False),
        cache_dir=args.get("cache_dir"),
        fallback_dir=args.get("output_dir"),
        cache_size=args.get("cache_size", 512),
    )


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
    if not 0 <= rank < world_size:
        raise UserError(f"--rank {rank}: the run had {world_size} processes, 0 to {world_size - 1}")
    if epoch >= args.get("epochs", epoch + 1):
        raise UserError(f"--epoch {epoch}: the run had {args['epochs']} epochs, 0 to {args['epochs'] - 1}")
    try:
        batches = TrainBatches(
            len(dataset),
            args.get("batch_size", 32),
            world_size=world_size,
            rank=rank,
            seed=args.get("seed", 0),
            accum_iter=args.get("accum_iter", 1),
        )
    except ValueError as error:
        raise UserError(f"--step: {error}; is --data_path the data set of this run?") from None
    if epoch < 0 or not 0 <= step < batches.steps_per_epoch:
        raise UserError(f"--epoch {epoch} --step {step}: an epoch has steps 0 to {batches.steps_per_epoch - 1}")
    indices = batches.batch(epoch, step)
    batch = default_collate([dataset[(epoch, index)] for index in indices])
    generator = mask_generator(args.get("seed", 0), epoch, step, rank, model.cls_token.device)
    mask = draw_mask(model, batch, args, generator, epoch, step)
    return Shown(batch, mask, [picture_name(dataset, index) for index in indices])


def chosen_samples(model: nn.Module, dataset, args: Mapping[str, Any], indices: Sequence[int], epoch: int = 0) -> Shown:
    """Samples of a data set with augment=False, each with a mask that depends on (seed, index) only.

    Args:
        epoch: whose masks a rule that changes with the epoch is asked for; of step 0.

    Raises:
        UserError: an index outside the data set.
    """
    outside = [index for index in indices if not 0 <= index < len(dataset)]
    if outside:
        raise UserError(f"--index {outside[0]}: the data set has samples 0 to {len(dataset) - 1}")
    batch = default_collate([dataset[(0, index)] for index in indices])
    masks = []
    for i, index in enumerate(indices):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        generator = mask_generator(args.get("seed", 0), 0, index, 0, model.cls_token.device)
        masks.append(draw_mask(model, one, args, generator, epoch))
    return Shown(batch, torch.cat(masks), [picture_name(dataset, index) for index in indices])


def picture_name(dataset, index: int) -> str:
    """A sample's name for a picture: with its split, and with a mark where its gaze is no reader's."""
    entry = dataset.entries[index]
    parts = [dataset.sample_name(index), *([str(entry["split"])] if entry.get("split") else [])]
    made_up = ["SIMULATED GAZE"] if entry.get("simulated") else []
    predicted = ["PREDICTED GAZE"] if entry.get("gaze") == "predicted" else []
    return ", ".join([*parts, *made_up, *predicted])


def draw_mask(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    args: Mapping[str, Any],
    generator: torch.Generator,
    epoch: int = 0,
    step: int = 0,
) -> Tensor:
    """Masks as training draws them from the stored options: [B, L]."""
    ratios = args.get("mask_ratio", 0.75), args.get("clinical_ratio", 0.5)
    try:
        return model.draw_mask(model.prepare_batch(batch), *ratios, generator, epoch=epoch, step=step)
    except ValueError as error:
        raise UserError(f"--{error}") from None
