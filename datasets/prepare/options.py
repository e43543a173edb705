"""Options of the programs that read a raw gaze data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets.prepare.readings import SOURCES
from datasets.raw.egd import DEFAULT_SIGMA
from util.cli import finite_float


def add_raw_options(parser: argparse.ArgumentParser) -> None:
    """--raw, --source, --sigma and --metadata: which data set, and how its fixations become heatmaps."""
    # fmt: off
    parser.add_argument("--raw", type=Path, required=True,
        help="root of REFLACX (holds main_data/) or of EGD-CXR (holds master_sheet.csv), or one above")
    parser.add_argument("--source", choices=["auto", *SOURCES], default="auto", help="which data set --raw holds")
    parser.add_argument("--sigma", type=finite_float, default=None,
        help="EGD-CXR only: standard deviation of a fixation's Gaussian, px of the original image; "
             f"{DEFAULT_SIGMA:g} where none is given")
    parser.add_argument("--metadata", type=Path, default=None,
        help="EGD-CXR only: MIMIC-CXR's table of metadata, which has the sizes of the original images that fixations "
             "are in pixels of (default: the one in --images)")
    # fmt: on
