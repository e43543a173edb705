"""Pictures of a judgement: the metrics of each predictor, and predicted gaze beside that of the readers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from gaze.metrics import TITLES, density, gaze_patches
from util.figures import fit_lines, set_title, show_panels
from util.pictures import enlarge, gaze_overlay

PATCH = 16  # px
SIGNIFICANT = {"readers' mean only": "#3b7dd8", "prediction only": "#e8862e", "both": "#38a169"}


def metrics_figure(summary: pd.DataFrame, *, title: str = "") -> Figure:
    """One panel per metric, one interval per predictor, under a title that says of what; differences are left to the
    table."""
    shown = summary[~summary["predictor"].str.contains(" - ", regex=False)]
    panels = shown.groupby("metric", sort=False)
    figure = Figure((2.2 * len(panels) + 2.6, 0.42 * shown["predictor"].nunique() + 1.2), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (metric, rows) in zip(grid, panels):
        names, value = rows["predictor"].str.replace(", ", ",\n"), rows["value"]
        axes.errorbar(value, names, xerr=[value - rows["low"], rows["high"] - value], fmt="o")
        axes.set_title(TITLES[metric], fontsize=9)
        axes.grid(axis="x", color="0.9")
    grid[0].invert_yaxis()
    text = f"{title}. Mean over images and its 95% bootstrap interval over subjects; more is better but for KLD."
    set_title(figure, text, 9)
    return figure


def example(heading: str, gray: np.ndarray, prediction: Tensor, readings: Tensor) -> list[tuple[str, np.ndarray]]:
    """The panels of one image, each a heading and a picture [S, S] or [S, S, 3] in 0..1: radiograph, prediction, whose
    patches are significant, each reader's gaze.

    Args:
        gray: [S, S] in 0..1.
        prediction: density [S, S].
        readings: stored heatmaps, uint8 [R, S, S].
    """
    gaze = {"prediction": prediction} | {f"reader {number}": levels for number, levels in enumerate(readings, 1)}
    panels = [(name, gaze_overlay(gray, (values / values.max()).numpy())) for name, values in gaze.items()]
    side = len(gray) // PATCH
    readers, model = (
        enlarge(gaze_patches(values, PATCH).view(side, side).numpy(), PATCH)
        for values in (density(readings).mean(0), prediction)
    )
    whose = readers + 2 * model  # 0: nobody's
    colours = np.array([to_rgb(colour) for colour in ("black", *SIGNIFICANT.values())])[whose]
    patches = np.where(whose[..., None] > 0, 0.5 * gray[..., None] + 0.5 * colours, gray[..., None])
    return [(heading, gray), panels[0], ("significant patches", patches), *panels[1:]]


def examples_figure(lines: Sequence[Sequence[tuple[str, np.ndarray]]], *, title: str = "") -> Figure:
    """A line of panels for each `example`, under a title that says of which model and images."""
    columns = max(map(len, lines))
    figure = Figure((1.75 * columns, 2.05 * len(lines) + 0.7), layout="constrained")
    fitted = [[("\n".join(fit_lines(heading, 1.75, 7)), picture) for heading, picture in line] for line in lines]
    show_panels(figure, fitted, points=7, pad=2, interpolation="nearest")
    text = f"{title}. Gaze: brighter where longer. Significant: at least half of the patch is gaze foreground (Otsu)."
    set_title(figure, text, 8)
    handles = [Patch(fc=colour, label=name) for name, colour in SIGNIFICANT.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=3, fontsize=8, frameon=False)
    return figure
