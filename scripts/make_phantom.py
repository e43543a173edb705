#!/usr/bin/env python
"""Make up a study: chest images with lesions and simulated gaze in the raw layout of REFLACX or EGD-CXR."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.phantom.chest import LESION_KINDS
from datasets.phantom.egd import make_egd
from datasets.phantom.faults import FAULTS
from datasets.phantom.real import add_real_radiograph
from datasets.phantom.reflacx import make_study
from util.errors import UserError, run_cli


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out", required=True, help="directory to write reflacx/ (or egd-cxr/) and mimic/ into"
    )
    parser.add_argument("--n_images", type=int, default=24, help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same study")
    parser.add_argument("--width", type=int, default=420, help="width of the images, px")
    parser.add_argument("--height", type=int, default=512, help="height of the images, px")
    parser.add_argument(
        "--format", choices=("jpg", "dcm", "mixed"), default="jpg", help="kind of image files"
    )
    parser.add_argument(
        "--shared_images",
        type=int,
        default=None,
        help="images read by several readers, in phases 1 and 2; a quarter if not given",
    )
    parser.add_argument("--readers", type=int, default=3, help="readers of each shared image")
    parser.add_argument(
        "--lesion_kinds",
        nargs="+",
        choices=LESION_KINDS,
        default=list(LESION_KINDS),
        help="abnormalities to draw from",
    )
    parser.add_argument("--lesion_size", type=float, default=1.0, help="multiplies the lesions' usual extent")
    parser.add_argument(
        "--lesion_contrast", type=float, default=1.0, help="multiplies the lesions' usual contrast"
    )
    parser.add_argument("--normal_fraction", type=float, default=0.2, help="share of images without a lesion")
    parser.add_argument(
        "--dwell_ratio",
        type=float,
        default=6.0,
        help="gaze density inside abnormal ellipses over that outside",
    )
    parser.add_argument(
        "--faults", nargs="*", choices=FAULTS, default=[], help="damage to plant, a reading each"
    )
    parser.add_argument(
        "--real_radiograph",
        action="store_true",
        help="add the one real film that pip's pydicom-data brings, with a simulated reading",
    )
    parser.add_argument("--egd", action="store_true", help="EGD-CXR's layout instead: one reading per image")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    options = {
        "root": args.out,
        "n_images": args.n_images,
        "seed": args.seed,
        "size": (args.height, args.width),
        "image_format": args.format,
        "lesion_kinds": args.lesion_kinds,
        "lesion_size": args.lesion_size,
        "lesion_contrast": args.lesion_contrast,
        "normal_fraction": args.normal_fraction,
        "dwell_ratio": args.dwell_ratio,
    }
    try:
        if args.egd:
            study = make_egd(**options)
        else:
            study = make_study(
                **options, shared_images=args.shared_images, readers=args.readers, faults=args.faults
            )
        if args.real_radiograph:
            add_real_radiograph(study)
    except ValueError as error:
        raise UserError(f"cannot make this study: {error}") from error
    n_readings = sum(len(image.reading_ids) for image in study.truth)
    print(f"{len(study.truth)} images in {study.images}\n{n_readings} simulated readings in {study.raw}")
    for fault, reading in study.faults.items():
        print(f"planted: {fault} in {reading}")
    return 0


if __name__ == "__main__":
    run_cli(main)
