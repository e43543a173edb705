"""What all methods work with, and what they have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from downstream.data.images import Reading, Views, deep_note, normalisation, open_squares, reading_from_args
from downstream.data.labelled import LabelledImages, files_digest, study_digest
from downstream.data.partition import Rows, in_folds, partitions
from downstream.encoders import IMAGENET, Candidate
from downstream.forward import FORWARD_BATCH
from downstream.heads import RECIPES, Recipe
from downstream.jobs import digest
from util.distributed import Ranks, on_main
from util.stop import StopSignals


@dataclass(frozen=True)
class Work:
    """A call of run_downstream.py: its options, images, processes, and requests to stop."""

    args: argparse.Namespace
    images: LabelledImages
    ranks: Ranks
    signals: StopSignals

    @cached_property
    def study(self) -> str:
        """Digest of the images' ids, their parts or folds, and labels."""
        return digest([study_digest(self.images), self.args.folds if in_folds(self.images) else 0])

    @cached_property
    def files(self) -> list:
        """What the images' views depend on: plain content."""
        return [files_digest(self.images), asdict(reading_from_args(self.args)), self.images.strong_augmentation]

    @property
    def dtype(self) -> torch.dtype:
        default = "bfloat16" if self.ranks.device.type == "cuda" else "float32"
        return getattr(torch, self.args.dtype or default)

    @property
    def recipe(self) -> Recipe:
        """How models are trained: --recipe for fine-tuning, else the published one, with the options that replace its values."""
        recipe = RECIPES[self.args.recipe if self.args.method == "finetune" else "published"]
        given = {field.name: getattr(self.args, field.name, None) for field in fields(Recipe)}
        return replace(recipe, **{name: value for name, value in given.items() if value is not None})

    @property
    def forward_options(self) -> dict:
        """Of `forward_all`."""
        device = self.ranks.device
        return {
            "device": device,
            "batch_size": self.args.encode_batch or FORWARD_BATCH[device.type],
            "num_workers": self.args.num_workers,
            "signals": self.signals,
        }

    def input_scale(self, candidate: Candidate) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std of an encoder's input."""
        # timm's configuration of the ImageNet weights says 0.5, whatever ours were pretrained with.
        return normalisation("half" if candidate.kind == IMAGENET else self.args.normalisation)

    @cached_property
    def views(self) -> Views:
        return self.open_views(reading_from_args(self.args))

    def open_views(self, reading: Reading) -> Views:
        """The images' views from the cache of decoded images, which rank 0 builds."""
        for note in deep_note(self.images.files, reading):
            self.ranks.say(note)
        place = self.args.cache_dir or Path(self.args.output_dir) / "cache"
        open_plane = partial(open_squares, self.images, place, reading=reading, num_workers=self.args.num_workers)
        with self.signals.exit_at_signal():
            on_main(self.ranks, lambda: open_plane() and None)
            return Views(self.images, plane=open_plane(), reading=reading)


class Method:
    """A way to judge one model.

    Attributes:
        name: of the model.
        seen: `subject_marks` of the subjects whose images trained it.
        key: what its scores depend on beside the study, label fraction and seed: plain content.
        kinds: K names of scores that come together, behind the model's name; "" for the only ones.
        fractions, seeds, label_names: of its scores.
    """

    validates = True  # whether it needs validation images in every fold
    kinds: Sequence[str] = ("",)

    def __init__(self, work: Work, candidate: Candidate):
        self.work, self.candidate = work, candidate
        self.name, self.seen = candidate.name, candidate.seen
        self.fractions, self.seeds = work.args.fractions, work.args.seeds
        self.label_names = work.images.label_names

    def partitions(self, fraction: float, seed: int) -> list[Rows]:
        folds = self.work.args.folds
        return partitions(self.work.images, fraction, seed=seed, n_folds=folds, validate=self.validates)

    def scores(
        self, rows: Rows, names: Mapping[int, str], fraction: float, what: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(seed, scores of `rows.test`, float32 [K, n, C] between 0 and 1) of each seed in `names`, which says how the
        run of a seed is called.

        Args:
            what: for the progress line.

        Raises:
            Stopped: a stop was requested.
            UserError: an unreadable image, a loss that is not finite, or a full disk.
        """
        raise NotImplementedError
