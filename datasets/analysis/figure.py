"""The gaze analysis as one figure: sizes, density ratios, patch counts, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from datasets.analysis.gaze_density import ANY, N_PATCHES, SIZES, Box
from util.figures import fit_lines
from util.pictures import MASKED, SIGNIFICANT, gaze_overlay

SIZE_COLOURS = ("#0072B2", "#56B4E9", "#E69F00")  # Okabe and Ito 2008
CHEST_COLOUR = "#D55E00"


class Example(NamedTuple):
    """An image to show: its reading, pixels and heatmap (both [H, W]), (height, width) and abnormal boxes (px) of the
    original."""

    id: str
    gray: np.ndarray
    size: tuple[int, int]
    heatmap: np.ndarray
    boxes: list[Box]
    ratio: float


def analysis_figure(
    tables: Mapping[str, pd.DataFrame], examples: Sequence[Example], options: Mapping[str, Any]
) -> Figure:
    """The tables of `datasets.analysis.measure.Analysis` that are not empty, side by side, and the examples below."""
    panels = {"size_by_finding": _draw_sizes, "ratio_by_finding": _draw_ratios, "readings": _draw_patches}
    panels = {name: draw for name, draw in panels.items() if not tables[name].empty}
    heights = (1.8 + 0.32 * max(6, len(tables["size_by_finding"])), 0.3 + 10.4 / max(3, len(examples)))
    figure = Figure(figsize=(14, sum(heights[: 1 + bool(examples)])), dpi=130, layout="constrained")
    upper, *lower = np.ravel(figure.subfigures(1 + bool(examples), 1, height_ratios=heights[: 1 + bool(examples)]))
    made_up = " SIMULATED GAZE, no radiologist looked at these images." if options["simulated"] else ""
    readings = tables["readings"]
    title = (
        f"{options['raw']} ({options['source']}), split {options['split']}: "
        f"{len(readings):,} readings of {readings['image_id'].nunique():,} images.{made_up}"
    )
    figure.suptitle("\n".join(fit_lines(title, 14, 11)), fontsize=11)
    for axes, (name, draw) in zip(upper.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        draw(axes, tables[name], options)
        axes.spines[["top", "right"]].set_visible(False)
    for subfigure in lower:
        _draw_examples(subfigure, examples)
    return figure


def _draw_sizes(axes, table: pd.DataFrame, options: Mapping[str, Any]) -> None:
    small, medium = (100 * share for share in options["size_thresholds"])
    names = [
        f"small: under {small:g}% of the image",
        f"medium: {small:g}% to {medium:g}%",
        f"large: {medium:g}% or more",
    ]
    labels = table["finding"] + table["ellipses"].map(" ({:,})".format)
    shares = 100 * table[list(SIZES)].set_axis(labels, axis=0).set_axis(names, axis=1)
    shares[::-1].plot.barh(stacked=True, ax=axes, color=SIZE_COLOURS, width=0.8)
    axes.set(
        title="How large abnormalities are",
        ylabel="",
        xlabel="share of abnormality ellipses, % (in brackets: ellipses)",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)


def _draw_ratios(axes, table: pd.DataFrame, options: Mapping[str, Any]) -> None:
    findings = list(dict.fromkeys(table["finding"]))[::-1]
    for (within, own), colour, shift in zip(table.groupby("within"), (CHEST_COLOUR, MASKED), (-0.14, 0.14)):
        y = [findings.index(finding) + shift for finding in own["finding"]]
        error = np.nan_to_num([own["mean"] - own["low"], own["high"] - own["mean"]]).clip(0)
        axes.errorbar(own["mean"], y, xerr=error, fmt="o", color=colour, capsize=2.5, label=f"within the {within}")
    overall = table[table["finding"] == ANY].iloc[0]
    axes.axvline(1, color="0.5", linestyle=":")
    axes.set_yticks(range(len(findings)), findings)
    axes.set(
        xlim=(0, None),
        xlabel="gaze density on abnormalities / elsewhere\n(mean, bootstrap 95% interval over subjects)",
        title=f"Mean ratio {overall['mean']:.2f} [{overall['low']:.2f}, {overall['high']:.2f}], "
        f"{overall['readings']:,} readings",
    )
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)


def _draw_patches(axes, table: pd.DataFrame, options: Mapping[str, Any]) -> None:
    counts = table["significant_patches"]
    axes.hist(counts, bins=24, color=SIGNIFICANT, edgecolor="white")
    axes.axvline(counts.median(), color="black", linestyle="--")
    axes.set(
        xlabel=f"significant patches of {N_PATCHES} at 224 px\n(at least half is gaze foreground);\n"
        f"{(counts == 0).sum():,} readings have none",
        ylabel="readings",
        title=f"Median {counts.median():.0f}, mean {counts.mean():.1f}",
    )


def _draw_examples(figure, examples: Sequence[Example]) -> None:
    figure.suptitle("Examples: image and gaze (brighter where longer); ellipses: marked abnormalities", fontsize=10)
    grid = figure.subplots(1, 2 * len(examples)).reshape(-1, 2)
    for example, pair in zip(examples, grid):
        gray = example.gray / 255.0
        ratio = "" if np.isnan(example.ratio) else f", ratio {example.ratio:.1f}"
        titles = "\n".join(fit_lines(example.id, 2, 8)), f"gaze{ratio}"
        scale = example.heatmap.shape[1] / example.size[1]
        for axes, picture, title in zip(
            pair, (gray, gaze_overlay(gray, example.heatmap / example.heatmap.max())), titles
        ):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            axes.set_title(title, fontsize=8)
            for xmin, ymin, xmax, ymax in example.boxes:
                centre = ((xmin + xmax + 1) / 2 * scale - 0.5, (ymin + ymax + 1) / 2 * scale - 0.5)
                width, height = (xmax - xmin) * scale, (ymax - ymin) * scale
                axes.add_patch(Ellipse(centre, width, height, fill=False, edgecolor=SIZE_COLOURS[1]))
