"""Who trains, validates and tests: lists of a split, and draws by subject."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.folder import match
from downstream.data.labelled import TEST, TRAIN, VALID
from util.errors import UserError
from util.tables import read_text

SHARE = 0.15  # of the images, for validation and for tests each, where a split is drawn by subject


def split_by_subject(name: str, subjects: np.ndarray, seed: int) -> np.ndarray:
    """70 / 15 / 15% of the images, no subject in two parts: str [N].

    Depends on the subjects and the seed, not on the order of the images.
    """
    if len(set(subjects)) < 3:
        raise UserError(
            f"{name}: {len(set(subjects))} subjects are too few to train, validate and test on; "
            "use --split folds or --split test"
        )
    count, parts = SHARE * len(subjects), np.full(len(subjects), TRAIN)
    parts[draw_subjects(subjects, count, seed)] = TEST
    rest = np.flatnonzero(parts == TRAIN)
    parts[rest[draw_subjects(subjects[rest], count, seed + 1)]] = VALID
    return parts


def listed_parts(names: Sequence[str], lists: Mapping[str, Path], notes: list[str]) -> list[str | None]:
    """The part of each image by the list that names it, None for an image in none.

    The first word of a line names an image, with or without directory and suffix; `notes` count lines that name none.

    Raises:
        UserError: an image in two lists, or lists without any image.
    """
    part_of: dict[str, str] = {}
    for part, path in lists.items():
        words = re.findall(r"^\s*[\"']?([^\s,;\"']+)", read_text(path), re.MULTILINE)
        found = [images[0] for images in match(words, names) if len(images) == 1]
        if both := [name for name in found if part_of.setdefault(name, part) != part]:
            raise UserError(f"{path}: {both[0]} is in the list of {part_of[both[0]]} too; get the lists again")
        if len(found) < len(words):
            notes.append(f"{path}: {len(words) - len(found)} of {len(words)} lines name no image of the table")
    if not part_of:
        raise UserError(
            f"{', '.join(map(str, lists.values()))}: no line names an image of the table, e.g. {names[0]!r}"
        )
    return [part_of.get(name) for name in names]


def draw_subjects(subjects: np.ndarray, count: float, seed: int) -> np.ndarray:
    """Whole subjects, drawn until they have `count` images, rounded and at least one; one is always left over: bool [N]."""
    subjects = pd.Series(subjects)
    images = subjects.groupby(subjects).size()
    drawn = images.iloc[np.random.default_rng(seed).permutation(len(images))]
    before = drawn.cumsum() - drawn
    return subjects.isin(drawn.index[:-1][before[:-1] < max(1, round(count))]).to_numpy()


def draw_folds(kinds: np.ndarray, subjects: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each image, 0 to n_folds - 1: int64 [N]. No subject is in two folds, and with as many subjects as
    folds or more none is empty.

    Subjects are dealt out there and back in the order of how many images of the rarest kind they have, then of the
    next one, so that each fold gets its share of each kind. Equal ones stand in an order that is drawn.

    Args:
        kinds: [N], the class that each fold should have its share of.
        subjects: [N].
    """
    counts = pd.crosstab(subjects, kinds)
    order = np.random.default_rng(seed).permutation(len(counts))
    rarest_last = counts.to_numpy()[order][:, np.argsort(-counts.sum().to_numpy())]
    names = counts.index[order[np.lexsort(-rarest_last.T)]]
    folds = pd.Series(np.resize(np.r_[:n_folds, n_folds - 1 : -1 : -1], len(names)), names)
    return folds[subjects].to_numpy()
