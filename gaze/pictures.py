"""Pictures of a judgement: the metrics of each predictor, and predicted gaze beside that of the readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from gaze.metrics import TITLES, density, gaze_patches
from util.figures import fit_lines, plain
from util.pictures import gaze_overlay

PANEL, GAP, HEADING, FOOT = 1.7, 0.05, 0.32, 0.3  # inches
PATCH = 16  # px
READERS_ONLY, PREDICTION_ONLY, BOTH = "#3b7dd8", "#e8862e", "#38a169"


def metrics_figure(summary: pd.DataFrame, *, model: str, title: str = "") -> Figure:
    """One panel per metric, one interval per predictor, under a title that says of what; differences are left to the
    table."""
    shown = summary[~summary["predictor"].str.contains(" - ", regex=False)]
    places = {name: place for place, name in enumerate(shown["predictor"].unique())}
    panels = shown.groupby("metric", sort=False)
    figure = Figure(figsize=(2.2 * len(panels) + 2.6, 0.42 * len(places) + 1.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (metric, rows) in zip(grid, panels):
        for row in rows.itertuples():
            colour = "C0" if row.predictor.split(", ")[0] == model else "0.45"
            axes.plot([row.low, row.high], [places[row.predictor]] * 2, color=colour, linewidth=2)
            axes.plot(row.value, places[row.predictor], "o", color=colour, markersize=5)
        axes.set_title(TITLES[metric], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="0.9")
    grid[0].set_yticks(range(len(places)), [name.replace(", ", ",\n") for name in places], fontsize=8)
    grid[0].invert_yaxis()
    text = f"{title}. Mean over images and its 95% bootstrap interval over subjects; more is better but for KLD."
    figure.suptitle("\n".join(fit_lines(text, figure.get_figwidth(), 9)), fontsize=9)
    return figure


@dataclass(frozen=True)
class Example:
    """One line of the picture.

    Attributes:
        name: above the radiograph.
        gray: [S, S] in 0..1.
        readings: stored heatmaps, uint8 [R, S, S].
        prediction: density [S, S].
        note: its score.
    """

    name: str
    gray: np.ndarray
    readings: Tensor
    prediction: Tensor
    note: str


def examples_figure(groups: Sequence[tuple[str, Sequence[Example]]], *, title: str = "") -> Figure:
    """Each example in a row: radiograph, prediction, whose patches are significant, each reader's gaze.

    Args:
        groups: a heading and its examples, e.g. ("best", [...]).
        title: of which model and images.
    """
    rows = []
    for heading, examples in groups:
        for example in examples:
            name = example.name if len(example.name) <= 24 else f"...{example.name[-21:]}"
            row = [(f"{plain(name)}\n{heading}: {example.note}", example.gray)]
            row.append(("prediction", gaze_overlay(example.gray, _to_peak(example.prediction))))
            row.append(("significant patches", _patch_picture(example)))
            row += [
                (f"reader {number + 1}", gaze_overlay(example.gray, _to_peak(levels)))
                for number, levels in enumerate(example.readings)
            ]
            rows.append(row)
    columns = max(map(len, rows))
    width = columns * (PANEL + GAP)
    text = f"{title}. Gaze: brighter where longer. Significant: at least half of the patch is gaze foreground (Otsu)."
    lines = fit_lines(text, width - 2 * GAP, 8)
    top, middle = 0.08 + 0.14 * len(lines), len(rows) * (PANEL + HEADING)
    height = top + middle + FOOT
    figure = Figure(figsize=(width, height))
    grid = figure.subplots(
        len(rows),
        columns,
        squeeze=False,
        gridspec_kw={
            "left": GAP / width,
            "right": 1 - GAP / width,
            "top": 1 - (top + HEADING) / height,
            "bottom": FOOT / height,
            "wspace": GAP / PANEL,
            "hspace": HEADING / PANEL,
        },
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for row, own in zip(rows, grid):
        for (heading, picture), axes in zip(row, own):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(heading, fontsize=7, pad=2)
    figure.text(GAP / width, 1 - 0.04 / height, "\n".join(lines), fontsize=8, va="top")
    handles = [
        Patch(fc=READERS_ONLY, label="readers' mean only"),
        Patch(fc=PREDICTION_ONLY, label="prediction only"),
        Patch(fc=BOTH, label="both"),
    ]
    figure.legend(handles=handles, loc="lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def _to_peak(values: Tensor) -> np.ndarray:
    return (values / values.max()).numpy()


def _patch_picture(example: Example) -> np.ndarray:
    """Radiograph with coloured patches, RGB [S, S, 3]."""
    side = example.gray.shape[0] // PATCH
    readers, predicted = (
        gaze_patches(values, PATCH).view(side, side).numpy().repeat(PATCH, 0).repeat(PATCH, 1)
        for values in (density(example.readings).mean(0), example.prediction)
    )
    picture = np.repeat(example.gray[..., None], 3, 2)
    for where, colour in (
        (readers & ~predicted, READERS_ONLY),
        (predicted & ~readers, PREDICTION_ONLY),
        (readers & predicted, BOTH),
    ):
        picture[where] = 0.5 * picture[where] + 0.5 * np.array(to_rgb(colour))
    return picture
