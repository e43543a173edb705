#!/usr/bin/env python3
"""From MIMIC-CXR-JPG and heatmaps of a gaze predictor to the MIMIC tree that run_pretrain.py reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.prepare.command import preparation_parser, run_preparation
from datasets.prepare.mimic import FRONTAL, prepare_mimic
from util.errors import run_cli


def get_args_parser() -> argparse.ArgumentParser:
    parser = preparation_parser(__doc__, "files")
    # fmt: off
    add = parser.add_argument
    add("--heatmaps", type=Path, default=None,
        help="directory, any depth, with one 8-bit PNG or NPY [height, width] per image, over all of it, "
             "of any size, the dicom_id in the file's name; without it images alone, for scripts/predict_gaze.py")
    add("--metadata", type=Path, default=None,
        help="mimic-cxr-2.0.0-metadata.csv, .gz or not; by default the one in --images; not needed for --views all")
    add("--views", nargs="+", default=list(FRONTAL),
        help="values of ViewPosition to take, frontal ones by default; all = any")
    add("--exclude", type=Path, default=None, metavar="FILE",
        help="dicom_ids and subject_ids to leave out, one a line, such as those that an evaluation will use")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_preparation(get_args_parser(), argv, prepare_mimic, "images")


if __name__ == "__main__":
    run_cli(main)
