#!/usr/bin/env python
"""Make up chest images with lesions, in the layout of a data set: with simulated gaze as REFLACX, or with labels as
the RSNA challenge."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.phantom.chest import LESION_KINDS
from datasets.phantom.gaze_study import make_study
from datasets.phantom.label_study import make_rsna
from datasets.phantom.study import SUFFIXES
from util.cli import Parser, check_least, finite_float, seed_number
from util.errors import UserError, run_cli
from util.files import check_folder_place

MAKERS = {"reflacx": make_study, "rsna": make_rsna}
OF_GAZE = ("shared_images", "readers", "dwell_ratio")  # only for reflacx; None where they are not given


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    add = parser.add_argument
    add("--out", required=True, help="directory to write into: reflacx/ and mimic/, or rsna/")
    add("--layout", choices=MAKERS, default="reflacx", help="the data set whose layout is written")
    add("--n_images", type=int, default=24, help="number of images")
    add("--seed", type=seed_number, default=0, help="same seed, same study")
    add("--width", type=int, default=420, help="width of the images, px")
    add("--height", type=int, default=512, help="height of the images, px")
    add("--format", dest="image_format", choices=SUFFIXES, help="kind of image files (default: jpg; dcm for rsna)")
    add("--shared_images", type=int, help="images read by several readers, in phases 1 and 2 (default: a quarter)")
    add("--readers", type=int, help="readers of each shared image (default: 3)")
    add("--lesion_kinds", nargs="+", choices=LESION_KINDS, default=list(LESION_KINDS), help="abnormalities to draw from")
    add("--lesion_size", type=finite_float, default=1.0, help="multiplies the lesions' usual extent")
    add("--lesion_contrast", type=finite_float, default=1.0, help="multiplies the lesions' usual contrast")
    add("--normal_fraction", type=finite_float, default=0.2, help="share of images without a lesion")
    add("--dwell_ratio", type=finite_float,
        help="gaze density inside abnormal ellipses over that outside (default: 6)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_folder_place(args.out, "--out")
    check_least(args, 1, "n_images", "width", "height", "readers")
    check_least(args, 0, "shared_images")
    options = {name: value for name, value in vars(args).items() if value is not None}
    out, layout, size = options.pop("out"), options.pop("layout"), (options.pop("height"), options.pop("width"))
    for name in OF_GAZE:
        if layout == "rsna" and name in options:
            raise UserError(f"--{name} has no effect on --layout rsna; leave it out")
    try:
        study = MAKERS[layout](out, size=size, **options)
    except ValueError as error:
        raise UserError(f"cannot make this study: {error}") from error
    print(f"{len(study.truth)} images in {study.images}")
    if n_readings := sum(len(image.reading_ids) for image in study.truth):
        print(f"{n_readings} simulated readings in {study.raw}")
    return 0


if __name__ == "__main__":
    run_cli(main)
