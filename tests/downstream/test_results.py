"""What results.csv says of classes is what scikit-learn says of the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from downstream.results import MULTICLASS, Outcome, markdown_table, results_table


def test_accuracies_of_classes_are_those_of_scikit_learn():
    rng, n = np.random.default_rng(0), 40
    true, scores = rng.integers(0, 3, n), rng.random((n, 3)).astype(np.float32)
    names = [f"{i}" for i in range(n)]
    outcome = Outcome(
        "a",
        "covidx",
        "linear",
        1.0,
        43,
        MULTICLASS,
        ["x", "y", "z"],
        names,
        np.array(names),
        np.eye(3, dtype=np.float32)[true],
        scores,
        draws=20,
    )
    table = results_table([outcome])
    told = scores.argmax(1)
    expected = [*recall_score(true, told, average=None), accuracy_score(true, told)]
    assert table["accuracy"].tolist() == pytest.approx(expected)
    assert table["n_positive"].tolist()[:3] == np.bincount(true).tolist() and set(table["n"]) == {n}


@pytest.mark.parametrize(
    ("positives", "label", "mean"), [(1, (0, 0), (0, 0)), (2, (800, 900), (1000, 1000)), (5, (990, 1000), (1000, 1000))]
)
def test_a_draw_counts_by_the_labels_that_it_can_judge(positives, label, mean):
    """14 rare labels: hardly any draw has both kinds of all of them. A single positive gives no interval."""
    rng, n, c = np.random.default_rng(0), 100, 14
    targets = np.zeros((n, c), np.float32)
    for j in range(c):
        targets[positives * j : positives * (j + 1), j] = 1
    names, scores = [str(i) for i in range(n)], rng.random((n, c)).astype(np.float32)
    head = ["a", "nih", "linear", 1.0, 43, "multilabel", [f"l{j}" for j in range(c)], names, np.array(names)]
    outcome = Outcome(*head, targets, scores)
    table = results_table([outcome]).set_index("label")
    for name, (least, most) in (("l0", label), ("mean", mean)):
        row = table.loc[name]
        assert least <= row["draws"] <= most
        assert row["low"] < row["auc"] < row["high"] if least else np.isnan(row["low"])
    (row,) = (line for line in markdown_table([outcome], []).splitlines() if line.startswith("| a"))
    assert (" to " in row) == (positives > 1)


def test_the_auc_of_folds_is_the_mean_of_theirs():
    """Scores of different models are not compared."""
    rng, folds = np.random.default_rng(0), np.arange(60) % 3
    true, names = rng.integers(0, 2, 60), [str(i) for i in range(60)]
    scores = (rng.random(60) + folds).astype(np.float32) / 4
    head = ["a", "x", "linear", 1.0, 43, "multilabel", ["y"], names, np.array(names)]
    table = results_table([Outcome(*head, true[:, None].astype(np.float32), scores[:, None], folds=folds)])
    expected = np.mean([roc_auc_score(true[folds == fold], scores[folds == fold]) for fold in range(3)])
    assert table["auc"].tolist() == pytest.approx([expected] * 2)
