"""What results.csv says is what scikit-learn says of the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from read_labelled import make_labelled
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from downstream.results import Outcome, markdown_table, results_table


def outcome_of(targets: np.ndarray, scores: np.ndarray, task: str = "multilabel", **options) -> Outcome:
    images = make_labelled(targets, "test", task=task)
    run = {"weights": "a", "dataset": "x", "method": "linear", "fraction": 1.0, "seed": 43}
    return Outcome(run, images, scores.astype(np.float32), **options)


def test_accuracies_of_classes_are_those_of_scikit_learn():
    rng, n = np.random.default_rng(0), 40
    true, scores = rng.integers(0, 3, n), rng.random((n, 3))
    table = results_table([outcome_of(np.eye(3)[true], scores, "multiclass", draws=20)])
    told = scores.argmax(1)
    expected = [*recall_score(true, told, average=None), accuracy_score(true, told)]
    assert table["accuracy"].tolist() == pytest.approx(expected)
    assert table["n_positive"].tolist()[:3] == np.bincount(true).tolist() and set(table["n"]) == {n}
    assert table["low"].isna().all()  # fewer than 200 draws give no interval


@pytest.mark.parametrize(
    ("positives", "label", "mean"), [(1, (0, 0), (0, 0)), (2, (800, 900), (1000, 1000)), (5, (990, 1000), (1000, 1000))]
)
def test_a_draw_counts_by_the_labels_that_it_can_judge(positives, label, mean):
    """14 rare labels: hardly any draw has both kinds of all of them. A single positive gives no interval."""
    targets = np.zeros((100, 14))
    for j in range(14):
        targets[positives * j : positives * (j + 1), j] = 1
    outcome = outcome_of(targets, np.random.default_rng(0).random((100, 14)))
    table = results_table([outcome])
    for name, (least, most) in (("L0", label), ("mean", mean)):
        row = table.set_index("label").loc[name]
        assert least <= row["draws"] <= most
        assert row["low"] < row["auc"] < row["high"] if least else np.isnan(row["low"])
    (row,) = (line for line in markdown_table([outcome], table, []).splitlines() if line.startswith("| a"))
    assert (" to " in row) == (positives > 1)


def test_a_label_of_too_few_images_is_left_out_of_the_mean():
    targets = np.zeros((100, 2))
    targets[:50, 0] = targets[:3, 1] = 1
    outcome = outcome_of(targets, np.random.default_rng(0).random((100, 2)), min_count=5)
    auc = results_table([outcome]).set_index("label")["auc"]
    assert auc["mean"] == auc["L0"] != auc["L1"]


def test_the_auc_of_folds_is_the_mean_of_theirs():
    """Scores of different models are not compared."""
    rng, folds = np.random.default_rng(0), np.arange(60) % 3
    true, scores = rng.integers(0, 2, 60), rng.random(60) + folds
    table = results_table([outcome_of(true[:, None], scores[:, None] / 4, folds=folds)])
    expected = np.mean([roc_auc_score(true[folds == fold], scores[folds == fold]) for fold in range(3)])
    assert table["auc"].tolist() == pytest.approx([expected] * 2)
