"""What every data set of the downstream evaluation is read into: images, subjects, parts and labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.jobs import digest
from util.errors import UserError
from util.files import atomic_write

TRAIN, VALID, TEST = PARTS = ("train", "valid", "test")
MULTILABEL, MULTICLASS = "multilabel", "multiclass"
RESERVED = ("id", "subject", "split", "mean", "seeds", "weights")  # columns of split.csv and table.md beside the labels
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
        damaged: files of images that --skip_damaged left out; the cache of decoded images has them too.
        tallies: further rows of `split_table`, by part.
        study: whose patients the subjects are, "" if unknown: the same names elsewhere may be other people.

    Raises:
        UserError: no image or label, an id or a label twice, or a subject in two parts.
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
    damaged: tuple[Path, ...] = ()
    tallies: dict[str, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not len(self) or not self.label_names:
            raise UserError(f"{self.name}: no {'label' if len(self) else 'image'} is left")
        for names in (self.ids, [*RESERVED, *self.label_names]):
            if (twice := pd.Index(names).duplicated()).any():
                raise UserError(f"{self.name}: {names[twice.argmax()]!r} is there twice; give each its own name")
        pairs = pd.DataFrame({"subject": self.subjects, "part": self.parts}).drop_duplicates()
        shared = pairs["subject"][pairs["subject"].duplicated()].unique()
        if len(shared) and not self.shared_subjects:
            raise UserError(
                f"{self.name}: subject {shared[0]!r} has images in two parts, and so have {len(shared) - 1} more; correct the "
                "split, or pass --split subject"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def indices(self, part: str) -> np.ndarray:
        """Places of a part's images, in order: int64 [n]."""
        return np.flatnonzero(self.parts == part)

    def take(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Some of the images, in the order of `indices`; `UserError` if none."""
        lists = {name: [getattr(self, name)[i] for i in indices] for name in ("ids", "files")}
        arrays = {name: getattr(self, name)[np.asarray(indices, int)] for name in ("subjects", "parts", "labels")}
        return replace(self, **lists, **arrays)


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
    chosen = pd.Series(train).sample(frac=fraction, random_state=FRACTION_SEED).to_numpy(copy=True)
    if len(chosen) == 0:
        raise UserError(f"--fractions {fraction:g}: no image is left of {len(train)} to train on")
    return chosen


def check_labels(images: LabelledImages, *, fractions: Sequence[float] = (1.0,), min_positives: int = 1) -> list[str]:
    """Warnings of labels that some part of the images can't teach or judge.

    Images without parts, of which grouped folds are drawn, train and test in turn: they are all both.

    Raises:
        UserError: a part without images, a label that no training image has (or that all have), or validation or test
            images that can judge no label.
    """
    name, names, in_folds = images.name, np.array(images.label_names), bool((images.parts == "").all())
    places = {part: images.indices("" if in_folds else part) for part in PARTS}
    for part, rows in places.items():
        if not len(rows):
            raise UserError(f"{name}: no image is in {part}; correct the split, or pass --split subject")
    train, test = (_counts(images.labels[places[part]]) for part in (TRAIN, TEST))
    if (useless := (train == 0).any(0)).any():
        raise UserError(
            f"{name}: no training image, or every one, has {', '.join(names[useless])}; give the labels to keep with --labels "
            f"(there are {', '.join(names[~useless])})"
        )
    check_judged(images, images.labels[places[VALID]], VALID, 1)
    check_judged(images, images.labels[places[TEST]], TEST, min_positives)
    lone = test[0] == 0 if images.task == MULTICLASS else (test == 0).any(0)
    lines = [
        f"{name}: '{label}' has {positive} images with and {negative} without it in test; left out of the mean"
        for label, positive, negative in zip(names[lone], *test[:, lone], strict=True)
    ]
    for fraction in fractions if not in_folds else ():  # folds differ by seed
        chosen = sample_fraction(places[TRAIN], fraction)
        lone = (_counts(images.labels[chosen]) == 0).any(0)
        if lone.any():
            lines.append(
                f"warning: {name}: --fractions {fraction:g} keeps {len(chosen)} training images, all of one kind "
                f"by {', '.join(names[lone])}; these are judged without having been learnt"
            )
    return lines


def check_judged(images: LabelledImages, labels: np.ndarray, part: str, least: int) -> None:
    """`UserError` if the labels [N, C] of a part judge nothing: all of one class, or none with `least` images of both kinds."""
    counts = _counts(labels)
    if (counts[0] > 0).sum() < 2 if images.task == MULTICLASS else not (counts >= least).all(0).any():
        raise UserError(
            f"{images.name}: no label has {least} images with it, and as many without, in {part}, so nothing can be judged; "
            "take another --split or --split_seed, or a lower --min_positives"
        )


def split_table(images: LabelledImages) -> str:
    """Images, subjects and positives of each label by part, as text in columns.

    A label with unknown values has them behind its positives: "12 (+3 unknown)".
    """
    columns = {}
    for part in [part for part in (*PARTS, "") if (images.parts == part).any()]:
        places = images.indices(part)
        cells = {"images": len(places), "subjects": len(set(images.subjects[places]))}
        for label, values in zip(images.label_names, images.labels[places].T, strict=True):
            unknown = np.isnan(values).sum()
            cells[f"{label} "] = f"{np.nansum(values):.0f}" + (f" (+{unknown} unknown)" if unknown else "")
        columns[part or "no part"] = cells | {what: counts.get(part, 0) for what, counts in images.tallies.items()}
    return pd.DataFrame(columns).to_string()


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
