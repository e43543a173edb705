"""Plot the loss curves of one or more pretraining runs side by side, from their log.txt."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.curves import loss_figure, read_log, run_names
from util.errors import UserError, run_cli
from util.figures import check_picture_path, save_figure


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    # fmt: off
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run, or its log.txt")
    parser.add_argument("--names", nargs="+", help="names of the runs in the legend (default: their folders)")
    parser.add_argument("--out", default="loss.png", help="picture to write: .png, .pdf, .svg or .jpg")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    out = check_picture_path(args.out)
    names = args.names or run_names(args.runs)
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise UserError(f"--names: {len(names)} names for {len(args.runs)} runs; give one different name to each")
    logs = {name: read_log(run) for name, run in zip(names, args.runs, strict=True)}
    save_figure(loss_figure(logs), out)
    for name, log in logs.items():
        first, last = log[0], log[-1]
        print(
            f"{name}: epochs {first['epoch']:g} to {last['epoch']:g}, "
            f"loss {first['train_loss']:.4f} to {last['train_loss']:.4f}"
        )
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
