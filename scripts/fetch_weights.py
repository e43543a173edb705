"""Get the ImageNet weights that pretraining starts from, and put them into preTrain/.

They are timm's vit_*_patch16_224.augreg_in21k_ft_in1k: ImageNet-21k, fine-tuned on ImageNet-1k (AugReg).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.errors import UserError, run_cli
from util.pretrained import SIZES, TAG, fetch_weights, weights_name

REPOSITORY = Path(__file__).resolve().parents[1]


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default="vit_base_patch16_224",
        help="timm's or this program's name of the model, or its size",
    )
    parser.add_argument("--file", help="weights downloaded by hand, instead of asking the Hugging Face hub")
    parser.add_argument("--out", help="file to write (default: preTrain/vit_SIZE_p16_224_timm.pth)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    found = re.fullmatch(
        rf"(?:(?:cxrmim_)?vit_)?({'|'.join(SIZES)})(?:_patch16(?:_224)?(?:\.{TAG})?)?", args.model
    )
    if not found:
        raise UserError(
            f"--model {args.model}: expected vit_SIZE_patch16_224 with SIZE one of {', '.join(SIZES)}"
        )
    size = found.group(1)
    out = Path(args.out) if args.out else REPOSITORY / "preTrain" / weights_name(size)
    digest = fetch_weights(size, out, file=args.file)
    print(f"wrote {out}: timm's vit_{size}_patch16_224.{TAG}, SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    run_cli(main)
