#!/usr/bin/env python3
"""Where radiologists look, from a raw gaze data set: sizes of the marked abnormalities, gaze density on them
over elsewhere, and how many patches the gaze makes significant. Writes CSV tables and one figure."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.analysis.measure import analyze
from datasets.raw.sources import add_raw_options
from util.cli import Parser, available_cpus, check_least, finite_float
from util.errors import run_cli
from util.files import check_folder_place


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__ + " Damaged readings are listed and left out; the exit status is 1 then.")
    add_raw_options(parser)
    # fmt: off
    add = parser.add_argument
    add("--images", type=Path, default=None,
        help="root of MIMIC-CXR-JPG or MIMIC-CXR, for the examples")
    add("--out", type=Path, required=True, help="directory for the tables and gaze_analysis.png")
    add("--split", choices=["all", "train", "validate", "test"], default="all", help="readings to use")
    add("--size", type=int, default=256, help="short side of the heatmaps, px; 0: the image's own")
    add("--size_thresholds", type=finite_float, nargs=2, default=[0.01, 0.05], metavar=("MEDIUM", "LARGE"),
        help="shares of the image's area from which an abnormality is medium, and large")
    add("--min_certainty", type=int, choices=range(1, 6), default=1, help="least certainty of the ellipses used")
    add("--examples", type=int, default=3, help="images to show")
    add("--workers", type=int, default=available_cpus(), help="processes; the result does not depend on it")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_least(args, 0, "size", "examples")
    options = vars(args)
    out = options.pop("out")
    check_folder_place(out, "--out")
    analysis = analyze(**options)
    analysis.write(out)
    print(f"{analysis}\nwritten to {out}")
    if faults := [exclusion for exclusion in analysis.exclusions if exclusion.is_fault]:
        print(f"{len(faults)} readings left out for damaged input, listed above", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    run_cli(main)
