"""Logistic regression on frozen features, which needs no tuning: one fit per label."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from downstream.data.partition import Rows
from downstream.data.splits import draw_folds
from util.bootstrap import auc

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, chosen on training images
STRENGTH_FOLDS = 3
PIXEL_COMPONENTS = 64


def standardise(features: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Network features [N, D], each scaled by the training rows."""
    return StandardScaler().fit(features[train]).transform(features)


def principal_components(pixels: np.ndarray, train: np.ndarray, seed: int) -> np.ndarray:
    """Gray values [N, P] as `PIXEL_COMPONENTS` components fitted on the training rows.

    They keep their proportions: equal scales would blow up the last ones, which are noise.
    """
    n = max(1, min(PIXEL_COMPONENTS, len(train) - 1, pixels.shape[1]))
    if (pixels[train] == pixels[train[0]]).all():  # the same picture again and again has no components
        return np.zeros((len(pixels), n), pixels.dtype)
    values = PCA(n, random_state=seed).fit(pixels[train]).transform(pixels)
    return values / values[train].std()


def probe_scores(
    values: np.ndarray,
    labels: np.ndarray,
    subjects: np.ndarray,
    rows: Rows,
    *,
    seed: int,
    say: Callable[[str], None],
    name: str,
) -> np.ndarray:
    """Probability of one label for the test rows, of the fit on its known training rows: float64 [len(rows.test)].

    The strength is the one with the best AUC on the validation rows, or, if there are none, in grouped
    folds of the training rows. If the training rows have no image with the label, or none without, all scores are 0.5,
    with a message.

    Args:
        values: [N, D] of all images, scaled.
        labels: [N], NaN where unknown.
        name: of the label, for the message.
    """
    train, valid = (part[~np.isnan(labels[part])] for part in (rows.train, rows.valid))
    if len(np.unique(labels[train])) < 2:
        kind = "without" if (labels[train] == 1).all() and len(train) else "with"
        say(f"{name}: no image {kind} it among {len(train)} to train on; all its scores are 0.5")
        return np.full(len(rows.test), 0.5)
    with threadpool_limits(1):  # the problems are small; more threads only get into each other's way
        if len(np.unique(labels[valid])) == 2:
            strength = best_strength(values, labels, [(train, valid)])
        else:
            folds = draw_folds(labels[train], subjects[train], STRENGTH_FOLDS, seed)
            parts = [(train[folds != k], train[folds == k]) for k in range(STRENGTH_FOLDS)]
            strength = best_strength(values, labels, parts)
        return _fit(values[train], labels[train], strength).predict_proba(values[rows.test])[:, 1]


def best_strength(values: np.ndarray, labels: np.ndarray, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """C with the largest sum of AUCs on the second rows of `parts`, of fits on the first ones, which need both kinds of
    images; the smallest C if one of them lacks a kind."""
    if any(len(np.unique(labels[inner])) < 2 for inner, _ in parts):
        return STRENGTHS[0]
    parts = [(inner, outer) for inner, outer in parts if len(np.unique(labels[outer])) == 2]

    def value(strength: float) -> float:
        return sum(
            auc(labels[outer], _fit(values[inner], labels[inner], strength).decision_function(values[outer]))
            for inner, outer in parts
        )

    return max(STRENGTHS, key=value)


def _fit(values: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, max_iter=1000).fit(values, labels)
