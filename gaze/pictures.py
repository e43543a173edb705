"""Pictures of a judgement: the metrics of each predictor, and predicted gaze beside that of the readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from gaze.metrics import LOWER_IS_BETTER, METRICS, TITLES, gaze_patches
from util.figures import fit_lines, plain
from util.pictures import gaze_overlay

PANEL, GAP, TITLE, FOOT = 1.7, 0.05, 0.32, 0.3  # inches
READERS_ONLY, PREDICTION_ONLY, BOTH = "#3b7dd8", "#e8862e", "#38a169"


def metrics_figure(summary: pd.DataFrame, *, model: str, title: str = "") -> Figure:
    """One panel per metric, one interval per predictor, under a title that says of what; differences are left to the
    table."""
    shown = summary[~summary["predictor"].str.contains(" - ", regex=False)]
    metrics = [metric for metric in METRICS if (shown["metric"] == metric).any()]
    names = list(shown["predictor"].unique())
    figure = Figure(figsize=(2.2 * len(metrics) + 2.6, 0.42 * len(names) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics):
        own = shown[shown["metric"] == metric].set_index("predictor")
        for place, name in enumerate(names):
            if name not in own.index:
                continue
            value, low, high = own.loc[name, ["value", "low", "high"]]
            colour = "C0" if name.split(", ")[0] == model else "0.45"
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], "o", color=colour, markersize=5)
        axes.set_title(f"{TITLES[metric]}{' (less is better)' if metric in LOWER_IS_BETTER else ''}", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    told = f"{title}. Mean over images and its 95% bootstrap interval over subjects; more is better but for KLD."
    figure.suptitle("\n".join(fit_lines(told.removeprefix(". "), figure.get_figwidth(), 9)), fontsize=9)
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


def examples_figure(
    groups: Sequence[tuple[str, Sequence[Example]]], *, title: str = "", patch_size: int = 16
) -> Figure:
    """Each example in a row: radiograph, each reader's gaze, prediction, and whose patches are significant.

    Args:
        groups: a heading and its examples, e.g. ("best", [...]).
        title: of which model and images.
    """
    rows = [(heading, example) for heading, examples in groups for example in examples]
    columns = max(len(example.readings) for _, example in rows) + 3
    width = columns * (PANEL + GAP) + GAP
    told = f"{title}. Gaze: brighter where longer. Significant: at least half of the patch is gaze foreground (Otsu)."
    lines = fit_lines(told.removeprefix(". "), width - 2 * GAP, 8)
    top = 0.08 + 0.14 * len(lines)
    height = top + len(rows) * (PANEL + TITLE) + FOOT
    figure = Figure(figsize=(width, height))
    for line, (heading, example) in enumerate(rows):
        shown = [(f"{plain(_fit(example.name, 24))}\n{heading}: {example.note}", example.gray)]
        for number, levels in enumerate(example.readings):
            overlay = gaze_overlay(example.gray, levels.numpy() / max(1, int(levels.max())))
            shown.append((f"reader {number + 1}" if len(example.readings) > 1 else "reader", overlay))
        predicted = (example.prediction / example.prediction.max()).numpy()
        last = [("prediction", gaze_overlay(example.gray, predicted))]
        last.append(("significant patches", _patch_picture(example, patch_size)))
        places = [*range(len(shown)), columns - 2, columns - 1]
        bottom = height - top - (line + 1) * (PANEL + TITLE)
        for column, (title, picture) in zip(places, [*shown, *last], strict=True):
            left = GAP + column * (PANEL + GAP)
            axes = figure.add_axes((left / width, bottom / height, PANEL / width, PANEL / height))
            axes.set_axis_off()
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=7, pad=2)
    figure.text(GAP / width, 1 - 0.04 / height, "\n".join(lines), fontsize=8, va="top")
    handles = [
        Patch(fc=READERS_ONLY, label="readers' mean only"),
        Patch(fc=PREDICTION_ONLY, label="prediction only"),
        Patch(fc=BOTH, label="both"),
    ]
    figure.legend(handles=handles, loc="lower right", ncols=3, fontsize=8, frameon=False)
    return figure


def _patch_picture(example: Example, patch_size: int) -> np.ndarray:
    """Radiograph with coloured patches, RGB [S, S, 3]."""
    mean = (example.readings.double() / example.readings.double().sum((-2, -1), keepdim=True)).mean(0)
    side = example.gray.shape[0] // patch_size
    readers, predicted = (
        gaze_patches(torch.as_tensor(values), patch_size).view(side, side).numpy()
        for values in (mean, example.prediction)
    )
    picture = np.repeat(example.gray[..., None], 3, 2)
    for where, colour in (
        (readers & ~predicted, READERS_ONLY),
        (predicted & ~readers, PREDICTION_ONLY),
        (readers & predicted, BOTH),
    ):
        pixels = where.repeat(patch_size, 0).repeat(patch_size, 1)
        picture[pixels] = 0.5 * picture[pixels] + 0.5 * np.array(to_rgb(colour))
    return picture


def _fit(text: str, limit: int) -> str:
    return text if len(text) <= limit else "..." + text[3 - limit :]
