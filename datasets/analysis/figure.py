"""The gaze analysis as one figure: sizes, density ratios, patch counts, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from util.figures import set_title, show_panels
from util.pictures import MASKED, SIGNIFICANT

ANY = "Any abnormality"
SIZES = ("small", "medium", "large")
SIZE_COLOURS = ("#0072B2", "#56B4E9", "#E69F00")  # Okabe and Ito 2008
CHEST_COLOUR = "#D55E00"
BELOW = {"loc": "upper left", "bbox_to_anchor": (0, -0.2), "frameon": False}  # where a legend is


def analysis_figure(
    tables: Mapping[str, pd.DataFrame], examples: Sequence[tuple[str, np.ndarray]], title: str
) -> Figure:
    """The tables of `datasets.analysis.measure.Analysis`, side by side, and the examples below."""
    panels = {"size_by_finding": _draw_sizes, "ratio_by_finding": _draw_ratios, "readings": _draw_patches}
    known = [name for name in panels if name in tables]
    heights = [6.5, 3.8][: 1 + bool(examples)]
    figure = Figure(figsize=(14, sum(heights)), dpi=130, layout="constrained")
    set_title(figure, title, 11)
    upper, *lower = np.ravel(figure.subfigures(len(heights), 1, height_ratios=heights))
    for name, axes in zip(known, np.ravel(upper.subplots(1, len(known)))):
        panels[name](axes, tables[name])
        axes.spines[["top", "right"]].set_visible(False)
    for subfigure in lower:
        subfigure.suptitle("Examples: image, gaze (brighter where longer), outlines of abnormalities", fontsize=10)
        show_panels(subfigure, [examples], points=8)
    return figure


def _draw_sizes(axes, table: pd.DataFrame) -> None:
    labels = table["finding"] + table["ellipses"].map(" ({:,})".format)
    shares = 100 * table[list(SIZES)].set_axis(labels, axis=0)
    shares[::-1].plot.barh(stacked=True, ax=axes, color=SIZE_COLOURS, width=0.8)
    axes.set(title="How large abnormalities are", ylabel="", xlabel="share of ellipses, % (in brackets: ellipses)")
    axes.legend(**BELOW)


def _draw_ratios(axes, table: pd.DataFrame) -> None:
    wide = table.pivot(index="finding", columns="within").loc[table["finding"].unique()[::-1]]
    mean, low, high = wide["mean"], wide["low"], wide["high"]
    error = np.nan_to_num(np.stack([mean - low, high - mean]).transpose(2, 0, 1)).clip(0)
    mean.plot.barh(ax=axes, xerr=error, color=(CHEST_COLOUR, MASKED), capsize=2)
    axes.axvline(1, color="0.5", linestyle=":")
    overall = table.iloc[0]
    axes.set(
        ylabel="",
        xlabel="gaze density on abnormalities / elsewhere\n(mean, bootstrap 95% interval over subjects)",
        title=f"Mean ratio {overall['mean']:.2f} [{overall['low']:.2f}, {overall['high']:.2f}], "
        f"{overall['readings']:,} readings",
    )
    axes.legend(**BELOW)


def _draw_patches(axes, table: pd.DataFrame) -> None:
    counts = table["significant_patches"]
    axes.hist(counts, bins=24, color=SIGNIFICANT, edgecolor="white")
    axes.axvline(counts.median(), color="black", linestyle="--")
    axes.set(
        xlabel="significant patches of 196 at 224 px\n(at least half is gaze foreground);\n"
        f"{(counts == 0).sum():,} readings have none",
        ylabel="readings",
        title=f"Median {counts.median():.0f}, mean {counts.mean():.1f}",
    )
