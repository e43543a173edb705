"""Intervals of test results by drawing subjects again, with replacement, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

CHUNK_BYTES = 128 << 20  # of one array over (draws, images); a few of them are alive at once
MIN_DRAWS = 200  # fewer give no interval


def subject_draws(n_subjects: int, draws: int, seed: int, chunk: int) -> Iterator[np.ndarray]:
    """How often each draw has each subject, `chunk` draws at a time: float32 [R, n_subjects].

    The first row of the first chunk is 1 everywhere: the data themselves. The numbers don't depend on `chunk`.
    """
    rng = np.random.default_rng(seed)
    first = np.ones((1, n_subjects), np.float32)
    for start in range(0, draws, chunk) if draws else [0]:
        rows = [
            np.bincount(rng.integers(0, n_subjects, n_subjects), minlength=n_subjects)
            for _ in range(min(chunk, draws - start))
        ]
        yield np.concatenate([first, np.array(rows, np.float32).reshape(-1, n_subjects)])
        first = first[:0]


def bootstrap_aucs(
    targets: np.ndarray,
    scores: np.ndarray,
    subjects: np.ndarray,
    folds: np.ndarray | None = None,
    *,
    draws: int,
    seed: int,
) -> np.ndarray:
    """AUC of each label on the data (first row) and on `draws` draws of whole subjects.

    Args:
        targets: [N, C] of 0, 1 and NaN (not known: counts nowhere).
        scores: [N, C].
        subjects: [N].
        folds: [N]: the mean of the folds' AUCs is taken, over those with both classes. The scores of different folds
            come from different models, so they are not compared: pooled they give an AUC that is too low.

    Returns:
        float64 [1 + draws, C]; NaN where a draw has one class only, and in all draws of a single subject.
    """
    _, index = np.unique(subjects, return_inverse=True)
    folds = np.zeros(len(targets)) if folds is None else folds
    parts = [[np.flatnonzero((folds == fold) & ~np.isnan(column)) for fold in np.unique(folds)] for column in targets.T]
    labels = [
        [(SortedScores(targets[rows, j], scores[rows, j]), index[rows]) for rows in own] for j, own in enumerate(parts)
    ]
    chunk = max(1, CHUNK_BYTES // (8 * max(1, len(targets))))
    aucs = np.concatenate(
        [
            np.stack([mean_of_known([part.auc(counts, own) for part, own in label], 0) for label in labels], axis=1)
            for counts in subject_draws(int(index.max()) + 1, draws, seed, chunk)
        ]
    )
    return _without_lone_draws(aucs, int(index.max()) + 1)


def bootstrap_means(values: np.ndarray, subjects: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Mean of each column of `values` [N, C] (NaN: not counted), as `bootstrap_aucs`: [1 + draws, C]."""
    _, index = np.unique(subjects, return_inverse=True)
    n_subjects = int(index.max()) + 1
    known = ~np.isnan(values)
    sums = np.stack([np.bincount(index, v, n_subjects) for v in np.nan_to_num(values).T], axis=1)  # [U, C]
    counts = np.stack([np.bincount(index, k, n_subjects) for k in known.T], axis=1)
    chunk = max(1, CHUNK_BYTES // (8 * n_subjects))
    means = []
    for drawn in subject_draws(n_subjects, draws, seed, chunk):
        drawn = drawn.astype(np.float64)
        with np.errstate(invalid="ignore"):
            means.append((drawn @ sums) / (drawn @ counts))
    return _without_lone_draws(np.concatenate(means), n_subjects)


def mean_of_known(values: np.ndarray | list[np.ndarray], axis: int) -> np.ndarray:
    """Mean over an axis without its NaN; NaN where nothing is known."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def _without_lone_draws(values: np.ndarray, n_subjects: int) -> np.ndarray:
    """NaN for the draws of a single subject: they are all the same, and would make an interval of no width."""
    if n_subjects == 1:
        values[1:] = np.nan
    return values


def n_drawn(values: np.ndarray) -> int:
    """How many draws (all values but the first) have a value."""
    return int(np.isfinite(values[1:]).sum())


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Value on the data (first), and the 2.5 and 97.5 percentiles of the draws (the others) that have a value; NaN
    where these are fewer than `MIN_DRAWS`."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) >= MIN_DRAWS else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


EXACT = 1 << 24  # counts up to here add up exactly in float32


class SortedScores:
    """The scores of one label in order, ready for any number of weightings.

    Args:
        targets: 0/1 [N].
        scores: [N], finite; equal ones count half.
    """

    def __init__(self, targets: np.ndarray, scores: np.ndarray):
        targets = np.asarray(targets)
        if len(targets) >= EXACT:
            raise ValueError(f"{len(targets)} images are more than {EXACT}")
        negatives = np.flatnonzero(targets == 0)
        self.positives = np.flatnonzero(targets == 1)
        self.negatives = negatives[np.argsort(scores[negatives], kind="stable")]
        ordered = scores[self.negatives]
        # For each positive: how many negatives lie below it, and how many not above.
        self.below = np.searchsorted(ordered, scores[self.positives], "left")
        self.upto = np.searchsorted(ordered, scores[self.positives], "right")

    def auc(self, counts: np.ndarray, index: np.ndarray | None = None) -> np.ndarray:
        """AUC of each weighting; NaN where one leaves one class only.

        Args:
            counts: whole numbers [R, U]: how often each draw has each subject.
            index: [N] subject of each image; None: every image is its own.

        Returns:
            float64 [R].
        """
        positives, negatives = self.positives, self.negatives
        if index is not None:
            positives, negatives = index[positives], index[negatives]
        # Draws lie side by side in memory: rows are gathered and summed whole, 5 times faster than columns.
        counts = np.ascontiguousarray(counts.T, np.float32)  # [U, R]
        cumulated = np.zeros((len(negatives) + 1, counts.shape[1]), np.float32)
        np.cumsum(counts[negatives], axis=0, out=cumulated[1:])
        weight = counts[positives]
        won = np.einsum("pr,pr->r", weight, cumulated[self.below] + cumulated[self.upto], dtype=np.float64)
        total = 2 * weight.sum(0, dtype=np.float64) * cumulated[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, won / total, np.nan)


def auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve; NaN where there is one class only. targets: 0/1 [N], scores: [N]."""
    return float(SortedScores(targets, scores).auc(np.ones((1, len(targets)), np.float32))[0])
