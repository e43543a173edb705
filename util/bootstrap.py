"""Intervals of test results by drawing subjects again, with replacement, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

CHUNK_BYTES = 128 << 20  # of one array over (draws, images); a few of them are alive at once
MIN_DRAWS = 200  # fewer give no interval


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
    folds = np.zeros(len(targets)) if folds is None else folds

    def aucs(counts: np.ndarray, index: np.ndarray) -> np.ndarray:
        columns = []
        for target, score in zip(targets.T, scores.T):
            parts = [np.flatnonzero((folds == fold) & ~np.isnan(target)) for fold in np.unique(folds)]
            of_folds = [weighted_aucs(target[rows], score[rows], counts[index[rows]]) for rows in parts]
            columns.append(mean_of_known(of_folds, 0))
        return np.stack(columns, axis=1)

    return _over_draws(aucs, subjects, draws, seed)


def bootstrap_means(values: np.ndarray, subjects: np.ndarray, *, draws: int, seed: int) -> np.ndarray:
    """Mean of each column of `values` [N, C] (NaN: not counted), as `bootstrap_aucs`: [1 + draws, C]."""
    known = ~np.isnan(values)

    def means(counts: np.ndarray, index: np.ndarray) -> np.ndarray:
        weights = np.ascontiguousarray(counts.T, np.float64)  # [R, U]
        sums, numbers = (
            weights @ np.stack([np.bincount(index, column, len(counts)) for column in columns.T], axis=1)
            for columns in (np.nan_to_num(values), known)
        )
        with np.errstate(invalid="ignore"):
            return sums / numbers

    return _over_draws(means, subjects, draws, seed)


def _over_draws(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray], subjects: np.ndarray, draws: int, seed: int
) -> np.ndarray:
    """`statistic` [R, C] of how often each draw has each subject, float32 [U, R], and of the subject of each image,
    int [N]; of the data themselves first, then of the draws. The numbers don't depend on the size of the chunks."""
    names, index = np.unique(subjects, return_inverse=True)
    rng, n = np.random.default_rng(seed), len(names)
    chunk = max(1, CHUNK_BYTES // (8 * len(subjects)))
    found = [statistic(np.ones((n, 1), np.float32), index)]
    for start in range(0, draws, chunk):
        counts = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(min(chunk, draws - start))]
        # The draws of a single subject are all the same: an interval of no width would claim certainty.
        found.append(statistic(np.array(counts, np.float32, order="F").T * (n > 1), index))
    return np.concatenate(found)


def mean_of_known(values: np.ndarray | list[np.ndarray], axis: int) -> np.ndarray:
    """Mean over an axis without its NaN; NaN where nothing is known."""
    with np.errstate(invalid="ignore"):
        return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Value on the data (first), and the 2.5 and 97.5 percentiles of the draws (the others) that have a value; NaN
    where these are fewer than `MIN_DRAWS`."""
    drawn = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) >= MIN_DRAWS else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def weighted_aucs(targets: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for many weightings of the images at once; NaN where one leaves one class only.

    Args:
        targets: 0/1 [N].
        scores: [N], finite; equal ones count half.
        counts: whole numbers, float32 [N, R]: how often each draw has each image. Draws lie side by side in memory: rows
            are gathered and summed whole, 5 times faster than columns.

    Returns:
        float64 [R].
    """
    positives, negatives = (np.flatnonzero(targets == kind) for kind in (1, 0))
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    cumulated = np.zeros((len(negatives) + 1, counts.shape[1]), np.float32)  # exact below 2**24 images
    np.cumsum(counts[negatives], axis=0, out=cumulated[1:])
    # For each positive: the negatives below it, and those not above.
    below, upto = (np.searchsorted(scores[negatives], scores[positives], side) for side in ("left", "right"))
    weight = counts[positives]
    won = np.einsum("pr,pr->r", weight, cumulated[below] + cumulated[upto], dtype=np.float64)
    total = 2 * weight.sum(0, dtype=np.float64) * cumulated[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, won / total, np.nan)


def auc(targets: np.ndarray, scores: np.ndarray) -> float:
    """The area under the ROC curve; NaN where there is one class only. targets: 0/1 [N], scores: [N]."""
    return float(weighted_aucs(targets, scores, np.ones((len(targets), 1), np.float32))[0])
