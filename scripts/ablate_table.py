"""Table of scripts/ablate.sh: AUC of each setting, mean over seeds with a 95% interval, and differences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from downstream.ablation import format_seed_table, seed_table
from downstream.ablation_figure import ablation_figure
from util.cli import Parser
from util.errors import UserError, run_cli
from util.figures import save_figure
from util.files import atomic_write
from util.tables import read_table


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("results", nargs="+",
        help="results.csv of run_downstream.py --method probe, with weights named SETTING_sSEED; several are joined")
    parser.add_argument("--reference", default="random_unweighted", help="setting that the others are compared with")
    parser.add_argument("--min_positives", type=int, default=10,
        help="leave out labels with fewer test images with or without")
    parser.add_argument("--out", default="table.csv", help="CSV to write, and a PNG of the same name")
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
    picture = Path(args.out).with_suffix(".png")
    save_figure(ablation_figure(table, args.reference), picture)
    print(format_seed_table(table))
    print(f"mean over seeds (95% interval, Student's t); differences to {args.reference}, paired by seed")
    print(f"wrote {args.out} and {picture}")
    return 0


if __name__ == "__main__":
    run_cli(main)
