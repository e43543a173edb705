#!/usr/bin/env python3
"""From raw REFLACX (or EGD-CXR) and MIMIC-CXR's images to the tree that run_pretrain.py reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.prepare.command import preparation_parser, run_preparation
from datasets.prepare.readings import prepare
from datasets.raw.sources import add_raw_options
from util.errors import run_cli


def get_args_parser() -> argparse.ArgumentParser:
    parser = preparation_parser(__doc__, "files and readings")
    add_raw_options(parser)
    # fmt: off
    add = parser.add_argument
    add("--readings", choices=["one", "each", "merge"], default="one",
        help="for an image with several readings: the first usable by id, each as an entry of its own, or "
             "one entry with their heatmaps added")
    add("--split", choices=["all", "train", "validate", "test"], default="all",
        help="'all' is what the paper pretrains on; 'train' keeps REFLACX's validation and test images out "
             "of pretraining, so that a later evaluation on them has no leak (EGD-CXR has no splits)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_preparation(get_args_parser(), argv, prepare, "readings")


if __name__ == "__main__":
    run_cli(main)
