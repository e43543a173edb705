"""Methods on frozen encoders, whose features are encoded once: linear heads as published, and probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from downstream.data.images import CENTRE
from downstream.data.partition import Rows, in_folds
from downstream.driver import Method, Work
from downstream.encoders import PIXELS, Candidate, digest_of, feature_widths
from downstream.features import FeatureFile, fill
from downstream.forward import Encoder, Stopped
from downstream.heads import probabilities, train_heads
from downstream.jobs import digest
from downstream.probe import principal_components, probe_scores, standardise

PIXEL_SIDE = 56  # of the baseline without a network: a quarter of 224


class Features:
    """The features of one candidate: the first of `pooled`, the cls token if there is one, in every view, in the centre
    view also the others behind it; of "pixels" the gray values."""

    def __init__(self, work: Work, candidate: Candidate):
        self.work, self.name = work, candidate.name
        self.is_pixels = candidate.kind == PIXELS
        mean, std = work.input_scale(candidate)
        if self.is_pixels:
            self.encoder, weights, self.widths = _pixels, PIXELS, {"": PIXEL_SIDE**2}
        else:
            model = candidate.build().eval().to(work.ranks.device)
            self.encoder = Encoder(model, mean, std, work.ranks.device, work.dtype)
            weights, self.widths = digest_of(model), feature_widths(model)
        self.width = next(iter(self.widths.values()))
        # Random numbers of the views come from their number alone, so more views leave the first as they are.
        self.key = digest([weights, candidate.architecture, work.files, mean, std, str(work.dtype)])
        self.folder = Path(work.args.features_dir or Path(work.args.output_dir) / "features") / self.key
        self.files: dict[int, FeatureFile] = {}

    def fill(self, wanted: Mapping[int, np.ndarray]) -> None:
        """Encode what is missing of {view: images}."""
        for view in wanted:
            if view not in self.files:
                name = "centre.npy" if view == CENTRE else f"view-{view:03d}.npy"
                width = sum(self.widths.values()) if view == CENTRE else self.width
                self.files[view] = FeatureFile(self.folder / name, len(self.work.images), width)
        work = self.work
        done = fill(self.folder, self.files, wanted, self.encoder, work.views, **work.forward_options, what=self.name)
        if done:
            there = sum(map(len, wanted.values())) - done
            work.ranks.say(f"{self.name}: {done} images encoded, {there} were there already ({self.folder})")

    def cls(self, view: int, rows: np.ndarray) -> torch.Tensor:
        """First features, or pixels, of some images in a view, on the device: [len(rows), D]."""
        return torch.from_numpy(self.files[view].read(rows, self.width)).to(self.work.ranks.device)


def _pixels(gray: torch.Tensor) -> torch.Tensor:
    pooled = torch.nn.functional.adaptive_avg_pool2d(gray.float() / 255, PIXEL_SIDE)
    return pooled.flatten(1)


class Linear(Method):
    """The published linear evaluation."""

    def __init__(self, work: Work, candidate: Candidate):
        super().__init__(work, candidate)
        self.features = Features(work, candidate)
        self.key = [self.features.key, asdict(work.recipe), work.args.views]

    def scores(
        self, rows: Rows, names: Mapping[int, str], fraction: float, what: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        work, features, recipe = self.work, self.features, self.work.recipe
        views = range(min(work.args.views, recipe.epochs))
        features.fill({CENTRE: np.r_[rows.valid, rows.test]} | dict.fromkeys(views, rows.train))
        labels = torch.from_numpy(work.images.labels).to(work.ranks.device)
        heads = train_heads(
            [partial(features.cls, view, rows.train) for view in views],
            labels[rows.train],
            features.cls(CENTRE, rows.valid),
            labels[rows.valid],
            task=work.images.task,
            seeds=list(names),
            recipe=recipe,
            signals=work.signals,
            what=f"{what}: heads",
        )
        tested = features.cls(CENTRE, rows.test)
        for seed, head in zip(names, heads, strict=True):
            print(
                f"{what}, seed {seed}: best epoch {head.epoch + 1} of {len(head.valid_losses)}, validation loss "
                f"{min(head.valid_losses):.4f}",
                flush=True,
            )
            yield seed, probabilities(head.logits(tested), work.images.task).astype(np.float32)[None]


class Probe(Method):
    """Logistic regression on features of the centre crop, cls and mean of patches ("pixels": principal components).

    Only folds depend on the seed: with the data's own parts the first seed stands for all.
    """

    validates = False

    def __init__(self, work: Work, candidate: Candidate):
        super().__init__(work, candidate)
        self.features = Features(work, candidate)
        self.key = [self.features.key]
        self.kinds = tuple(self.features.widths)
        if not in_folds(work.images) and len(self.seeds) > 1:
            self.seeds = self.seeds[:1]
            print(f"{self.name}: nothing in a probe is drawn, so seed {self.seeds[0]} stands for all", flush=True)

    def scores(
        self, rows: Rows, names: Mapping[int, str], fraction: float, what: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        images, features = self.work.images, self.features
        ((seed, _),) = names.items()
        used = np.r_[rows.train, rows.valid, rows.test]
        features.fill({CENTRE: used})
        values = np.zeros((len(images), features.width * len(self.kinds)), np.float32)
        values[used] = features.files[CENTRE].read(used)
        scale = partial(principal_components, seed=seed) if features.is_pixels else standardise
        found = []
        for own in np.split(values, len(self.kinds), axis=1):
            scaled = scale(own, rows.train)
            for label, column in zip(images.label_names, images.labels.T, strict=True):
                if self.work.signals.request:
                    raise Stopped
                found.append(
                    probe_scores(scaled, column, images.subjects, rows, seed=seed, say=print, name=f"{what}, {label}")
                )
        print(f"{what}: probe, done", flush=True)
        yield seed, np.stack(found, 1).astype(np.float32).reshape(len(rows.test), len(self.kinds), -1).swapaxes(0, 1)
