"""What results.csv says of classes is what scikit-learn says of the same scores."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, recall_score

from util.results import MULTICLASS, Outcome, results_table


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
