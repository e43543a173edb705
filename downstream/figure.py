"""results.png: AUC over the label fraction, or, for a single fraction, AUC per label with intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from downstream.results import MEAN
from util.figures import COLORS, LINE_STYLES, fit_lines, plain

STYLES = [  # the first 28 weights all differ
    {"ls": line, "marker": marker, "color": color, "ms": 4, "lw": 1.4}
    for (line, marker), color in itertools.product(zip(LINE_STYLES, "os^v", strict=True), COLORS)
]
PANEL, LEGEND = 4.6, 3.0  # widths in inches


def results_figure(table: pd.DataFrame, title: str) -> Figure:
    """The picture of `results_table`, under lines that say what it shows."""
    measure = "accuracy" if "accuracy" in table else "auc"
    table = table.assign(value=table[measure], measure=measure)
    if table["fraction"].nunique() > 1:
        return _figure([(title, table[table["label"] == MEAN])], _over_fractions, 4.4)
    height = 1.6 + table["label"].nunique() * (0.12 * table["weights"].nunique() + 0.16)
    return _figure([(title, table)], _per_label, height)


def summary_figure(means: pd.DataFrame) -> Figure:
    """A panel per `run` of the input of `downstream.results.summary_table`: the mean over labels against the label
    fraction."""
    panels = []
    for run, own in means.groupby("run", sort=False):
        panels.append((f"{run}: {own['n'].max():,.0f} test images", own))
    return _figure(panels, _over_fractions, 3.6)


def _figure(panels: Sequence[tuple[str, pd.DataFrame]], draw: Callable, height: float) -> Figure:
    """Panels of this height in inches under their titles, and a legend of all weights at the right."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    names = pd.concat([table for _, table in panels])["weights"].unique()
    texts = ["\n".join(fit_lines(name, LEGEND - 0.6, 7.5)) for name in names]
    lines = "\n".join(texts).count("\n") + 1
    size = (columns * PANEL + LEGEND, max(rows * height + 0.4, 0.17 * lines + 1.2))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    styles = dict(zip(names, itertools.cycle(STYLES)))
    for i, (title, table) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, lw=0.5)
        axes.set_title("\n".join(fit_lines(title, PANEL - 0.6, 8.5)), fontsize=8.5)
        draw(axes, table, styles)
    marks = [axes.plot([], [], **style)[0] for style in styles.values()]
    figure.legend(marks, texts, loc="outside right center", fontsize=7.5, frameon=False)
    return figure


def _over_fractions(axes: Axes, means: pd.DataFrame, styles: dict[str, dict]) -> None:
    """A line per weights: mean over seeds at each label fraction, with bars of one standard deviation."""
    fractions = np.sort(means["fraction"].unique())
    for i, (name, style) in enumerate(styles.items()):
        own = means[means["weights"] == name].groupby("fraction")["value"].agg(["mean", "std"])
        beside = 1.15 ** ((i + 0.5) / len(styles) - 0.5)  # so that the bars do not hide one another
        axes.errorbar(100 * own.index * beside, own["mean"], own["std"], elinewidth=0.7, capsize=1.5, **style)
    axes.set_xscale("log")
    axes.set_xticks(100 * fractions, [f"{100 * fraction:g}%" for fraction in fractions])
    axes.minorticks_off()
    text = "share of the training images that have labels, log scale\nbars: ± one standard deviation over seeds"
    axes.set_xlabel(text, fontsize=8)
    axes.set_ylabel(f"{means['measure'].iloc[0].upper()}, mean over labels", fontsize=8)


def _per_label(axes: Axes, table: pd.DataFrame, styles: dict[str, dict]) -> None:
    """A row per label, a mark per weights: mean over seeds, and the interval of the first seed."""
    labels = list(table["label"].unique())
    for i, (name, style) in enumerate(styles.items()):
        own = table[table["weights"] == name].groupby("label", sort=False)
        centre, low, high = own["value"].mean(), own["low"].first(), own["high"].first()
        # A percentile interval may leave the value outside if there are few images.
        bars = np.clip([centre - low, high - centre], 0, None)
        place = np.arange(len(labels)) + 0.8 * (i + 0.5) / len(styles) - 0.4
        axes.errorbar(centre, place, xerr=bars, **style | {"ls": "", "lw": 1})
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), list(map(plain, labels)))
    text = "mean over seeds\nbars: 95% bootstrap interval over subjects (first seed)"
    axes.set_xlabel(f"{table['measure'].iloc[0].upper()}, {text}", fontsize=8)
