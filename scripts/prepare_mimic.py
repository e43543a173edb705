#!/usr/bin/env python3
"""From MIMIC-CXR-JPG and heatmaps of a gaze predictor to the MIMIC tree that run_pretrain.py reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets.prepare.mimic import FRONTAL, prepare_mimic
from util.cli import Parser, available_cpus, check_least
from util.errors import run_cli
from util.radiograph import add_dicom_contrast


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__ + " Damaged files are listed at the end and left out; the exit status is 1 then. "
        "An interrupted run goes on where it stopped; a second run changes nothing."
    )
    # fmt: off
    add = parser.add_argument
    add("--images", type=Path, required=True, help="root of MIMIC-CXR-JPG (or of MIMIC-CXR, DICOM), holds files/")
    add("--heatmaps", type=Path, default=None,
        help="directory, any depth, with one 8-bit PNG or NPY [height, width] per image, over all of it, "
             "of any size, the dicom_id in the file's name; without it images alone, for scripts/predict_gaze.py")
    add("--out", type=Path, required=True, help="where the tree goes")
    add("--metadata", type=Path, default=None,
        help="mimic-cxr-2.0.0-metadata.csv, .gz or not; by default the one in --images; not needed for --views all")
    add("--views", nargs="+", default=list(FRONTAL),
        help="values of ViewPosition to take, frontal ones by default; all = any")
    add("--exclude", type=Path, default=None, metavar="FILE",
        help="dicom_ids and subject_ids to leave out, one a line, such as those that an evaluation will use")
    add("--size", type=int, default=512, help="short side of the stored images, px; 0 = native")
    add_dicom_contrast(parser)
    add("--workers", type=int, default=available_cpus(), help="processes; the result does not depend on it")
    add("--overwrite", action="store_true", help="start afresh; the new tree replaces the old one in --out once it is whole")
    add("--accept_damaged", action="store_true",
        help="exit status 0, not 1, where damaged files were listed and left out")
    add("--dry_run", action="store_true", help="check and count everything but the images' pixels; write nothing")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    parsed = get_args_parser().parse_args(argv)
    check_least(parsed, 0, "size")
    args = vars(parsed)
    accepted = args.pop("accept_damaged")
    report = prepare_mimic(**args)
    done = "nothing written (--dry_run)" if args["dry_run"] else f"{args['out']} is ready"
    return report.conclude("images", done, accept_damaged=accepted)


if __name__ == "__main__":
    run_cli(main)
