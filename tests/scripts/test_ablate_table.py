"""Settings of an ablation compared seed by seed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scripts.ablate_table import format_seed_table, main, seed_table
from util.errors import UserError

AUCS = {"random_unweighted": [0.6, 0.7, 0.8], "attention_weighted": [0.7, 0.75, 0.95]}


def results() -> pd.DataFrame:
    rows = [
        ["Mass", f"{name}_s{seed}, cls", auc, 50, 20] for name, runs in AUCS.items() for seed, auc in enumerate(runs)
    ]
    rows += [["Mass", "pixels", 0.5, 50, 20], ["Rare", "random_unweighted_s0, cls", 0.9, 50, 2]]
    return pd.DataFrame(rows, columns=["label", "weights", "auc", "n", "n_positive"])


def test_seed_table_pairs_runs_by_seed():
    table = seed_table(results().iloc[:-1], "random_unweighted").set_index("setting")
    half = 4.302653 * np.std([0.7, 0.75, 0.95], ddof=1) / np.sqrt(3)  # t quantile of 2 degrees of freedom
    row = table.loc["attention_weighted"]
    assert (row["auc"], row["high"] - row["auc"], row["seeds"]) == pytest.approx((0.8, half, 3))
    assert row["difference"] == pytest.approx(0.1)  # of 0.1, 0.05, 0.15
    assert row["diff_high"] - 0.1 == pytest.approx(4.302653 * 0.05 / np.sqrt(3))
    text = format_seed_table(table.reset_index())
    assert "+0.100 (-0.024 to +0.224)" in text and "0.700 (" in text
    with pytest.raises(UserError, match="--reference other"):
        seed_table(results(), "other")


def test_command_leaves_out_rare_labels(tmp_path, capsys):
    table = results()
    table.loc[len(table)] = ["mean", "random_unweighted_s0, cls", 0.7, 50, np.nan]
    table = table.assign(fraction=1.0, study="a")
    table.to_csv(tmp_path / "results.csv", index=False)
    assert main([str(tmp_path / "results.csv"), "--out", str(tmp_path / "table.csv")]) == 0
    assert set(pd.read_csv(tmp_path / "table.csv")["label"]) == {"Mass", "mean"}
    assert "Rare" not in capsys.readouterr().out
    for column in ("fraction", "study"):
        table.assign(**{column: "0.5"}).to_csv(tmp_path / "other.csv", index=False)
        with pytest.raises(UserError, match="other.csv: results of several"):
            main([str(tmp_path / name) for name in ("results.csv", "other.csv")])
