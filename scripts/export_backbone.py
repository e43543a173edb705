"""Export the encoder of a checkpoint: for timm, as Hugging Face-style folder, for the cxr-eval client."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.download import local_file
from util.errors import run_cli
from util.export import FORMATS, export_backbone, usage


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("checkpoint", help="checkpoint-*.pth of pretraining, a published one, or a MAE or timm file")
    parser.add_argument("out", help="file to write; a folder for --format hf")
    parser.add_argument("--format", choices=FORMATS, default="timm", help="kind of file")
    parser.add_argument("--img_size", type=int, help="resample pos_embed for this input size in px (default: as is)")
    parser.add_argument("--tap", default="last", help="whose LayerNorm becomes norm: last, or its place from 0")
    parser.add_argument("--num_heads", type=int,
        help="attention heads of the encoder, for a file that doesn't say (default: as the file says)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    how = {"fmt": args.format, "tap": args.tap, "img_size": args.img_size, "num_heads": args.num_heads}
    print(usage(export_backbone(local_file(args.checkpoint), args.out, **how), args.out, args.format))
    return 0


if __name__ == "__main__":
    run_cli(main)
