"""Who trains, validates and tests: published rules to the row, and draws by subject."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.model_selection import train_test_split

from downstream.data.folder import without_suffix
from downstream.data.labelled import TEST, TRAIN, VALID
from util.errors import UserError
from util.tables import read_text

UNLISTED = "-"  # the part of an image that no list of a split names
SHARE = 0.15  # of the images, for validation and for tests each, where a split is drawn by subject


def split_70_15_15(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The published split of n rows (RSNA, SIIM): places in the order it leaves, and the part of each.

    scikit-learn's `train_test_split(test_size=0.3, random_state=0)`, then of the 30%
    `train_test_split(test_size=0.5, random_state=0)`, whose first half is test and second valid.

    Raises:
        UserError: fewer than the 4 rows that give each part one.
    """
    if n < 4:
        raise UserError(f"{n} images are too few to train, validate and test on; keep more rows of the table")
    train, rest = train_test_split(np.arange(n), test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    parts = np.repeat([TRAIN, VALID, TEST], [len(train), len(valid), len(test)])
    return np.concatenate([train, valid, test]), parts


def split_by_subject(name: str, subjects: np.ndarray, seed: int) -> np.ndarray:
    """70 / 15 / 15% of the images, no subject in two parts: str [N].

    Depends on the subjects and the seed, not on the order of the images.
    """
    if len(set(subjects)) < 3:
        raise UserError(
            f"{name}: {len(set(subjects))} subjects are too few to train, validate and test on; "
            "use --split folds or --split test"
        )
    count = max(1, round(SHARE * len(subjects)))
    parts = np.full(len(subjects), TRAIN)
    parts[draw_subjects(subjects, count, seed)] = TEST
    rest = np.flatnonzero(parts == TRAIN)
    parts[rest[draw_subjects(subjects[rest], count, seed + 1)]] = VALID
    return parts


def listed_parts(names: Sequence[str], lists: Mapping[str, Path], notes: list[str]) -> np.ndarray:
    """The part of each image by the list that names it, `UNLISTED` for an image in none: str [N].

    The first word of a line names an image, with or without directory and suffix; `notes` count lines that name none.

    Raises:
        UserError: an image in two lists, or lists without any image.
    """
    key = _short_name(names)
    place = {key(name): i for i, name in enumerate(names)}
    parts = np.full(len(names), UNLISTED, "<U5")
    for part, path in lists.items():
        lines = list(filter(None, map(str.strip, read_text(path).splitlines())))
        keys = (key(re.split(r"[\s,;]", line)[0].strip("\"'").replace("\\", "/")) for line in lines)
        found = [place[name] for name in keys if name in place]
        if both := [i for i in found if parts[i] not in (UNLISTED, part)]:
            raise UserError(f"{path}: {names[both[0]]} is in the list of {parts[both[0]]} too; get the lists again")
        if len(found) < len(lines):
            notes.append(f"{path}: {len(lines) - len(found)} of {len(lines)} lines name no image of the table")
        parts[found] = part
    if (parts == UNLISTED).all():
        raise UserError(f"{', '.join(map(str, lists.values()))}: no line names an image of the table, e.g. {names[0]!r}")
    return parts


def _short_name(names: Sequence[str]) -> Callable[[str], str]:
    """What is left of a path: as few of its last parts as tell all names apart, if possible without suffix."""
    for bare in (without_suffix, str):
        for depth in range(1, 2 + max(name.count("/") for name in names)):

            def short(name: str, bare=bare, depth=depth) -> str:
                return "/".join(bare(name).split("/")[-depth:])

            if len(set(map(short, names))) == len(names):
                return short
    return str


def draw_subjects(subjects: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Whole subjects, drawn until they have `count` images, one always left over: bool [N]."""
    names, inverse, images = np.unique(subjects, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.cumsum(images[order]) - images[order]
    chosen = np.zeros(len(names), bool)
    chosen[order[before < count]] = True
    chosen[order[-1]] = False
    return chosen[inverse]


def draw_folds(kinds: np.ndarray, subjects: np.ndarray, n_folds: int, seed: int) -> np.ndarray:
    """The fold of each image, 0 to n_folds - 1: int64 [N]. No subject is in two folds, and with as many subjects as
    folds or more none is empty.

    Subjects are dealt out there and back in the order of how many images of the rarest kind they have, then of the
    next one, so that each fold gets its share of each kind. Equal ones stand in an order that is drawn.

    Args:
        kinds: [N], the class that each fold should have its share of.
        subjects: [N].
    """
    names, subject = np.unique(subjects, return_inverse=True)
    _, kind, images = np.unique(kinds, return_inverse=True, return_counts=True)
    counts = np.bincount(subject * len(images) + kind, minlength=len(names) * len(images)).reshape(len(names), -1)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.lexsort(-counts[order][:, np.argsort(-images)].T)]
    fold = np.empty(len(names), np.int64)
    fold[order] = np.resize(np.r_[:n_folds, n_folds - 1 : -1 : -1], len(names))
    return fold[subject]
