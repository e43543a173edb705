"""Plot the loss curves of one or more pretraining runs side by side, from their log.txt."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.errors import UserError, run_cli
from util.figures import COLORS, LINE_STYLES, check_picture_path, fit_lines, plain, save_figure

SCALE_PREFIX = "train_loss_scale_"
FEW_EPOCHS = 12  # with markers below this


def read_log(run: str | os.PathLike) -> list[dict[str, float]]:
    """Entries of a run's log, ordered by epoch.

    Where a resumed run logged an epoch again, the later entry counts.

    Args:
        run: the log file, or the run's folder with log.txt in it.

    Raises:
        UserError: no log there, no entry in it, or a line that is not a JSON object with a number for
            `epoch` and for `train_loss`.
    """
    path = Path(run)
    path = path / "log.txt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such log; name a run's output_dir or its log.txt")
    entries = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            epoch, _ = float(entry["epoch"]), float(entry["train_loss"])
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: not a log entry (JSON with epoch and train_loss): {line[:60]!r}"
            ) from None
        entries[epoch] = entry
    if not entries:
        raise UserError(f"{path}: no epoch logged yet")
    return [entries[epoch] for epoch in sorted(entries)]


def run_names(runs: Sequence[str | os.PathLike]) -> list[str]:
    """A name for each run: its folder, from where the folders of the runs begin to differ."""
    paths = [Path(run).resolve() for run in runs]
    folders = [path.parent if path.name == "log.txt" else path for path in paths]
    common = os.path.commonpath([folder.parent for folder in folders])
    names = [os.path.relpath(folder, common) for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"{runs[0]}: a run is named twice")
    return names


def loss_figure(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss curves of several runs side by side: a panel for the whole loss, and one for each scale.

    The panels of the scales share their axis, so that they can be compared; it is linear.

    Args:
        runs: name -> entries of `read_log`.
    """
    keys = {key for log in runs.values() for entry in log for key in entry if key.startswith(SCALE_PREFIX)}
    # Fine scales first; a name is "4.0", or "4.0_block_3" where a scale comes twice.
    finest_first = sorted(keys, key=lambda key: (-float(key.removeprefix(SCALE_PREFIX).partition("_")[0]), key))
    panels = ["train_loss", *finest_first]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows + 0.5), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    whole, *scales = axes = [figure.add_subplot(rows, columns, place + 1) for place in range(len(panels))]
    for place, key in zip(axes, panels, strict=True):
        styles = itertools.cycle(itertools.product(LINE_STYLES, COLORS))
        for (name, log), (style, color) in zip(runs.items(), styles, strict=False):
            points = np.array([(entry["epoch"], entry[key]) for entry in log if key in entry]).reshape(-1, 2)
            marker = "o" if len(points) < FEW_EPOCHS else None
            place.plot(*points.T, label=plain(name), color=color, ls=style, lw=1.3, marker=marker, ms=3)
        place.set_title(f"loss at scale {key.removeprefix(SCALE_PREFIX).replace('_', ' ')}", fontsize=9)
        place.set_xlabel("epoch", fontsize=8)
        place.tick_params(labelsize=7)
        place.grid(alpha=0.25, lw=0.5)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.spines[["top", "right"]].set_visible(False)
    whole.set_title("loss, sum of the scales", fontsize=9)
    for place in scales[1:]:
        place.sharey(scales[0])
    for place in scales:
        place.autoscale(axis="y")
    counts = sorted(map(len, runs.values()))
    epochs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    title = (
        f"Training loss of {', '.join(runs)}: {epochs} epochs. Linear axes; the scales share theirs, so that heights "
        "compare. Runs that agree hide one another."
    )
    figure.suptitle("\n".join(fit_lines(title, figure.get_figwidth(), 9)), fontsize=9)
    handles = whole.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", fontsize=8, ncols=min(3, len(runs)), frameon=False)
    return figure


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
