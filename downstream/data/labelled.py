"""What every data set of the downstream evaluation is read into: images, subjects, parts and labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from util.errors import UserError
from util.files import atomic_write
from downstream.jobs import digest

TRAIN, VALID, TEST = PARTS = ("train", "valid", "test")
MULTILABEL, MULTICLASS = "multilabel", "multiclass"
FRACTION_SEED = 42  # of the published label fractions, the same for every seed of a run


@dataclass(frozen=True)
class LabelledImages:
    """N images and C labels.

    The order matters: `sample_fraction` draws from the training images in the order they have here, which
    is the one that the published split left.

    Attributes:
        name: of the data set.
        ids: N names, each once.
        files: N image files; they need not be there where only tables are read.
        subjects: str [N]; no subject has images in two parts, unless `shared_subjects`.
        parts: str [N], each "train", "valid" or "test"; all "" where grouped folds are to be drawn.
        label_names: C names.
        labels: float32 [N, C]: 1 present, 0 absent, NaN unknown or ignored (neither in loss nor in AUC).
        task: "multilabel" (binary cross-entropy, AUROC of each label) or "multiclass" (cross-entropy,
            accuracy; each row has one 1).
        strong_augmentation: whether the published run also jitters brightness, blurs and flips.
        notes: lines to print.
        shared_subjects: the split is a published one that has subjects in two parts, asked for by name.
        study: whose patients the subjects are, "" if unknown: the same names elsewhere may be other people.

    Raises:
        UserError: an id twice, or a subject in two parts.
        ValueError: shapes or values that no reader may give.
    """

    name: str
    ids: list[str]
    files: list[Path]
    subjects: np.ndarray
    parts: np.ndarray
    label_names: list[str]
    labels: np.ndarray
    task: str = MULTILABEL
    strong_augmentation: bool = False
    notes: list[str] = field(default_factory=list)
    shared_subjects: bool = False
    study: str = ""

    def __post_init__(self) -> None:
        n, c = len(self.ids), len(self.label_names)
        if n == 0 or c == 0:
            raise UserError(f"{self.name}: no {'image' if n == 0 else 'label'} is left")
        shapes = len(self.files), self.subjects.shape, self.parts.shape, self.labels.shape
        if shapes != (n, (n,), (n,), (n, c)):
            raise ValueError(f"{self.name}: {n} ids and {c} labels, but shapes {shapes}")
        if self.task not in (MULTILABEL, MULTICLASS) or self.labels.dtype != np.float32:
            raise ValueError(f"{self.name}: task {self.task}, labels of type {self.labels.dtype}")
        if not (np.isnan(self.labels) | (self.labels == 0) | (self.labels == 1)).all():
            raise ValueError(f"{self.name}: labels are 0, 1 or NaN")
        if self.task == MULTICLASS and not (self.labels.sum(1) == 1).all():
            raise ValueError(f"{self.name}: every image has exactly one class")
        reserved = dict.fromkeys(("id", "subject", "split"), "is a column of split.csv")
        reserved["mean"] = "is what results.csv calls the mean over labels"
        for i, label in enumerate(self.label_names):
            if label in reserved or label in self.label_names[:i]:
                what = reserved.get(label, "is there twice")
                raise UserError(f"{self.name}: label {label!r} {what}; give the label another name")
        known = np.isin(self.parts, PARTS)
        if not known.all() and not (self.parts == "").all():
            raise ValueError(f"{self.name}: parts are {', '.join(PARTS)}, or all empty")
        if len(set(self.ids)) != n:
            twice = pd.Series(self.ids)[pd.Series(self.ids).duplicated()].iloc[0]
            raise UserError(f"{self.name}: image {twice!r} is there twice; every image needs an id of its own")
        if not self.shared_subjects:
            self._check_subjects()

    def _check_subjects(self) -> None:
        pairs = pd.DataFrame({"subject": self.subjects, "part": self.parts}).drop_duplicates()
        shared = pairs["subject"][pairs["subject"].duplicated()].unique()
        if len(shared):
            where = sorted(pairs["part"][pairs["subject"] == shared[0]])
            raise UserError(
                f"{self.name}: subject {shared[0]!r} has images in {' and '.join(where)}, and "
                f"{len(shared) - 1} more subjects are in two parts; mend the split, or pass --split subject"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, part: str) -> np.ndarray:
        """Places of a part's images, in order: int64 [n]."""
        return np.flatnonzero(self.parts == part)

    def take(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Some of the images, in the order of `indices`; `UserError` where there is none."""
        places = np.asarray(indices, np.int64)
        return replace(
            self,
            ids=[self.ids[i] for i in places],
            files=[self.files[i] for i in places],
            subjects=self.subjects[places],
            parts=self.parts[places],
            labels=self.labels[places],
        )


def sample_fraction(train: np.ndarray, fraction: float) -> np.ndarray:
    """Those of the training images' places, int64 [n], that a label fraction keeps: int64 [round(fraction * n)].

    As published: `DataFrame.sample(frac, random_state=42)` over the training part in its order, so the
    same images whatever the seed of a run; 1 keeps them all, in their own order.

    Raises:
        UserError: a fraction outside (0, 1], or one that keeps no image.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fractions {fraction:g}: expected more than 0 and at most 1")
    if fraction == 1:
        return train
    chosen = pd.Series(train).sample(frac=fraction, random_state=FRACTION_SEED).to_numpy()
    if len(chosen) == 0:
        raise UserError(f"--fractions {fraction:g}: no image is left of {len(train)} to train on")
    return chosen


def check_classes(images: LabelledImages) -> list[str]:
    """Lines about labels that the test images can't judge; empty where all can be.

    Images without parts, of which grouped folds are drawn, train and test in turn: they are all both.

    Raises:
        UserError: a part without images, a label that no training image has (or that all have), validation
            images without any label that is known, or no label at all that the test images can judge.
    """
    in_folds = bool((images.parts == "").all())
    for part in () if in_folds else PARTS:
        if not (images.parts == part).any():
            raise UserError(f"{images.name}: no image is in {part}; mend the split, or pass --split subject")
    counts = {part: _counts(images.labels[images.indices("" if in_folds else part)]) for part in PARTS}
    if not counts[VALID].any():
        raise UserError(
            f"{images.name}: no label of any validation image is known, so no epoch can be chosen by them; mend the "
            "table, or pass --split subject"
        )
    absent, everywhere = counts[TRAIN] == 0
    if (useless := absent | everywhere).any():
        words = [
            f"label {label!r} is {'absent from' if absent[i] else 'present in'} every training image where it is known"
            for i, label in enumerate(images.label_names)
            if useless[i]
        ]
        kept = [label for label, out in zip(images.label_names, useless, strict=True) if not out]
        raise UserError(
            f"{images.name}: {words[0]}{f', and {len(words) - 1} more are such' if words[1:] else ''}; name the labels to "
            f"keep by --labels{' (there are ' + ', '.join(kept) + ')' if kept else ''}"
        )
    lines, classes = [], images.task == MULTICLASS
    for part, use in ((VALID, "its validation loss tells little"), (TEST, "left out of the mean")):
        positive, negative = counts[part]
        lone = (positive == 0) | ((negative == 0) & (not classes))
        if (positive > 0).sum() < 2 if classes else lone.all():
            raise UserError(
                f"{images.name}: the {'validation' if part == VALID else part} images are all of one kind, so nothing "
                "can be judged; take another --split or --split_seed"
            )
        if part == TEST or not (in_folds or classes):
            lines += [
                f"{images.name}: {label!r} has {int(positive[i])} images with and {int(negative[i])} without it in "
                f"{part}; {use}"
                for i, label in enumerate(images.label_names)
                if lone[i]
            ]
    return lines


def check_min_positives(least: int, images: LabelledImages, labels: np.ndarray) -> None:
    """`UserError` where --min_positives leaves no label for the mean over test images with these labels [N, C]."""
    counts = np.stack([(labels == value).sum(0) for value in (0, 1)])
    if images.task == MULTILABEL and not (counts >= least).all(0).any():
        raise UserError(
            f"--min_positives {least}: no label has so many test images with it, and as many without; lower it"
        )


def lone_in_fractions(images: LabelledImages, fractions: Sequence[float]) -> list[str]:
    """Lines about labels that a share of the training images has of one kind only: what is learnt of these says
    nothing about the encoder. Empty for grouped folds, which differ by seed."""
    lines = []
    for fraction in fractions if not (images.parts == "").all() else ():
        chosen = sample_fraction(images.indices(TRAIN), fraction)
        positive, negative = _counts(images.labels[chosen])
        if names := [n for n, lone in zip(images.label_names, (positive == 0) | (negative == 0)) if lone]:
            lines.append(
                f"warning: {images.name}: --fractions {fraction:g} keeps {len(chosen)} training images, all of one kind "
                f"by {', '.join(names)}; these are judged without having been learnt"
            )
    return lines


def split_table(images: LabelledImages) -> str:
    """Images, subjects and positives of each label by part, as text in columns.

    A label with unknown values has them behind its positives: "12 (+3 unknown)".
    """
    parts = [part for part in (*PARTS, "") if (images.parts == part).any()]
    rows = [["", *(part or "no part" for part in parts)]]
    chosen = [images.indices(part) for part in parts]
    rows.append(["images", *(str(len(places)) for places in chosen)])
    rows.append(["subjects", *(str(len(set(images.subjects[places]))) for places in chosen)])
    for i, label in enumerate(images.label_names):
        values = [images.labels[places, i] for places in chosen]
        unknown = [int(np.isnan(value).sum()) for value in values]
        cells = [str(int(np.nansum(value))) for value in values]
        rows.append([label, *(f"{c} (+{u} unknown)" if u else c for c, u in zip(cells, unknown, strict=True))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


def write_split(images: LabelledImages, path: str | os.PathLike) -> None:
    """Write split.csv: id, subject, split ("" = none), and one column per label (empty = unknown)."""
    table = pd.DataFrame({"id": images.ids, "subject": images.subjects, "split": images.parts})
    labels = pd.DataFrame(images.labels, columns=images.label_names).astype("Int8")
    table = pd.concat([table, labels], axis=1)
    with atomic_write(path, "w") as file:
        table.to_csv(file, index=False)


def files_digest(images: LabelledImages) -> str:
    """Of all image files in order, by place, size and both times: archives and `cp -p` set the first, nothing the
    second."""
    found = []
    for file in images.files:
        try:
            stat = file.stat()
        except OSError as error:
            raise UserError(f"{file}: can't be read ({error.strerror})") from None
        found.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    return digest(found)


def study_digest(images: LabelledImages) -> str:
    """Of what is to be learnt: ids, subjects, parts and labels."""
    labels = hashlib.sha256(images.labels.tobytes()).hexdigest()
    return digest([images.ids, images.subjects.tolist(), images.parts.tolist(), images.label_names, labels])


def _counts(labels: np.ndarray) -> np.ndarray:
    """Images with and without each label: int64 [2, C]."""
    return np.stack([(labels == 1).sum(0), (labels == 0).sum(0)])
