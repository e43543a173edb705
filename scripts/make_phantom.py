#!/usr/bin/env python
"""Make up chest images with lesions, in the layout of a data set: with simulated gaze as REFLACX, or with labels as
the RSNA challenge or ChestX-ray14."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.phantom.chest import LESION_KINDS
from datasets.phantom.labelled import Chests
from datasets.phantom.nih import make_nih
from datasets.phantom.real import add_real_radiograph
from datasets.phantom.reflacx import make_study
from datasets.phantom.rsna import make_rsna
from datasets.phantom.study import PhantomStudy
from util.cli import Parser, finite_float, seed_number
from util.errors import UserError, run_cli
from util.files import check_folder_place

LAYOUTS = ("reflacx", "rsna", "nih")
# Options that only some layouts have; None where they are not given.
ONLY_FOR = {
    "format": ("reflacx", "rsna"),
    "shared_images": ("reflacx",),
    "readers": ("reflacx",),
    "dwell_ratio": ("reflacx",),
    "real_radiograph": ("reflacx",),
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("--out", required=True,
        help="directory to write into: reflacx/ and mimic/, or rsna/ or nih/")
    parser.add_argument("--layout", choices=LAYOUTS, default="reflacx", help="of which data set")
    parser.add_argument("--n_images", type=int, default=24, help="number of images")
    parser.add_argument("--seed", type=seed_number, default=0, help="same seed, same study")
    parser.add_argument("--width", type=int, default=420, help="width of the images, px")
    parser.add_argument("--height", type=int, default=512, help="height of the images, px")
    parser.add_argument("--format", choices=("jpg", "dcm", "mixed"),
        help="kind of image files; without it jpg, for rsna dcm (nih has png)")
    parser.add_argument("--shared_images", type=int, default=None,
        help="images read by several readers, in phases 1 and 2; a quarter if not given")
    parser.add_argument("--readers", type=int, help="readers of each shared image; 3 if not given")
    parser.add_argument("--lesion_kinds", nargs="+", choices=LESION_KINDS, default=list(LESION_KINDS),
        help="abnormalities to draw from")
    parser.add_argument("--lesion_size", type=finite_float, default=1.0, help="multiplies the lesions' usual extent")
    parser.add_argument("--lesion_contrast", type=finite_float, default=1.0,
        help="multiplies the lesions' usual contrast")
    parser.add_argument("--normal_fraction", type=finite_float, default=0.2, help="share of images without a lesion")
    parser.add_argument("--dwell_ratio", type=finite_float,
        help="gaze density inside abnormal ellipses over that outside; 6 if not given")
    parser.add_argument("--real_radiograph", action="store_true", default=None,
        help="add the one real film that pip's pydicom-data brings, with a simulated reading")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_folder_place(args.out, "--out")
    for option, layouts in ONLY_FOR.items():
        if getattr(args, option) is not None and args.layout not in layouts:
            raise UserError(f"--{option} has no effect on --layout {args.layout}; leave it out")
    try:
        study = make(args)
        if args.real_radiograph:
            add_real_radiograph(study)
    except ValueError as error:
        raise UserError(f"cannot make this study: {error}") from error
    print(f"{len(study.truth)} images in {study.images}")
    if n_readings := sum(len(image.reading_ids) for image in study.truth):
        print(f"{n_readings} simulated readings in {study.raw}")
    return 0


def make(args: argparse.Namespace) -> PhantomStudy:
    """Write the study of a layout. Raises ValueError for options out of range."""
    layout = args.layout
    lesions = {
        "lesion_kinds": args.lesion_kinds,
        "lesion_size": args.lesion_size,
        "lesion_contrast": args.lesion_contrast,
        "normal_fraction": args.normal_fraction,
    }
    size = (args.height, args.width)
    if layout == "reflacx":
        given = {"image_format": args.format, "dwell_ratio": args.dwell_ratio}
        given |= {"shared_images": args.shared_images, "readers": args.readers}
        given = {name: value for name, value in given.items() if value is not None}
        return make_study(args.out, args.n_images, args.seed, size, **lesions, **given)
    chests = Chests(args.n_images, args.seed, size, **lesions)
    if layout == "rsna":
        return make_rsna(args.out, chests, image_format=args.format or "dcm")
    return make_nih(args.out, chests)


if __name__ == "__main__":
    run_cli(main)
