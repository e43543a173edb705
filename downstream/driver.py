"""One driver for all methods: what is not done yet is trained and predicted, and its scores are kept."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from downstream.data.choices import AUTO, PUBLISHED
from downstream.data.images import Reading, Views, open_squares, reading_from_args
from downstream.data.labelled import TEST, LabelledImages, files_digest, study_digest
from downstream.data.partition import Rows, folds_of, in_folds, partitions
from downstream.encoders import Candidate
from downstream.jobs import digest
from downstream.results import PUBLISHED_IMAGES, Outcome
from util.distributed import Ranks, on_main
from util.files import atomic_write
from util.stop import StopSignals
from util.subjects import overlap_note

Runs = dict[int, str]  # the name of each seed's run
Scores = Iterator[tuple[int, np.ndarray]]  # seeds, each with float32 [K, n, C] between 0 and 1


@dataclass(frozen=True)
class Recipe:
    """How a linear head, or a whole encoder, is trained; the defaults are the published ones, the same for both.

    Attributes:
        batch_size: images per step, over all processes.
        warmup: share of all steps in which the learning rate rises.
        patience: epochs without a lower validation loss before stopping.
        layer_decay: fine-tuning: learning rate of a block over that of the next one; 1: the same for all.
        drop_path: fine-tuning: stochastic depth of the last block.
        pool: fine-tuning: what the head sees: token (cls) or avg (mean of the patches).
        optimizer: fine-tuning: adam or adamw.
    """

    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-5
    warmup: float = 0.4
    patience: int = 10
    layer_decay: float = 1.0
    drop_path: float = 0.0
    pool: str = "token"
    optimizer: str = "adam"


RECIPES = {
    "published": Recipe(),
    # Rates and decay are ours, for small data: not those that MAE fine-tunes with.
    "layer_decay": Recipe(30, 32, 5e-4, 0.05, 0.1, 10, layer_decay=0.75, drop_path=0.1, pool="avg", optimizer="adamw"),
}


@dataclass(frozen=True)
class Part:
    """Images that models are trained and tested on.

    Attributes:
        fraction: of the labels.
        seeds: of the models that go side by side.
        name: of fraction and fold.
    """

    fraction: float
    seeds: Sequence[int]
    rows: Rows
    name: str


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
    def recipe(self) -> Recipe:
        """How models are trained: --recipe, with the options that replace its values."""
        recipe = RECIPES[self.args.recipe if self.args.method == "finetune" else "published"]
        given = {name: value for name, value in vars(self.args).items() if hasattr(recipe, name) and value is not None}
        return replace(recipe, **given)

    @property
    def dtype(self) -> torch.dtype:
        default = "bfloat16" if self.ranks.device.type == "cuda" else "float32"
        return getattr(torch, self.args.dtype or default)

    @property
    def loading(self) -> dict[str, object]:
        """Options of `all_outputs`."""
        device = self.ranks.device
        # On a CPU larger batches leave its caches, and each of their tensors is memory that the system hands out anew.
        size = self.args.encode_batch or (64 if device.type == "cuda" else 16)
        how = {"device": device, "dtype": self.dtype, "batch_size": size, "num_workers": self.args.num_workers}
        return how | {"signals": self.signals}

    @cached_property
    def views(self) -> Views:
        return self.open_views(reading_from_args(self.args))

    def open_views(self, reading: Reading) -> Views:
        """The images' views, from the cache of decoded images; rank 0 builds it."""
        decode = partial(open_squares, self.images, self.args.cache_dir, reading=reading)
        with self.signals.exit_at_signal():
            plane = main_first(self.ranks, decode)
        return Views(self.images, plane=plane, reading=reading)

    def plan(self, *, trains: bool) -> list[Part]:
        """Everything that one model is judged by.

        Args:
            trains: whether a fold needs validation images, and every seed is another run.
        """
        args, images = self.args, self.images
        folded, seeds = in_folds(images), list(dict.fromkeys(args.seeds))
        # With the data's own parts all seeds train on the same images and go side by side.
        groups = [[seed] for seed in seeds] if folded else [seeds if trains else seeds[:1]]
        return [
            Part(fraction, group, rows, f"{fraction:g}" + f"-fold{k}" * folded)
            for fraction in dict.fromkeys(args.fractions)
            for group in groups
            for k, rows in enumerate(
                partitions(images, fraction, seed=group[0], n_folds=args.folds, validate=trains), 1
            )
        ]


def main_first(ranks: Ranks, make: Callable):
    """What `make` returns, on every rank; rank 0 is the first, and writes files that the others find."""
    on_main(ranks, lambda: make() and None)
    return make()


class Method:
    """A way to judge one model. `scores(part, runs)` gives the scores of the test images by each seed of `runs`, which says
    how its run is called; it raises `Stopped` at a request to stop, and `UserError`.

    Attributes:
        name: of the model.
        seen: `subject_marks` of the subjects whose images trained it.
        key: what its scores depend on beside the study, label fraction and seed: plain content.
        kinds: K names of scores that come together, behind the model's name; "" for the only ones.
        label_names: of its scores.
        plan: as `Work.plan`.
    """

    trains = True  # of `Work.plan`
    kinds: Sequence[str] = ("",)

    def __init__(self, work: Work, candidate: Candidate):
        self.work, self.candidate = work, candidate
        self.name, self.seen = candidate.name, candidate.seen
        self.label_names, self.plan = work.images.label_names, work.plan(trains=self.trains)


def judge(work: Work, method: Method) -> list[Outcome]:
    """Scores of the test images by a model, for every kind of scores, label fraction and seed. Raises `Stopped`,
    `UserError`."""
    args, images, name = work.args, work.images, method.name
    found = {}  # (label fraction, seed) -> images and scores of each fold
    for part in method.plan:
        scores = scores_of(work, method, part)
        for seed in part.seeds:
            found.setdefault((part.fraction, seed), []).append((part.rows.test, scores[seed]))
    columns = [images.label_names.index(label) for label in method.label_names]
    judged = replace(images, label_names=method.label_names, labels=images.labels[:, columns])
    tested = {run: np.concatenate([rows for rows, _ in pieces]) for run, pieces in found.items()}
    note = overlap_note(name, method.seen, images.subjects[next(iter(tested.values()))], images.study)
    if note:
        work.ranks.say(note)
    same = args.min_positives, args.bootstrap, note, work.study, as_published(work)
    outcomes = []
    for k, kind in enumerate(method.kinds):
        for (fraction, seed), rows in tested.items():
            weights = f"{name}, {kind}" if kind else name
            run = {
                "weights": weights,
                "dataset": images.name,
                "method": args.method,
                "fraction": fraction,
                "seed": seed,
            }
            scores = np.concatenate([scores[k] for _, scores in found[fraction, seed]])
            folds = folds_of(images, seed, args.folds)[rows] if in_folds(images) else None
            outcomes.append(Outcome(run, judged.take(rows), scores, folds, *same))
    return outcomes


def scores_of(work: Work, method: Method, part: Part) -> dict[int, np.ndarray]:
    """Scores of each seed: kept ones, or else new ones, which are then kept under a readable name with a digest of all
    that they depend on."""
    output_dir, ranks, runs = Path(work.args.output_dir), work.ranks, {}
    for seed in part.seeds:
        key = digest([work.args.method, work.study, method.key, part.fraction, part.name, seed])
        runs[seed] = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{method.name}-{part.name}-{seed}-{key[:12]}")
    paths = {seed: output_dir / "scores" / f"{run}.npy" for seed, run in runs.items()}
    kept = on_main(ranks, lambda: {seed: np.load(path) for seed, path in paths.items() if path.exists()})

    def keep() -> None:
        paths[seed].parent.mkdir(exist_ok=True)
        with atomic_write(paths[seed]) as file:
            np.save(file, scores)

    if left := {seed: run for seed, run in runs.items() if seed not in kept}:
        for seed, scores in method.scores(part, left):
            kept[seed] = scores
            on_main(ranks, keep)
    return kept


def as_published(work: Work) -> bool:
    """Whether images, parts and labels are all those of the published results."""
    args, images = work.args, work.images
    tests = len(images.indices(TEST))
    chosen = args.split not in (AUTO, PUBLISHED) or args.labels or args.where or args.split_lists
    return not chosen and PUBLISHED_IMAGES.get(images.name) == (len(images) - tests, tests)
