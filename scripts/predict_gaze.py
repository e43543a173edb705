#!/usr/bin/env python3
"""Heatmaps by a gaze predictor of run_gaze.py: fill a prepared tree in place, or write them for loose files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from downstream.encoders import digest_of
from gaze.fill import Predictor, fill_tree, predict_files
from gaze.model import GazeNet, load_gaze_net
from util.cli import Parser, available_cpus, check_device, check_least
from util.download import local_file
from util.errors import UserError, run_cli
from util.precision import set_tf32
from util.radiograph import add_dicom_contrast


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__ + " Damaged images are listed and left out; the exit status is 1 then. An interrupted run "
        "continues where it stopped; a second run changes nothing."
    )
    # fmt: off
    add = parser.add_argument
    add("--weights", required=True, help="best.pth of run_gaze.py, a file or an http(s) address")
    add("--tree", type=Path, help="tree of images alone, made by scripts/prepare_mimic.py; is filled in place")
    add("--real", type=Path, nargs="+", default=[],
        help="processed trees with real gaze: their images keep it (several readings: the mean map)")
    add("--images", type=Path, help="instead of --tree: a directory of PNG, JPG and DICOM files, any depth")
    add("--out", type=Path, help="where the heatmaps of --images go, 8-bit PNG of the images' sizes and names")
    add_dicom_contrast(parser)
    add("--batch_size", type=int, default=32, help="images at a time; the last digit of a map may depend on it")
    add("--workers", type=int, default=available_cpus(), help="threads that read and write")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, or cuda or cuda:N")
    add("--overwrite", action="store_true", help="replace what another predictor made")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_least(args, 1, "batch_size", "workers")
    if any([args.images, args.out] if args.tree else [not args.images, not args.out, args.real]):
        raise UserError("pass either --tree, which may have --real, or --images and --out")
    predictor = as_predictor(load_gaze_net(local_file(args.weights)).to(check_device(args.device)))
    how = {"batch_size": args.batch_size, "workers": args.workers, "overwrite": args.overwrite}
    if args.tree is not None:
        report = fill_tree(args.tree, predictor, real=args.real, **how)
    else:
        report = predict_files(args.images, args.out, predictor, dicom_contrast=args.dicom_contrast, **how)
    return report.conclude("images", f"{args.tree or args.out} is ready")


def as_predictor(model: GazeNet) -> Predictor:
    device = model.log_prior.device
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        set_tf32(False)

    @torch.inference_mode()
    def maps(images: torch.Tensor) -> torch.Tensor:
        return model(images.to(device)).exp().cpu()

    return Predictor(maps, model.input_size, digest_of(model)[:16])


if __name__ == "__main__":
    run_cli(main)
