"""Get the ImageNet weights that pretraining, or a gaze predictor's encoder, starts from, into preTrain/.

For pretraining they are timm's vit_*_patch16_224.augreg_in21k_ft_in1k: ImageNet-21k, fine-tuned on ImageNet-1k (AugReg);
for other names of timm's those that timm prefers, or those of the tag in the name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.errors import run_cli
from util.pretrained import fetch_weights, stored_weights, tagged_name


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("--model", default="vit_base_patch16_224",
        help="timm's or this program's name of the model, with or without tag, or a ViT's size")
    parser.add_argument("--file", help="weights downloaded by hand, instead of asking the Hugging Face hub")
    parser.add_argument("--out", help="file to write (default: where the programs look for it in preTrain/)")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    name = tagged_name(args.model)
    out = Path(args.out) if args.out else stored_weights(name.partition(".")[0])
    digest = fetch_weights(name, out, file=args.file)
    print(f"wrote {out}: timm's {name}, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    run_cli(main)
