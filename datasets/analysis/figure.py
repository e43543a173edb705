"""The gaze analysis as one figure: sizes, density ratios, patch counts, examples."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from datasets.analysis.gaze_density import ANY, N_PATCHES, SIZES
from util.figures import fit_lines
from util.pictures import MASKED, SIGNIFICANT, gaze_overlay

if TYPE_CHECKING:
    from datasets.analysis.measure import Analysis, Example

SIZE_COLOURS = ("#0072B2", "#56B4E9", "#E69F00")  # Okabe and Ito 2008
CHEST_COLOUR = "#D55E00"
LEGEND_BELOW = {
    "loc": "upper left",
    "bbox_to_anchor": (-0.02, -0.22),
    "frameon": False,
    "fontsize": 8,
    "borderaxespad": 0,
}


def analysis_figure(analysis: Analysis) -> Figure:
    """The tables as one figure: ellipse sizes, density ratios, patch counts, and the examples below."""
    has_ellipses = not analysis.ellipses.empty
    n_rows = len(analysis.size_by_finding) if has_ellipses else 0
    top = max(3.4, 1.5 + 0.32 * n_rows)
    bottom = 0.3 + 10.4 / max(3, len(analysis.examples)) if analysis.examples else 0.0
    figure = Figure(figsize=(14, top + bottom), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(2, 1, height_ratios=(top, bottom)) if analysis.examples else (figure,)
    made_up = " SIMULATED GAZE, no radiologist looked at these images." if analysis.options["simulated"] else ""
    title = (
        f"{analysis.options['raw']} ({analysis.options['source']}), split {analysis.options['split']}: "
        f"{len(analysis.readings):,} readings of {analysis.readings['image_id'].nunique():,} images.{made_up}"
    )
    figure.suptitle("\n".join(fit_lines(title, 14, 11)), fontsize=11)
    with matplotlib.rc_context({"font.size": 9}):
        if has_ellipses:
            axes = parts[0].subplots(1, 3, width_ratios=(1.35, 1.25, 1.0))
            _draw_sizes(axes[0], analysis)
            _draw_ratios(axes[1], analysis)
        else:
            axes = [parts[0].subplots(1, 1)]
        _draw_patches(axes[-1], analysis)
        if analysis.examples:
            _draw_examples(parts[1], analysis.examples)
    return figure


def _draw_sizes(axes, analysis: Analysis) -> None:
    table = analysis.size_by_finding.iloc[::-1]
    small, medium = analysis.options["size_thresholds"]
    small, medium = 100 * small, 100 * medium
    names = (
        f"small: under {small:g}% of the image's area",
        f"medium: {small:g}% to {medium:g}%",
        f"large: {medium:g}% or more",
    )
    left = np.zeros(len(table))
    for size, colour, name in zip(SIZES, SIZE_COLOURS, names):
        share = 100 * table[size].to_numpy()
        axes.barh(table["finding"], share, left=left, color=colour, edgecolor="white", linewidth=0.6, label=name)
        left += share
    for i, count in enumerate(table["ellipses"]):
        axes.text(101, i, f"{count:,}", va="center", fontsize=8)
    axes.set(
        xlim=(0, 112),
        xticks=(0, 25, 50, 75, 100),
        title="How large abnormalities are",
        xlabel="share of abnormality ellipses, % (number: ellipses)",
    )
    axes.legend(**LEGEND_BELOW)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_ratios(axes, analysis: Analysis) -> None:
    table = analysis.ratio_by_finding
    if table.empty:  # every ellipse fell between the pixels of the map
        axes.set_title("No density ratio: the ellipses are too small for --size")
        axes.set_axis_off()
        return
    findings = list(dict.fromkeys(table["finding"]))[::-1]
    for within, colour, marker, shift in (("whole image", MASKED, "o", 0.14), ("chest box", CHEST_COLOUR, "s", -0.14)):
        own = table[table["within"] == within]
        y = np.array([findings.index(finding) for finding in own["finding"]]) + shift
        error = np.nan_to_num(np.stack([own["mean"] - own["low"], own["high"] - own["mean"]]))
        axes.errorbar(
            own["mean"],
            y,
            xerr=error.clip(0),
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2.5,
            linewidth=1.3,
            label=f"within the {within}",
        )
    overall = table[(table["finding"] == ANY) & (table["within"] == "whole image")].iloc[0]
    axes.axvline(1, color="0.5", linewidth=1, linestyle=":")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(findings)), findings)
    interval = "" if np.isnan(overall.low) else f" [{overall.low:.2f}, {overall.high:.2f}]"
    axes.set(
        ylim=(-0.6, len(findings) - 0.4),
        xlabel="gaze density on abnormalities / elsewhere (log scale)",
        title=f"Mean ratio {overall['mean']:.2f}{interval}, {overall.readings:,} readings",
    )
    axes.legend(**LEGEND_BELOW, title="mean, bootstrap 95% interval over subjects", title_fontsize=8, alignment="left")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_patches(axes, analysis: Analysis) -> None:
    counts = analysis.readings["significant_patches"]
    bins = np.arange(0, max(counts.max() + 8, 16), max(1, round((counts.max() + 1) / 24)))
    axes.hist(counts, bins=bins, color=SIGNIFICANT, edgecolor="white", linewidth=0.6)
    axes.axvline(counts.median(), color="black", linewidth=1.2, linestyle="--")
    title = f"Median {counts.median():.0f}, mean {counts.mean():.1f}"
    axes.set(
        xlabel=f"significant patches of {N_PATCHES} at 224 px\n(at least half is gaze foreground);\n{(counts == 0).sum():,} readings have none",
        ylabel="readings",
        title=title,
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_examples(figure, examples: Sequence[Example]) -> None:
    marked = "; ellipses: marked abnormalities" if any(example.boxes for example in examples) else ""
    figure.suptitle(f"Examples: image and gaze (brighter where longer){marked}", fontsize=10)
    grid = np.ravel(figure.subplots(1, 2 * len(examples)))
    for example, pair in zip(examples, grid.reshape(-1, 2)):
        gray = example.gray / 255.0
        overlay = gaze_overlay(gray, example.heatmap / example.heatmap.max())
        for axes, picture in zip(pair, (gray, overlay)):
            axes.imshow(picture, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            scale = example.heatmap.shape[1] / example.size[1]
            for xmin, ymin, xmax, ymax in example.boxes:
                centre = ((xmin + xmax + 1) / 2 * scale - 0.5, (ymin + ymax + 1) / 2 * scale - 0.5)
                width, height = (xmax - xmin) * scale, (ymax - ymin) * scale
                axes.add_patch(Ellipse(centre, width, height, fill=False, edgecolor="#56B4E9", linewidth=1.3))
        ratio = "" if np.isnan(example.ratio) else f", ratio {example.ratio:.1f}"
        pair[0].set_title("\n".join(textwrap.wrap(example.reading.id, 24)), fontsize=8)
        pair[1].set_title(f"gaze{ratio}", fontsize=8)
