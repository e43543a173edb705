"""Which images train, validate and test: the parts of the data, or grouped folds."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from datasets.downstream.labelled import TEST, TRAIN, VALID, LabelledImages, sample_fraction
from util.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Places of images, int64 each; no subject has images in two of them."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def in_folds(images: LabelledImages) -> bool:
    """Whether the images have no parts, so that folds must be drawn."""
    return bool((images.parts == "").all())


def partitions(images: LabelledImages, fraction: float, *, seed: int, n_folds: int, validate: bool) -> list[Rows]:
    """One partition by the data's parts, or one for each grouped fold, in which every image is tested once.

    Folds are stratified by whether an image has any label, or by class. Fold k tests; with `validate` the next
    fold validates; the others train, of which `fraction` is kept.

    Raises:
        UserError: fewer subjects than folds, or too few folds to train on.
    """
    if not in_folds(images):
        rows = [images.indices(part) for part in (VALID, TEST)]
        return [Rows(np.array(sample_fraction(images, fraction)), *rows)]
    least = 3 if validate else 2
    if n_folds < least:
        raise UserError(f"--folds {n_folds}: must be at least {least}")
    if (count := len(np.unique(images.subjects))) < n_folds:
        raise UserError(f"--folds {n_folds}: there are only {count} subjects")
    kind = images.labels.argmax(1) if images.task == "multiclass" else (images.labels == 1).any(1)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class rarer than folds
        folds = [np.sort(test) for _, test in splitter.split(kind, kind, images.subjects)]
    found = []
    for k, test in enumerate(folds):
        parts = np.full(len(images), TRAIN, object)
        parts[test] = TEST
        if validate:
            parts[folds[(k + 1) % n_folds]] = VALID
        if not (parts == TRAIN).any():
            raise UserError(f"--folds {n_folds}: fold {k + 1} leaves no image to train on")
        folded = replace(images, parts=parts)
        found.append(Rows(np.array(sample_fraction(folded, fraction)), folded.indices(VALID), test))
    return found
