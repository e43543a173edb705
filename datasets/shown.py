"""Samples of a data set to look at, with masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from datasets.build import DataPath, build_dataset
from util.errors import UserError
from util.masking import mask_generator


class Shown(NamedTuple):
    """A batch with its masks.

    Attributes:
        batch: as `CXRMIM.prepare_batch` takes it.
        mask: float [B, L], 1 = masked.
        indices: of the B images in their data set.
    """

    batch: dict[str, Tensor]
    mask: Tensor
    indices: Sequence[int]


def training_dataset(args: Mapping[str, Any], data_path: DataPath, input_size: int, augment: bool):
    """The data set with a run's stored options, from where its data lie now.

    Options that a checkpoint of another program lacks have the published defaults.
    """
    names = ("min_crop_ratio", "seed", "preload", "cache_dir", "cache_size")
    return build_dataset(
        data_path,
        input_size=input_size,
        augment=augment,
        # A few samples are read faster from their files; a replay takes its pixels where training did.
        use_cache=augment and args.get("use_cache", False),
        **{name: args[name] for name in names if name in args},
    )


def chosen_samples(model: nn.Module, dataset, args: Mapping[str, Any], indices: Sequence[int], epoch: int = 0) -> Shown:
    """Samples of a data set with augment=False, each with a mask that depends on (seed, index) only.

    Args:
        epoch: whose masks a rule that changes with the epoch is asked for; of step 0.
    """
    samples = [default_collate([dataset[0, index]]) for index in indices]
    masks = [draw_mask(model, one, args, (0, index, 0), epoch) for one, index in zip(samples, indices)]
    batch = {key: torch.cat([one[key] for one in samples]) for key in samples[0]}
    return Shown(batch, torch.cat(masks), indices)


def draw_mask(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    args: Mapping[str, Any],
    drawn_for: tuple[int, int, int],
    epoch: int = 0,
    step: int = 0,
) -> Tensor:
    """Masks as training draws them from the stored options, by the random numbers of (epoch, step, rank) `drawn_for`:
    [B, L]."""
    ratios = args.get("mask_ratio", 0.75), args.get("clinical_ratio", 0.5)
    generator = mask_generator(args.get("seed", 0), *drawn_for, model.cls_token.device)
    try:
        return model.draw_mask(model.prepare_batch(batch), *ratios, generator, epoch=epoch, step=step)
    except ValueError as error:
        raise UserError(f"--{error}") from None
