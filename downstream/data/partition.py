"""Which images train, validate and test: the parts of the data, or grouped folds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from downstream.data.labelled import MULTICLASS, PARTS, LabelledImages, sample_fraction
from downstream.data.splits import draw_folds
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


def folds_of(images: LabelledImages, seed: int, n_folds: int) -> np.ndarray:
    """The grouped fold of each image, stratified by whether it has any label, or by class: int64 [N].

    Raises:
        UserError: fewer subjects than folds, or no label with an image of both kinds for each fold.
    """
    if (count := len(np.unique(images.subjects))) < n_folds:
        raise UserError(f"--folds {n_folds}: there are only {count} subjects")
    kinds = images.labels.argmax(1)
    if images.task != MULTICLASS:
        kinds = (images.labels == 1).any(1)
        most = np.min([(images.labels == value).sum(0) for value in (0, 1)], axis=0).max()
        if most < n_folds:
            raise UserError(f"--folds {n_folds}: no label has so many images with it, and as many without: lower it")
    return draw_folds(kinds, images.subjects, n_folds, seed)


def partitions(images: LabelledImages, fraction: float, *, seed: int, n_folds: int, validate: bool) -> list[Rows]:
    """One partition by the data's parts, or one for each grouped fold, in which every image is tested once.

    Fold k tests; with `validate` the next fold validates; the others train, of which `fraction` is kept.

    Raises:
        UserError: as `folds_of`, too few folds to train on, or a fraction that keeps no image.
    """
    if not in_folds(images):
        train, valid, test = map(images.indices, PARTS)
        return [Rows(sample_fraction(train, fraction), valid, test)]
    least = 3 if validate else 2
    if n_folds < least:
        raise UserError(f"--folds {n_folds}: must be at least {least}")
    folds, found = folds_of(images, seed, n_folds), []
    for k in range(n_folds):
        test, valid = folds == k, validate & (folds == (k + 1) % n_folds)
        train = np.flatnonzero(~test & ~valid)
        found.append(Rows(sample_fraction(train, fraction), np.flatnonzero(valid), np.flatnonzero(test)))
    return found
