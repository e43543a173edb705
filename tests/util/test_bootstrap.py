"""AUCs and intervals against plain versions, with whole subjects drawn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from util import bootstrap
from util.bootstrap import auc, bootstrap_aucs, bootstrap_means, interval, weighted_aucs


@given(st.integers(2, 40), st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_auc_is_sklearns_under_any_counts(n, seed, distinct):
    rng = np.random.default_rng(seed)
    targets, scores = rng.integers(0, 2, n), rng.integers(0, distinct, n) / 7
    counts = rng.integers(0, 3, (n, 4)).astype(np.float32)
    for value, count in zip(weighted_aucs(targets, scores, counts), counts.astype(int).T, strict=True):
        if len(np.unique(targets[count > 0])) < 2:
            assert np.isnan(value)
        else:
            drawn = np.repeat(targets, count), np.repeat(scores, count)
            assert value == pytest.approx(roc_auc_score(*drawn), abs=1e-12)
    if len(np.unique(targets)) == 2:
        assert auc(targets, scores) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)


def drawn_images(subjects, draws, seed):
    """The images of the data and of each draw of as many subjects as there are."""
    names, rng = np.unique(subjects), np.random.default_rng(seed)
    yield np.arange(len(subjects))
    for _ in range(draws):
        chosen = names[rng.integers(0, len(names), len(names))]
        yield np.concatenate([np.flatnonzero(subjects == name) for name in chosen])


def test_draws_are_those_of_whole_subjects_whatever_the_chunk(monkeypatch):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (60, 2)).astype(np.float32)
    targets[rng.random((60, 2)) < 0.2] = np.nan
    scores, subjects = rng.random((60, 2)), rng.integers(0, 20, 60).astype(str)
    aucs = bootstrap_aucs(targets, scores, subjects, draws=30, seed=3)
    means = bootstrap_means(targets, subjects, draws=30, seed=3)
    for auc_row, mean_row, drawn in zip(aucs, means, drawn_images(subjects, 30, 3), strict=True):
        for j in range(2):
            known = drawn[~np.isnan(targets[drawn, j])]
            assert auc_row[j] == pytest.approx(roc_auc_score(targets[known, j], scores[known, j]))
            assert mean_row[j] == pytest.approx(targets[known, j].mean())
    monkeypatch.setattr(bootstrap, "CHUNK_BYTES", 1)
    assert np.array_equal(aucs, bootstrap_aucs(targets, scores, subjects, draws=30, seed=3))
    assert len(bootstrap_aucs(targets, scores, subjects, draws=0, seed=3)) == 1


def test_a_single_subject_has_no_interval():
    """All its draws are the same; an interval of no width would claim certainty."""
    labels, scores, subject = (np.array([[0.0], [1], [1]]), np.array([[0.2], [0.1], [0.9]]), np.array(["a"] * 3))
    for found in (
        bootstrap_aucs(labels, scores, subject, draws=300, seed=0),
        bootstrap_means(scores, subject, draws=300, seed=0),
    ):
        value, low, high = interval(found[:, 0])
        assert np.isfinite(value) and np.isnan(low) and np.isnan(high)


def test_aucs_of_folds_are_not_pooled():
    """Scores of different models say nothing about one another: here each fold is right, the pool is not."""
    targets, folds = np.array([[0.0], [1], [0], [1], [1]]), np.array([0, 0, 1, 1, 2])
    scores = np.array([[0.7], [0.8], [0.1], [0.2], [0.9]])
    found = bootstrap_aucs(targets, scores, np.arange(5), folds, draws=300, seed=0)
    assert found[0] == 1 and np.nanmin(found) == 1


def test_fewer_than_200_draws_give_no_interval():
    values = np.r_[0.5, np.linspace(0, 1, 200)]
    assert interval(values) == pytest.approx((0.5, 0.025, 0.975))
    assert np.isnan(interval(np.r_[values[:-1], np.nan])[1:]).all()
