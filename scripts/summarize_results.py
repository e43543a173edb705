"""One table and one picture from the results.csv of several downstream runs.

python scripts/summarize_results.py output_dir/reproduce/downstream/*/results.csv --out output_dir/reproduce
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from downstream.figure import summary_figure
from downstream.results import MEAN, summary_table, write_text
from util.cli import Parser
from util.errors import UserError, run_cli
from util.figures import save_figure
from util.tables import read_table, to_numbers

NUMBERS = ("fraction", "seed", "low", "high", "n")
COLUMNS = ("weights", "dataset", "method", "label", "study", "note", *NUMBERS)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("results", nargs="+", help="results.csv of run_downstream.py")
    parser.add_argument("--out", required=True, help="directory of table.md and results.png")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    results = pd.concat([read_means(Path(path)) for path in args.results], ignore_index=True)
    results = results.assign(run=run_names(results))
    key = ["run", "weights", "fraction", "seed"]
    if (twice := results[results.duplicated(key)]).size:
        raise UserError(f"{twice['file'].iloc[0]}: {', '.join(map(str, twice[key].iloc[0]))} is in another file too")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(summary_table(results), out / "table.md")
    save_figure(summary_figure(results), out / "results.png")
    print(f"wrote {out / 'table.md'} and {out / 'results.png'}")
    return 0


def run_names(results: pd.DataFrame) -> pd.Series:
    """The column's title of each row: data set and method, with a file's name where these were tested on other images,
    trained on others, or judged by other labels."""
    names = results["dataset"] + " " + results["method"]
    names += results["measure"].map({"auc": "", "accuracy": " (accuracy)"})
    several = results["study"].groupby(names).transform("nunique") > 1
    return names.where(~several, names + ", " + results["file"].groupby([names, results["study"]]).transform("first"))


def read_means(path: Path) -> pd.DataFrame:
    """The rows of the mean over labels, with the measure's name and its value in columns of their own."""
    table = read_table(path, COLUMNS)
    measure = "accuracy" if "accuracy" in table else "auc"
    if measure not in table or not (means := table[table["label"] == MEAN]).size:
        raise UserError(
            f"{path}: has no column {measure!r} or no row of {MEAN!r}; give a results.csv of run_downstream.py"
        )
    numbers = to_numbers(means, [*NUMBERS, measure])
    return means.assign(**numbers, measure=measure, value=numbers[measure], file=str(path))


if __name__ == "__main__":
    run_cli(main)
