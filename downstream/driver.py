"""One driver for all methods: what is not done yet is trained and predicted, and its scores are kept."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from downstream.data.choices import AUTO, PUBLISHED
from downstream.data.images import Reading, Views, deep_note, open_squares, reading_from_args
from downstream.data.labelled import TEST, LabelledImages, files_digest, study_digest
from downstream.data.partition import Rows, folds_of, in_folds, partitions
from downstream.data.tree import ANY_FINDING
from downstream.encoders import Candidate
from downstream.forward import FORWARD_BATCH
from downstream.heads import RECIPES, Recipe
from downstream.jobs import digest, load_array, save_array
from downstream.results import PUBLISHED_IMAGES, Outcome
from util.distributed import Ranks, on_main
from util.stop import StopSignals
from util.subjects import overlap_note

CHECKPOINT = "checkpoint.pth"  # of a run that is not done, in its folder below `runs`


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
        return candidate.normalisation(self.args.normalisation)

    @cached_property
    def views(self) -> Views:
        return self.open_views(reading_from_args(self.args))

    def open_views(self, reading: Reading) -> Views:
        """The images' views, from the cache of decoded images unless --no_cache; rank 0 builds it."""
        args, plane = self.args, None
        for note in deep_note(self.images.files, reading):
            self.ranks.say(note)
        if args.use_cache:
            place = args.cache_dir or Path(args.output_dir) / "cache"
            open_plane = partial(open_squares, self.images, place, reading=reading)
            with self.signals.exit_at_signal():
                on_main(self.ranks, lambda: open_plane() and None)
                plane = open_plane()
        return Views(self.images, plane=plane, reading=reading)


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


def judge(work: Work, method: Method) -> list[Outcome]:
    """Scores of the test images by a model, for every kind of scores, label fraction and seed. Raises `Stopped`,
    `UserError`."""
    args, images = work.args, work.images
    found: dict[tuple[float, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for fraction in method.fractions:
        # With the data's own parts all seeds train on the same images and go side by side.
        for seeds in [[seed] for seed in method.seeds] if in_folds(images) else [method.seeds]:
            parts = method.partitions(fraction, seeds[0])
            for k, rows in enumerate(parts, 1):
                fold = k if len(parts) > 1 else 0
                names = {seed: run_name(work, method, fraction, seed, fold) for seed in seeds}
                what = f"{method.name}, {fraction:g} of the labels{f', fold {fold}' * bool(fold)}"
                for seed, scores in scores_of(work, method, rows, names, fraction, what).items():
                    found.setdefault((fraction, seed), []).append((rows.test, scores))
    tested = {k: np.concatenate([rows for rows, _ in pieces]) for k, pieces in found.items()}
    note = overlap_note(method.name, method.seen, images.subjects[next(iter(tested.values()))], images.study)
    if note:
        work.ranks.say(note)
    columns = [images.label_names.index(label) for label in method.label_names]
    return [
        Outcome(
            weights=f"{method.name}, {kind}" if kind else method.name,
            dataset=images.name,
            method=args.method,
            fraction=fraction,
            seed=seed,
            task=images.task,
            label_names=method.label_names,
            ids=[images.ids[row] for row in rows],
            subjects=images.subjects[rows],
            targets=images.labels[rows][:, columns],
            scores=np.concatenate([scores[k] for _, scores in found[fraction, seed]]),
            min_count=args.min_positives,
            draws=args.bootstrap,
            not_in_mean=(ANY_FINDING,) if args.dataset == "tree" else (),
            folds=folds_of(images, seed, args.folds)[rows] if in_folds(images) else None,
            note=note,
            study=work.study,
            as_published=as_published(work),
        )
        for k, kind in enumerate(method.kinds)
        for (fraction, seed), rows in tested.items()
    ]


def run_name(work: Work, method: Method, fraction: float, seed: int, fold: int) -> str:
    """A readable name of a run, with a digest of all that its scores depend on."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", method.name)
    key = digest([work.args.method, work.study, method.key, fraction, seed, fold])
    return f"{plain}-{fraction:g}-{seed}{f'-fold{fold}' * bool(fold)}-{key[:12]}"


def scores_of(
    work: Work, method: Method, rows: Rows, names: dict[int, str], fraction: float, what: str
) -> dict[int, np.ndarray]:
    """Scores [K, n, C] of `rows.test` by the run of each seed: kept ones, or else new ones, which are then kept."""
    ranks, output_dir = work.ranks, Path(work.args.output_dir)
    paths = {seed: output_dir / "scores" / f"{name}.npy" for seed, name in names.items()}
    shape = (len(method.kinds), len(rows.test), len(method.label_names))
    kept = on_main(ranks, lambda: {seed: load_array(path, shape) for seed, path in paths.items()})
    left = {seed: name for seed, name in names.items() if kept[seed] is None}
    if left:
        for seed, scores in method.scores(rows, left, fraction, what):
            kept[seed] = scores
            on_main(ranks, lambda seed=seed, scores=scores: save_array(paths[seed], scores))

    def remove_checkpoints() -> None:
        for name in names.values():
            (output_dir / "runs" / name / CHECKPOINT).unlink(missing_ok=True)

    on_main(ranks, remove_checkpoints)
    return kept


def as_published(work: Work) -> bool:
    """Whether images, parts and labels are all those of the published results."""
    args, images = work.args, work.images
    tests = len(images.indices(TEST))
    chosen = args.split not in (AUTO, PUBLISHED) or args.labels or args.where or args.split_lists
    return not chosen and PUBLISHED_IMAGES.get(images.name) == (len(images) - tests, tests)
