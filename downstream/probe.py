"""Logistic regression on frozen features, which needs no tuning: one fit per label."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

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
    train: np.ndarray,
    valid: np.ndarray,
    test: np.ndarray,
    *,
    seed: int,
    say: Callable[[str], None],
    name: str,
) -> np.ndarray:
    """Probability of one label for the test rows, of the fit on its known training rows: float64 [len(test)].

    The strength is the one with the best AUC on the validation rows, or, where there are none, in grouped
    folds of the training rows. Without both kinds to train on all scores are 0.5, which is said.

    Args:
        values: [N, D] of all images, scaled.
        labels: [N], NaN where unknown.
        name: of the label, for what is said.
    """
    train, valid = (rows[~np.isnan(labels[rows])] for rows in (train, valid))
    if len(np.unique(labels[train])) < 2:
        kind = "without" if (labels[train] == 1).all() and len(train) else "with"
        say(f"{name}: no image {kind} it among {len(train)} to train on; all its scores are 0.5")
        return np.full(len(test), 0.5)
    with threadpool_limits(1):  # the problems are small; more threads only get into each other's way
        if len(np.unique(labels[valid])) == 2:
            chosen = max(
                STRENGTHS,
                key=lambda strength: auc(
                    labels[valid], _fit(values[train], labels[train], strength).decision_function(values[valid])
                ),
            )
        else:
            chosen = choose_strength(values, labels, subjects, train, seed)
        return _fit(values[train], labels[train], chosen).predict_proba(values[test])[:, 1]


def choose_strength(values: np.ndarray, labels: np.ndarray, subjects: np.ndarray, rows: np.ndarray, seed: int) -> float:
    """C with the best mean of AUCs in three grouped folds of `rows`; the smallest if they are too few."""
    folds = draw_folds(labels[rows], subjects[rows], STRENGTH_FOLDS, seed)
    parts = [(rows[folds != k], rows[folds == k]) for k in range(STRENGTH_FOLDS)]
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
