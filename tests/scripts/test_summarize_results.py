"""scripts/summarize_results.py: every number of several results.csv stands in one table and one picture."""

import numpy as np
import pandas as pd
import pytest
import summarize_results
from PIL import Image

from util.errors import UserError

COLUMNS = ["weights", "dataset", "method", "fraction", "seed", "label", "auc", "low", "high", "n", "n_positive"]


def results(path, dataset, fractions=(0.1, 1.0), measure="auc", names=("ours", "random"), study="a", note=""):
    rng = np.random.default_rng(len(dataset))
    rows = [
        [name, dataset, "linear", fraction, seed, label, rng.uniform(0.5, 0.9), 0.4, 0.95, 120, 30]
        for name in names
        for fraction in fractions
        for seed in (43, 44, 45)
        for label in ("Pneumonia", "mean")
    ]
    table = pd.DataFrame(rows, columns=COLUMNS).rename(columns={"auc": measure})
    table = table.assign(study=study, note=note)
    path.mkdir(parents=True)
    table.to_csv(path / "results.csv", index=False)
    return path / "results.csv", table


def test_table_and_picture(tmp_path):
    first, rsna = results(tmp_path / "a b", "rsna")
    second, covidx = results(tmp_path / "b", "covidx", fractions=(1.0,), measure="accuracy", names=("ours",))
    out = tmp_path / "out"
    assert summarize_results.main([str(first), str(second), "--out", str(out)]) == 0
    lines = (out / "table.md").read_text().splitlines()
    head, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert head == ["weights", "labels used", "rsna linear", "covidx linear (accuracy)"]
    for weights, used, auc, accuracy in rows[1:]:
        share = float(used.rstrip("%")) / 100
        for table, column, cell in ((rsna, "auc", auc), (covidx, "accuracy", accuracy)):
            own = table[(table["weights"] == weights) & np.isclose(table["fraction"], share)]
            own = 100 * own.loc[own["label"] == "mean", column]
            assert cell == (f"{own.mean():.2f} ± {own.std():.2f}" if len(own) else "")
    assert len(rows) == 1 + 4
    assert Image.open(out / "results.png").size[0] > 1000


def test_runs_of_other_images_parts_or_labels_have_columns_of_their_own(tmp_path):
    note = "warning: 3 of 120 test subjects were in the pretraining of ours"
    files = [
        results(tmp_path / name, "rsna", names=[weights], study=study, note=note * (weights == "ours"))[0]
        for name, weights, study in (("a", "ours", "1"), ("b", "ours", "2"), ("c", "random", "1"))
    ]
    assert summarize_results.main([*map(str, files), "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line for line in lines if note in line] == [f"rsna linear, {file}: {note}." for file in files[:2]]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert head[2:] == [f"rsna linear, {file}" for file in files[:2]]
    assert [row[0] for row in rows if row[3]] == ["ours", "ours"] and all(row[2] for row in rows) and len(rows) == 4


def test_what_is_refused(tmp_path):
    path, table = results(tmp_path / "a", "rsna")
    with pytest.raises(UserError, match="43 is in another file too"):
        summarize_results.main([str(path), str(path), "--out", str(tmp_path)])
    table.drop(columns="auc").to_csv(path, index=False)
    for other, message in ((path, "no column 'auc'"), (tmp_path / "none.csv", "missing")):
        with pytest.raises(UserError, match=message):
            summarize_results.main([str(other), "--out", str(tmp_path)])
