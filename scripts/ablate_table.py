"""Table of scripts/ablate.sh: AUC of each setting, mean over seeds with a 95% interval, and differences."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import run_cli
from util.files import atomic_write
from util.probe import format_seed_table, seed_table
from util.tables import read_table


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("probe", help="probe.csv of linear_probe.py, with backbones named SETTING_sSEED")
    parser.add_argument(
        "--reference", default="random_unweighted", help="setting that the others are compared with"
    )
    parser.add_argument("--out", default="table.csv", help="CSV to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    columns = ("finding", "features", "auc")
    table = seed_table(read_table(Path(args.probe), columns), args.reference)
    with atomic_write(args.out, "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    print(format_seed_table(table))
    print(f"mean over seeds (95% interval, Student's t); differences to {args.reference}, paired by seed")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
