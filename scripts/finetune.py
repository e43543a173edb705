"""Fine-tune a whole backbone for several findings at once; keep the epoch with the best validation AUC."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.downstream.options import add_label_arguments, read_labels
from util.cli import check_device
from util.errors import UserError, run_cli
from util.export import read_backbone
from util.finetune import Options, finetune

HELP = {
    "epochs": "epochs",
    "batch_size": "images per step",
    "lr": "learning rate of the head",
    "min_lr": "learning rate at the end",
    "warmup_epochs": "epochs of linear warm-up",
    "weight_decay": "weight decay",
    "layer_decay": "learning rate of a block over that of the next one",
    "drop_path": "stochastic depth of the last block",
    "pool": "what the head sees: avg (mean of the patches) or token (cls)",
    "min_crop_ratio": "smallest area of a random crop; 1: hardly cropped",
    "flip": "probability of a horizontal flip",
    "min_positives": "leave out findings with fewer training images with or without it",
    "bootstrap": "draws of the bootstrap over subjects",
    "seed": "of the head, crops, order and splits",
    "num_workers": "processes that read images",
    "device": "cpu or cuda",
}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("backbone", help="export of export_backbone.py, or any checkpoint it takes")
    add_label_arguments(parser)
    for option in fields(Options):
        parser.add_argument(
            f"--{option.name}", type=type(option.default), default=option.default, help=HELP[option.name]
        )
    parser.add_argument("--img_size", type=int, help="input size in px (default: as trained)")
    parser.add_argument(
        "--output_dir", default="output_dir/finetune", help="folder for best.pth, log.txt, auc.csv"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    options = Options(**{option.name: getattr(args, option.name) for option in fields(Options)})
    if options.pool not in ("avg", "token"):
        raise UserError(f"--pool {options.pool}: expected avg or token")
    if min(options.epochs, options.batch_size) < 1:
        raise UserError("--epochs and --batch_size must be at least 1")
    check_device(options.device)
    images = read_labels(args)
    backbone = read_backbone(args.backbone, img_size=args.img_size)
    table = finetune(backbone, images, Path(args.output_dir), options)
    tested = (
        "validation images (they chose the epoch, so this is optimistic)"
        if images.splits is None
        else "test images"
    )
    print(f"best epoch on the {tested}:\n{table.to_string(index=False, float_format='%.3f')}")
    print(f"wrote {args.output_dir}/best.pth, log.txt and auc.csv")
    return 0


if __name__ == "__main__":
    run_cli(main)
