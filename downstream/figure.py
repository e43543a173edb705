"""results.png: AUC over the label fraction, or, for a single fraction, AUC per label with intervals."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from downstream.results import MEAN
from util.figures import COLORS, LETTER_PER_POINT, LINE_STYLES, fit_lines, plain

MARKERS = "os^vDPX<>"
MEASURE_WORDS = {"auc": "area under the ROC curve", "accuracy": "accuracy"}
POINTS, NAME_LETTERS = 7.5, 34  # size of names in the legend, and how long their lines are
LINE_INCHES = 1.6 * POINTS / 72


def results_figure(table: pd.DataFrame, title: Sequence[str]) -> Figure:
    """The picture of `results_table`, under lines that say what it shows."""
    measure = "accuracy" if "accuracy" in table else "auc"
    names, labels = list(table["weights"].unique()), list(table["label"].unique())
    if table["fraction"].nunique() > 1:
        figure, (axes,) = _panels(1, 5.2, 4.4, names)
        _over_fractions(axes, table[table["label"] == MEAN], measure, names)
        axes.set_ylabel(f"{MEASURE_WORDS[measure]}, mean over labels", fontsize=8)
    else:
        figure, (axes,) = _panels(1, 6, 1.6 + len(labels) * (0.12 * len(names) + 0.16), names)
        _per_label(axes, table, measure, names)
    figure.suptitle("\n".join(fit_lines("\n".join(title), figure.get_figwidth(), 8.5)), fontsize=8.5)
    return figure


def summary_figure(means: pd.DataFrame) -> Figure:
    """A panel per `run` of the input of `downstream.results.summary_table`: the mean over labels against the label
    fraction."""
    names = list(means["weights"].unique())
    runs = means.groupby(["run", "measure"], sort=False)
    figure, panels = _panels(len(runs), 4.2, 3.6, names)
    for axes, ((run, measure), own) in zip(panels, runs, strict=True):
        _over_fractions(axes, own, "value", names)
        sizes = " / ".join(f"{n:,.0f}" for n in sorted(own["n"].unique()))
        axes.set_title("\n".join(fit_lines(f"{run}: {sizes} test images", 4, 8.5)), fontsize=8.5)
        axes.set_ylabel(f"{MEASURE_WORDS[measure]}, mean over labels", fontsize=8)
    return figure


def _panels(n: int, width: float, height: float, names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """A figure of n panels of this size in inches, with a legend of all names at the right, and its axes."""
    columns = min(3, n)
    rows = -(-n // columns)
    texts = ["\n".join(map(plain, textwrap.wrap(name, NAME_LETTERS))) for name in names]
    letters = max(len(line) for text in texts for line in text.split("\n"))
    lines = sum(text.count("\n") + 1 for text in texts)
    legend = letters * LETTER_PER_POINT * POINTS / 72 + 0.6
    size = (columns * width + legend, max(rows * height + 0.4, lines * LINE_INCHES + 1.2))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[n:]:
        axes.set_axis_off()
    marks = [panels[0].plot([], [], **_style(i))[0] for i in range(len(names))]
    figure.legend(marks, texts, loc="outside right center", fontsize=POINTS, frameon=False)
    return figure, list(panels[:n])


def _style(i: int) -> dict:
    """Colour, marker and line of the i-th weights: 63 differ in colour or marker, 28 in colour or line."""
    styles = LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)]
    return dict(color=COLORS[i % len(COLORS)], marker=MARKERS[i % len(MARKERS)], ls=styles, ms=4, lw=1.4)


def _over_fractions(axes: Axes, means: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """A line per weights: mean over seeds at each label fraction, with bars of one standard deviation."""
    fractions = np.sort(means["fraction"].unique())
    width = (fractions[-1] / fractions[0]) ** 0.03 if len(fractions) > 1 else 1.2
    for i, name in enumerate(names):
        by_fraction = means[means["weights"] == name].groupby("fraction")[column]
        centre, spread = by_fraction.mean(), by_fraction.std(ddof=1).fillna(0)
        beside = width ** ((i + 0.5) / len(names) - 0.5)  # so that the bars do not hide one another
        axes.errorbar(100 * centre.index * beside, centre, yerr=spread, elinewidth=0.7, capsize=1.5, **_style(i))
    axes.set_xscale("log")
    axes.set_xticks(100 * fractions, [f"{100 * fraction:g}%" for fraction in fractions])
    axes.minorticks_off()
    text = "share of the training images that have labels, log scale\nbars: ± one standard deviation over seeds"
    axes.set_xlabel(text, fontsize=8)


def _per_label(axes: Axes, table: pd.DataFrame, measure: str, names: Sequence[str]) -> None:
    """A row per label, a mark per weights: mean over seeds, and the interval of the first seed."""
    table = table[table[measure].notna()]
    labels = list(table["label"].unique())
    if len(labels) == 2:
        labels = labels[:1]  # the mean of one label is that label
    for i, name in enumerate(names):
        by_label = table[table["weights"] == name].groupby("label")
        centre = by_label[measure].mean().reindex(labels).to_numpy()
        low, high = by_label[["low", "high"]].first().reindex(labels).to_numpy().T
        # A percentile interval may leave the value outside if there are few images.
        bars = np.nan_to_num(np.clip([centre - low, high - centre], 0, None))
        place = np.arange(len(labels)) + (i + 0.5) / len(names) * 0.8 - 0.4
        axes.errorbar(centre, place, xerr=bars, **_style(i) | {"ls": "", "lw": 1, "ms": 3.5})
    if measure == "auc":
        axes.axvline(0.5, color="0.6", lw=0.8, zorder=0)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), list(map(plain, labels)))
    text = f"{MEASURE_WORDS[measure]}, mean over seeds\nbars: 95% bootstrap interval over subjects (first seed)"
    axes.set_xlabel(text, fontsize=8)
