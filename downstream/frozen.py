"""Linear heads and probes on one frozen encoder, for all label fractions and seeds, from features kept in files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from downstream.data.images import CENTRE
from downstream.data.labelled import LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.encoders import PIXELS, Candidate, digest_of
from downstream.features import SUFFIXES, FeatureFile
from downstream.heads import Encoder, HeadOptions, Stopped, encode, probabilities, steps_per_epoch, train_heads
from downstream.jobs import Jobs, digest
from downstream.probe import principal_components, probe_scores, standardise
from util.errors import UserError
from util.files import file_lock
from util.stop import StopSignals

PIXEL_SIDE = 56  # of the baseline without a network: a quarter of 224


@dataclass(frozen=True)
class Frozen:
    """What the methods on frozen encoders work with.

    Attributes:
        views: [image, view] -> gray uint8 [1, S, S]; view CENTRE is that of tests, 0, 1, ... are augmented.
        views_key: what an image's views depend on beside its file: plain content.
        files_key: digest of all image files, in order.
        study_key: digest of ids, parts and labels.
        n_views: augmented views of each training image.
    """

    images: LabelledImages
    views: Dataset
    views_key: object
    files_key: str
    study_key: str
    fractions: Sequence[float]
    seeds: Sequence[int]
    n_folds: int
    n_views: int
    heads: HeadOptions
    features_dir: Path
    jobs: Jobs
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    num_workers: int
    signals: StopSignals
    say: Callable[[str], None] = print

    def partitions(self, fraction: float, seed: int, validate: bool) -> list[Rows]:
        return partitions(self.images, fraction, seed=seed, n_folds=self.n_folds, validate=validate)


class Features:
    """The features of one candidate: a file per view, filled with what is asked for.

    Each row has the cls token, and in the centre view also the mean of the patch tokens behind it; of
    "pixels" the gray values.
    """

    def __init__(self, frozen: Frozen, candidate: Candidate, mean: tuple, std: tuple):
        self.frozen, self.candidate = frozen, candidate
        self.is_pixels = candidate.kind == PIXELS
        if self.is_pixels:
            self.encoder, weights, self.width = _pixels, PIXELS, PIXEL_SIDE**2
        else:
            model = candidate.build().eval().to(frozen.device)
            self.encoder = Encoder(model, mean, std, frozen.device, frozen.dtype)
            weights, self.width = digest_of(model), model.embed_dim
        # Random numbers of the views come from their number alone, so more views leave the first as they are.
        content = [weights, candidate.architecture, frozen.files_key, frozen.views_key, mean, std, str(frozen.dtype)]
        self.key = digest(content)
        self.folder = frozen.features_dir / self.key
        self._files: dict[int, FeatureFile] = {}  # kept, since each checks its rows once

    def file(self, view: int) -> FeatureFile:
        if view not in self._files:
            two = view == CENTRE and not self.is_pixels
            self._files[view] = FeatureFile(self._path(view), len(self.frozen.images), self.width * (1 + two))
        return self._files[view]

    def _path(self, view: int) -> Path:
        return self.folder / ("centre" if view == CENTRE else f"view-{view:03d}")

    def are_there(self, wanted: dict[int, np.ndarray]) -> bool:
        """Whether nothing is missing of {view: images}; writes nothing, so the folder may be others' to write."""
        return all(Path(f"{self._path(view)}.{suffix}").exists() for view in wanted for suffix in SUFFIXES) and not any(
            len(self.file(view).missing(images)) for view, images in wanted.items()
        )

    def fill(self, wanted: dict[int, np.ndarray]) -> None:
        """Encode what is missing of {view: images}. Raises `Stopped`, `UserError`."""
        frozen = self.frozen
        n = 0 if self.are_there(wanted) else self._encode(wanted)
        if frozen.signals.request:
            raise Stopped
        total = sum(map(len, wanted.values()))
        frozen.say(f"{self.candidate.name}: {n} images encoded, {total - n} were there already ({self.folder})")

    def _encode(self, wanted: dict[int, np.ndarray]) -> int:
        frozen = self.frozen
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder}: can't make this directory: {error.strerror}; choose another --features_dir"
            ) from None
        mend = "wait for it, or choose another --features_dir"
        with file_lock(self.folder / "lock", what=f"features {self.folder}", mend=mend):
            files = [(view, np.sort(images), self.file(view)) for view, images in wanted.items()]
            for _, images, file in files:
                file.missing(images)
                if file.n_damaged:
                    frozen.say(
                        f"warning: {file.numbers}: {file.n_damaged} rows do not fit their checksums; encoding them again"
                    )
            return encode(
                self.encoder,
                frozen.views,
                files,
                device=frozen.device,
                batch_size=frozen.batch_size,
                num_workers=frozen.num_workers,
                signals=frozen.signals,
                what=f"{self.candidate.name}: encoding",
            )

    def cls(self, view: int, rows: np.ndarray) -> torch.Tensor:
        """Cls tokens, or pixels, of some images in a view, on the device: [len(rows), D]."""
        return torch.from_numpy(self.file(view).read(rows, self.width)).to(self.frozen.device)


def _pixels(gray: torch.Tensor) -> torch.Tensor:
    pooled = torch.nn.functional.adaptive_avg_pool2d(gray.float() / 255, PIXEL_SIDE)
    return pooled.flatten(1)


def linear(frozen: Frozen, candidate: Candidate, mean: tuple, std: tuple) -> dict:
    """Scores of the published linear evaluation: {("", fraction, seed): (test rows, scores [n, C])}.

    Raises:
        Stopped: a stop was asked for.
        UserError: fewer images than a batch, an unreadable image, a loss that is not finite.
    """
    images, folds_differ = frozen.images, bool((frozen.images.parts == "").all())
    plans = {
        (fraction, seed): frozen.partitions(fraction, seed if folds_differ else 0, True)
        for fraction in frozen.fractions
        for seed in frozen.seeds
    }
    for parts in plans.values():
        for rows in parts:
            steps_per_epoch(len(rows.train), frozen.heads.batch_size)  # before the features, which take long
    features = Features(frozen, candidate, mean, std)
    done, keys = {}, {}
    for fraction, seed in plans:
        key = [
            "linear",
            features.key,
            frozen.study_key,
            asdict(frozen.heads),
            frozen.n_views,
            frozen.n_folds,
            fraction,
            seed,
        ]
        keys[fraction, seed] = digest(key)
        if (stored := frozen.jobs.load(keys[fraction, seed])) is not None:
            done[fraction, seed] = stored["rows"], stored["scores"]
    left = {place: parts for place, parts in plans.items() if place not in done}
    if not left:
        return {("", *place): done[place] for place in plans}
    train = np.unique(np.concatenate([rows.train for parts in left.values() for rows in parts]))
    judged = np.unique(np.concatenate([np.r_[r.valid, r.test] for parts in left.values() for r in parts]))
    n_views = min(frozen.n_views, frozen.heads.epochs)
    features.fill({CENTRE: judged} | dict.fromkeys(range(n_views), train))
    labels = torch.from_numpy(images.labels).to(frozen.device)
    for fraction in frozen.fractions:
        seeds = [seed for seed in frozen.seeds if (fraction, seed) in left]
        # With the data's own parts all seeds train on the same images and go side by side.
        for group in [[seed] for seed in seeds] if folds_differ else [seeds] if seeds else []:
            scores = [np.empty((0, len(images.label_names)), np.float32) for _ in group]
            tested = np.empty(0, np.int64)
            for k, rows in enumerate(left[fraction, group[0]]):
                fold = f", fold {k + 1}" if folds_differ else ""
                heads = train_heads(
                    [partial(features.cls, view, rows.train) for view in range(n_views)],
                    labels[rows.train],
                    features.cls(CENTRE, rows.valid),
                    labels[rows.valid],
                    task=images.task,
                    seeds=group,
                    options=frozen.heads,
                    signals=frozen.signals,
                    what=f"{candidate.name}: heads, {fraction:g} of the labels{fold}",
                )
                if heads is None:
                    raise Stopped
                test = features.cls(CENTRE, rows.test)
                found = [probabilities(head.scores(test), images.task) for head in heads]
                scores = [np.concatenate(pair) for pair in zip(scores, found, strict=True)]
                tested = np.concatenate([tested, rows.test])
                for seed, head in zip(group, heads, strict=True):
                    frozen.say(
                        f"{candidate.name}: {fraction:g} of the labels{fold}, seed {seed}: best epoch "
                        f"{head.epoch + 1} of {len(head.valid_losses)}, validation loss {min(head.valid_losses):.4f}"
                    )
            for seed, values in zip(group, scores, strict=True):
                done[fraction, seed] = tested, values.astype(np.float32)
                frozen.jobs.save(keys[fraction, seed], {"rows": tested, "scores": values.astype(np.float32)})
    return {("", *place): done[place] for place in plans}


def probe(frozen: Frozen, candidate: Candidate, mean: tuple, std: tuple) -> dict:
    """Scores of logistic regression: {(feature, fraction, seed): (test rows, scores [n, C])}.

    The features are "cls" and "mean of patches" ("pixels": principal components). Only folds depend on the
    seed: with the data's own parts the first seed stands for all.
    """
    images, folds_differ = frozen.images, bool((frozen.images.parts == "").all())
    seeds = list(frozen.seeds) if folds_differ else list(frozen.seeds)[:1]
    if len(seeds) < len(frozen.seeds):
        frozen.say(f"{candidate.name}: nothing in a probe is drawn, so seed {seeds[0]} stands for all")
    features = Features(frozen, candidate, mean, std)
    kinds = (
        {"": slice(None)}
        if features.is_pixels
        else {"cls": slice(0, features.width), "mean of patches": slice(features.width, None)}
    )
    places = [(kind, fraction, seed) for kind in kinds for fraction in frozen.fractions for seed in seeds]
    plans = {(f, s): frozen.partitions(f, s, False) for f in frozen.fractions for s in seeds}
    keys = {place: digest(["probe", features.key, frozen.study_key, frozen.n_folds, *place]) for place in places}
    done = {}
    for place in places:
        if (stored := frozen.jobs.load(keys[place])) is not None:
            done[place] = stored["rows"], stored["scores"]
    left = [place for place in places if place not in done]
    if not left:
        return done
    used = np.unique(np.concatenate([np.r_[r.train, r.valid, r.test] for _, f, s in left for r in plans[f, s]]))
    features.fill({CENTRE: used})
    values = np.zeros((len(images), features.file(CENTRE).width), np.float32)
    values[used] = features.file(CENTRE).read(used)
    for place in left:
        kind, fraction, seed = place
        found, tested = [], []
        for rows in plans[fraction, seed]:
            scale = partial(principal_components, seed=seed) if features.is_pixels else standardise
            scaled = scale(values[:, kinds[kind]], rows.train)
            columns = []
            for j, label in enumerate(images.label_names):
                if frozen.signals.request:
                    raise Stopped
                columns.append(
                    probe_scores(
                        scaled,
                        images.labels[:, j],
                        images.subjects,
                        rows.train,
                        rows.valid,
                        rows.test,
                        seed=seed,
                        say=frozen.say,
                        name=f"{candidate.name}, {fraction:g} of the labels, {label}",
                    )
                )
            found.append(np.stack(columns, 1))
            tested.append(rows.test)
        done[place] = np.concatenate(tested), np.concatenate(found).astype(np.float32)
        frozen.jobs.save(keys[place], {"rows": done[place][0], "scores": done[place][1]})
        frozen.say(f"{candidate.name}: probe{f' of {kind}' if kind else ''}, {fraction:g} of the labels, done")
    return {place: done[place] for place in places}
