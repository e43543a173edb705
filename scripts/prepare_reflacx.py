#!/usr/bin/env python3
"""From raw REFLACX (or EGD-CXR) and MIMIC-CXR's images to the tree that run_pretrain.py reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.prepare.readings import add_raw_options, prepare
from util.cli import Parser, available_cpus, check_least
from util.errors import run_cli
from util.radiograph import add_dicom_contrast


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__ + " Damaged files and readings are listed at the end and left out; the exit "
        "status is 1 then. An interrupted run goes on where it stopped; a second run changes nothing."
    )
    add_raw_options(parser)
    # fmt: off
    add = parser.add_argument
    add("--images", type=Path, required=True,
        help="root of MIMIC-CXR-JPG or of MIMIC-CXR (DICOM), any depth, both kinds may be mixed")
    add("--out", type=Path, required=True, help="where the processed tree goes")
    add("--size", type=int, default=512, help="short side of the stored images, px; 0 = native")
    add("--readings", choices=["one", "each", "merge"], default="one",
        help="of an image with several readings: the first usable by id, each as an entry of its own, or "
             "one entry with their heatmaps added")
    add("--split", choices=["all", "train", "validate", "test"], default="all",
        help="'all' is what the paper pretrains on; 'train' keeps REFLACX's validation and test images out "
             "of pretraining, so that a later evaluation on them has no leak (EGD-CXR has no splits)")
    add("--screen_filter", action="store_true",
        help="REFLACX only: leave out fixations on the screen's button, or more than half a degree outside of the "
             "image shown, as the data set's authors' example does")
    add_dicom_contrast(parser)
    add("--workers", type=int, default=available_cpus(), help="processes; the result does not depend on it")
    add("--overwrite", action="store_true", help="start afresh; the new tree replaces the old one in --out once it is whole")
    add("--accept_damaged", action="store_true",
        help="exit status 0, not 1, where damaged files were listed and left out")
    add("--dry_run", action="store_true", help="check and count everything but the pixels; write nothing")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parsed = get_args_parser().parse_args(argv)
    check_least(parsed, 0, "size")
    args = vars(parsed)
    source, accepted = args.pop("source"), args.pop("accept_damaged")
    report = prepare(**args, source=None if source == "auto" else source)
    done = "nothing written (--dry_run)" if args["dry_run"] else f"{args['out']} is ready"
    return report.conclude("readings", done, accept_damaged=accepted)


if __name__ == "__main__":
    run_cli(main)
