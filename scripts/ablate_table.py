"""Table of scripts/ablate.sh: AUC of each setting, mean over seeds with a 95% interval, and differences."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.errors import UserError, run_cli
from util.files import atomic_write
from util.tables import read_table

BLOCKS = (("AUC", "auc", "", ""), ("difference", "difference", "diff_", "+"))  # title, column, its interval, sign


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("results", nargs="+",
        help="results.csv of run_downstream.py --method probe, with weights named SETTING_sSEED; several are joined")
    parser.add_argument("--reference", default="random_unweighted", help="setting that the others are compared with")
    parser.add_argument("--min_positives", type=int, default=10,
        help="leave out labels with fewer test images with or without")
    parser.add_argument("--out", default="table.csv", help="CSV to write")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    columns = ("weights", "label", "auc", "n", "n_positive", "fraction", "study")
    results = pd.concat([read_table(Path(path), columns, text=["study"]) for path in args.results], ignore_index=True)
    for column, what in (("fraction", "shares of the labels"), ("study", "images, parts or labels")):
        if results[column].nunique() > 1:
            raise UserError(f"{', '.join(args.results)}: results of several {what}; give those of one")
    # Labels too rare to tell settings apart are no columns of the table; the mean has no count.
    fewest = results[["n_positive"]].assign(without=results["n"] - results["n_positive"]).min(axis=1)
    table = seed_table(results[~(fewest < args.min_positives)], args.reference)
    with atomic_write(args.out, "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    print(format_seed_table(table))
    print(f"mean over seeds (95% interval, Student's t); differences to {args.reference}, paired by seed")
    print(f"wrote {args.out}")
    return 0


def seed_table(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Gather runs that differ in their seed only.

    Args:
        table: of `results.csv`, where the weights are named "SETTING_sSEED, PART".
        reference: the setting that the others are compared with, seed by seed.

    Returns:
        For each label, part and setting: seeds, mean AUC with a 95% interval (Student's t over the
        seeds: training noise, for these test images), and the mean paired difference with its interval.

    Raises:
        UserError: the reference isn't among the settings.
    """
    names = table["weights"].str.extract(r"^(?P<setting>.+)_s(?P<seed>\d+), (?P<features>.+)$")
    runs = pd.concat([table[["label", "auc"]], names], axis=1).dropna()
    if reference not in set(runs["setting"]):
        raise UserError(f"--reference {reference}: not among the settings {', '.join(sorted(set(runs['setting'])))}")
    compared = runs[runs["setting"] == reference].drop(columns="setting")
    runs = runs.merge(compared, "left", ["features", "label", "seed"], suffixes=("", "_reference"))
    runs["difference"] = (runs["auc"] - runs["auc_reference"]).where(runs["setting"] != reference)
    runs = runs.iloc[runs.groupby(["features", "label"], sort=False).ngroup().argsort(kind="stable")]
    groups = runs.groupby(["features", "label", "setting"], sort=False)
    found = groups["auc"].count().rename("seeds").to_frame()
    for column, prefix in (("auc", ""), ("difference", "diff_")):
        mean = groups[column].mean()
        half = stats.t.ppf(0.975, groups[column].count() - 1) * groups[column].sem()  # NaN for a single run
        found[column], found[f"{prefix}low"], found[f"{prefix}high"] = mean, mean - half, mean + half
    return found.reset_index()


def format_seed_table(table: pd.DataFrame) -> str:
    """The table of `seed_table` as text: for each part one block of AUCs and one of differences."""
    blocks = []
    for (part, rows), (title, column, prefix, sign) in itertools.product(table.groupby("features", sort=False), BLOCKS):
        shown = rows[rows[column].notna()]
        texts = [
            f"{mean:{sign}.3f}" + f" ({low:{sign}.3f} to {high:{sign}.3f})" * bool(np.isfinite(low))
            for mean, low, high in shown[[column, f"{prefix}low", f"{prefix}high"]].to_numpy()
        ]
        wide = shown.assign(text=texts).pivot(index="setting", columns="label", values="text")
        wide = wide.loc[shown["setting"].unique(), shown["label"].unique()].rename_axis(index=None, columns=None)
        blocks.append(f"{part}, {title}\n{wide.to_string()}")
    return "\n\n".join(blocks)


if __name__ == "__main__":
    run_cli(main)
