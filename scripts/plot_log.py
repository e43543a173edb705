"""Plot the loss curves of one or more pretraining runs side by side, from their log.txt."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.errors import UserError, run_cli
from util.figures import COLORS, check_picture_path, plain, save_figure

SCALE_PREFIX = "train_loss_scale_"


def read_log(run: str) -> pd.DataFrame:
    """Entries of a run's log by epoch; of an epoch that was logged again the later one.

    Raises:
        UserError: no log in this output_dir, or one without losses.
    """
    try:
        log = pd.read_json(Path(run, "log.txt"), lines=True)
        return log.drop_duplicates("epoch", keep="last").set_index("epoch").sort_index().astype({"train_loss": float})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run}/log.txt: no log of losses by epoch ({' '.join(str(error).split())})") from None


def loss_figure(logs: Mapping[str, pd.DataFrame]) -> Figure:
    """Loss curves of several runs, by name: a panel for the whole loss, and one for each scale. Axes are linear; those
    of the scales are the same, so that heights compare."""
    names = dict.fromkeys(name for log in logs.values() for name in log if name.startswith(SCALE_PREFIX))
    rows = math.ceil((1 + len(names)) / 3)
    figure = Figure((10, 2.8 * rows + 0.5), dpi=150, layout="constrained")
    for place, name in enumerate(["train_loss", *names], 1):
        axes = figure.add_subplot(rows, 3, place, sharey=figure.axes[1] if place > 2 else None)
        axes.set(title=f"scale {name.removeprefix(SCALE_PREFIX)}" if place > 1 else "sum of the scales", xlabel="epoch")
        for log, color in zip(logs.values(), itertools.cycle(COLORS)):
            axes.plot(log.get(name, pd.Series(dtype=float)), color=color, marker=".")
    figure.suptitle("training loss")
    figure.legend(figure.axes[0].lines, map(plain, logs), loc="outside lower center")
    return figure


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("runs", nargs="+", metavar="RUN", help="output_dir of a run")
    parser.add_argument("--out", default="loss.png", help="picture to write: .png, .pdf, .svg or .jpg")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    out = check_picture_path(args.out)
    logs = {run: read_log(run) for run in args.runs}
    save_figure(loss_figure(logs), out)
    for name, log in logs.items():
        first, last = log["train_loss"].iloc[[0, -1]]
        print(f"{name}: epochs {log.index[0]} to {log.index[-1]}, loss {first:.4f} to {last:.4f}")
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    run_cli(main)
