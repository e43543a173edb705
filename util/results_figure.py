"""results.png: AUC over label fraction, or, of a single fraction, AUC per label with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from util.curves import COLORS, LINE_STYLES
from util.figures import fit_lines, plain
from util.results import MEAN

MARKERS = "os^vDPX<>"
MEASURE_WORDS = {"auc": "area under the ROC curve, mean over labels", "accuracy": "accuracy"}


def results_figure(table: pd.DataFrame, title: Sequence[str]) -> Figure:
    """The picture of `results_table`, under lines that say what it shows."""
    measure = "accuracy" if "accuracy" in table else "auc"
    several = table["fraction"].nunique() > 1
    figure = (_over_fractions if several else _per_label)(table, measure)
    lines = fit_lines("\n".join(title), figure.get_figwidth(), 8.5)
    figure.suptitle("\n".join(lines), fontsize=8.5)
    return figure


def summary_figure(means: pd.DataFrame) -> Figure:
    """One panel per data set and method of `util.results.summary_table`'s input: the mean over labels against the
    share of labels, or, of a single share, marks side by side; bands and bars are +- one standard deviation over
    seeds."""
    runs = list(dict.fromkeys(zip(means["dataset"], means["method"], means["measure"], strict=True)))
    names = list(dict.fromkeys(means["weights"]))
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.4), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (dataset, method, measure) in zip(panels, runs, strict=False):
        own = means[(means["dataset"] == dataset) & (means["method"] == method)]
        _mean_over_fractions(axes, own, "value", names)
        sizes = sorted({int(n) for n in own["n"]})
        axes.set_title(
            plain(f"{dataset}, {method}: {' / '.join(f'{n:,}' for n in sizes)} test images"), fontsize=8.5
        )
        axes.set_ylabel(MEASURE_WORDS[measure], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, lw=0.5)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(3, len(names)), fontsize=8, frameon=False)
    return figure


def _over_fractions(table: pd.DataFrame, measure: str) -> Figure:
    """The mean over labels against the share of training images; bands are +- one standard deviation over
    seeds."""
    figure = Figure(figsize=(6, 4.6), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    mean = table[table["label"] == MEAN]
    names = list(dict.fromkeys(mean["weights"]))
    _mean_over_fractions(axes, mean, measure, names)
    axes.set_ylabel(MEASURE_WORDS[measure], fontsize=8)
    _finish(figure, axes, len(names))
    return figure


def _mean_over_fractions(axes, mean: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """A line per weights, in the colours of `names`, with a band of one standard deviation over seeds; of a single
    share of labels a mark per weights with a bar, side by side."""
    single = mean["fraction"].nunique() == 1
    for i, name in enumerate(names):
        by_fraction = mean[mean["weights"] == name].groupby("fraction")[column]
        centre, spread = by_fraction.mean(), by_fraction.std(ddof=1).fillna(0)
        style = dict(label=plain(name), color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ms=4, lw=1.4,
                     ls=LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)])  # fmt: skip
        if single:
            axes.errorbar([i] * len(centre), centre, yerr=spread, capsize=3, **style)
            continue
        x = 100 * centre.index.to_numpy()
        axes.plot(x, centre, **style)
        axes.fill_between(x, centre - spread, centre + spread, color=style["color"], alpha=0.18, lw=0)
    ticks = sorted(100 * mean["fraction"].unique())
    share = "share of the training images that have labels"
    if single:
        axes.set_xticks([])
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_xlabel(f"{share}: {ticks[0]:g}%", fontsize=8)
        return
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{share}, log scale", fontsize=8)


def _per_label(table: pd.DataFrame, measure: str) -> Figure:
    """A line of marks per label, a colour per weights: mean over seeds, and the interval of the first seed."""
    table = table[table[measure].notna()]
    labels, names = list(dict.fromkeys(table["label"])), list(dict.fromkeys(table["weights"]))
    height = 1.6 + len(labels) * (0.16 * len(names) + 0.14) + 0.2 * (len(names) // 2)
    figure = Figure(figsize=(7, height), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, name in enumerate(names):
        part = table[table["weights"] == name].groupby("label", sort=False)
        centre = part[measure].mean().loc[labels].to_numpy()
        first = part[["low", "high"]].first().loc[labels].to_numpy()
        place = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        # A percentile interval may leave the value outside where there are few images.
        spread = np.clip([centre - first[:, 0], first[:, 1] - centre], 0, None)
        style = dict(color=COLORS[i % len(COLORS)], fmt=MARKERS[i % len(MARKERS)], ms=3.5, lw=1)
        axes.errorbar(centre, place, xerr=np.nan_to_num(spread), label=plain(name), **style)
    if measure == "auc":
        axes.axvline(0.5, color="0.6", lw=0.8, zorder=0)
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels], fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    word = "accuracy" if measure == "accuracy" else "area under the ROC curve"
    axes.set_xlabel(f"{word}, mean over seeds; 95% bootstrap interval over subjects (first seed)", fontsize=8)
    _finish(figure, axes, len(names))
    return figure


def _finish(figure: Figure, axes, n_names: int) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(2, n_names), fontsize=7.5, frameon=False)
