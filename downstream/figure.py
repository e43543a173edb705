"""results.png: AUC over label fraction, or, of a single fraction, AUC per label with intervals.

Every line is named where it ends, and rows are named beside their axis: with 20 encoders no legend can be searched.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from downstream.results import MEAN
from util.figures import COLORS, LETTER_PER_POINT, LINE_STYLES, fit_lines, plain

MARKERS = "os^vDPX<>"
MEASURE_WORDS = {"auc": "area under the ROC curve, mean over labels", "accuracy": "accuracy"}
NAME_POINTS, NAME_LETTERS = 7.5, 34  # size of names, and how long their lines are
LINE_INCHES = 1.25 * NAME_POINTS / 72
FEW = 5  # so many bands, or marks side by side, can be told apart


def results_figure(table: pd.DataFrame, title: Sequence[str]) -> Figure:
    """The picture of `results_table`, under lines that say what it shows."""
    measure = "accuracy" if "accuracy" in table else "auc"
    if table["fraction"].nunique() > 1:
        figure = _over_fractions(table, measure)
    else:
        figure = (_per_label if table["weights"].nunique() <= FEW else _per_weights)(table, measure)
    lines = fit_lines("\n".join(title), figure.get_figwidth(), 8.5)
    figure.suptitle("\n".join(lines), fontsize=8.5)
    return figure


def summary_figure(means: pd.DataFrame) -> Figure:
    """One panel per `run` of `downstream.results.summary_table`'s input: the mean over labels against the
    share of labels, or, of a single share, marks side by side; bands and bars are +- one standard deviation over
    seeds."""
    runs = list(dict.fromkeys(zip(means["run"], means["measure"], strict=True)))
    names = list(_final_values(means, "value").index)
    columns = min(3, len(runs))
    rows = -(-len(runs) // columns)
    wrapped = [_wrapped(name) for name in names]
    lines = sum(text.count("\n") + 1 for text in wrapped)
    size = (4.2 * columns + _width(wrapped) + 0.5, max(3.6 * rows + 0.4, LINE_INCHES * (1.45 * lines + 2)))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    entries = {}
    for axes, (run, measure) in zip(panels, runs, strict=False):
        own = means[means["run"] == run]
        _mean_over_fractions(axes, own, "value", names)
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        sizes = sorted({int(n) for n in own["n"]})
        title = fit_lines(f"{run}: {' / '.join(f'{n:,}' for n in sizes)} test images", 4, 8.5)
        axes.set_title("\n".join(title), fontsize=8.5)
        axes.set_ylabel(MEASURE_WORDS[measure], fontsize=8)
        _finish(axes)
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    figure.legend(
        [entries[text] for text in wrapped],
        wrapped,
        loc="outside right center",
        fontsize=NAME_POINTS,
        frameon=False,
        title="by their mean at the largest share",
        title_fontsize=NAME_POINTS,
    )
    return figure


def _over_fractions(table: pd.DataFrame, measure: str) -> Figure:
    """The mean over labels against the share of training images, each line named where it ends."""
    mean = table[table["label"] == MEAN]
    last = _final_values(mean, measure)
    names = list(last.index)
    texts = [_wrapped(f"{last[name]:.3f}  {name}") for name in names]
    lines = [text.count("\n") + 1.4 for text in texts]
    size = (5.2 + _width(texts), max(4.4, LINE_INCHES * sum(lines) + 1.4))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _mean_over_fractions(axes, mean, measure, names)
    axes.set_ylabel(MEASURE_WORDS[measure], fontsize=8)
    _finish(axes)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    share = np.array(lines) * LINE_INCHES / (size[1] - 1.3)  # of the axes' height, at least
    wanted = [(last[name] - low) / (high - low) for name in names]
    for name, text, place in zip(names, texts, _spread_out(wanted, share), strict=True):
        color = _style(names.index(name))["color"]
        axes.annotate(
            text,
            (100 * mean["fraction"][mean["weights"] == name].max(), last[name]),
            (1.06, place),
            "data",
            "axes fraction",
            annotation_clip=False,
            fontsize=NAME_POINTS,
            va="center",
            arrowprops=dict(arrowstyle="-", color=color, lw=0.6, shrinkA=1, shrinkB=3, relpos=(0, 0.5)),
        )
    return figure


def _final_values(mean: pd.DataFrame, column: str) -> pd.Series:
    """The mean of each weights at their own largest share of labels, the best first."""
    final = mean[mean["fraction"] == mean.groupby("weights")["fraction"].transform("max")]
    return final.groupby("weights", sort=False)[column].mean().sort_values(ascending=False, kind="stable")


def _spread_out(wanted: Sequence[float], sizes: np.ndarray) -> np.ndarray:
    """Places near the wanted ones, which fall, for texts of these sizes that must not overlap, within 0 to 1."""
    below = np.r_[0, np.cumsum((sizes[:-1] + sizes[1:]) / 2)]  # of each text's middle under the first one's
    # Neighbours that would overlap move as one block, to the mean of what its members want.
    blocks: list[list[float]] = []
    for value in np.asarray(wanted) + below:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) < np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    tops = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    return tops.clip(below[-1] + sizes[-1] / 2, max(1 - sizes[0] / 2, below[-1] + sizes[-1] / 2)) - below


def _wrapped(name: str) -> str:
    """A name as matplotlib shows it letter by letter, in lines of `NAME_LETTERS`; nothing is cut."""
    return "\n".join(plain(line) for line in textwrap.wrap(name, NAME_LETTERS) or [""])


def _width(texts: Sequence[str]) -> float:
    """Inches that the longest line takes."""
    return max(len(line) for text in texts for line in text.split("\n")) * LETTER_PER_POINT * NAME_POINTS / 72


def _style(i: int) -> dict:
    """Colour, marker and line of the i-th weights: 63 differ in colour or marker, 28 in colour or line."""
    return dict(
        color=COLORS[i % len(COLORS)],
        marker=MARKERS[i % len(MARKERS)],
        ls=LINE_STYLES[i // len(COLORS) % len(LINE_STYLES)],
        ms=4,
        lw=1.4,
    )


def _mean_over_fractions(axes, mean: pd.DataFrame, column: str, names: Sequence[str]) -> None:
    """A line per weights, with a band of one standard deviation over seeds, or bars where bands would hide one
    another; of a single share of labels a mark per weights with a bar, side by side."""
    fractions = np.sort(mean["fraction"].unique())
    single = len(fractions) == 1
    spreads = 0
    for i, name in enumerate(names):
        by_fraction = mean[mean["weights"] == name].groupby("fraction")[column]
        centre, spread = by_fraction.mean(), by_fraction.std(ddof=1)
        spreads += spread.notna().sum()
        x, style = 100 * centre.index.to_numpy(), _style(i) | {"label": _wrapped(name)}
        if single:
            axes.errorbar([i] * len(centre), centre, yerr=spread.fillna(0), capsize=3, **style)
        elif len(names) > FEW:
            # Side by side, so that the bars do not hide one another.
            x = x * (fractions[-1] / fractions[0]) ** (0.03 * ((i + 0.5) / len(names) - 0.5))
            axes.errorbar(x, centre, yerr=spread.fillna(0), elinewidth=0.7, capsize=1.5, capthick=0.7, **style)
        else:
            axes.plot(x, centre, **style)
            axes.fill_between(x, centre - spread, centre + spread, color=style["color"], alpha=0.18, lw=0)
    share = "share of the training images that have labels"
    bars = "bars" if single or len(names) > FEW else "bands"
    told = f"\n{bars}: ± one standard deviation over seeds" if spreads else ""
    if single:
        axes.set_xticks([])
        axes.set_xlim(-0.7, len(names) - 0.3)
        axes.set_xlabel(f"{share}: {100 * fractions[0]:g}%{told}", fontsize=8)
        return
    axes.set_xscale("log")
    axes.set_xticks(100 * fractions, [f"{100 * fraction:g}%" for fraction in fractions])
    axes.minorticks_off()
    axes.set_xlabel(f"{share}, log scale{told}", fontsize=8)


def _per_label(table: pd.DataFrame, measure: str) -> Figure:
    """A line of marks per label, a colour per weights: mean over seeds, and the interval of the first seed."""
    table, labels = _judged(table, measure)
    names = list(dict.fromkeys(table["weights"]))
    wrapped = [_wrapped(name) for name in names]
    height = 1.6 + len(labels) * (0.16 * len(names) + 0.14)
    size = (6 + _width(wrapped), max(height, LINE_INCHES * "\n".join(wrapped).count("\n") + 1))
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, (name, text) in enumerate(zip(names, wrapped, strict=True)):
        place = np.arange(len(labels)) + 0.5 + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        _intervals(axes, table[table["weights"] == name], measure, "label", labels, place, _style(i), text)
    _rows(axes, list(map(plain, labels)), measure, np.arange(len(labels)) + 0.5, len(labels))
    axes.set_xlabel(_interval_words(measure), fontsize=8)
    figure.legend(loc="outside right center", fontsize=NAME_POINTS, frameon=False)
    return figure


def _per_weights(table: pd.DataFrame, measure: str) -> Figure:
    """A panel per label and for the mean, in each a row per weights, the best mean on top: for more weights than can
    be told apart by colour."""
    names = list(_final_values(table[table["label"] == MEAN], measure).index)
    table, labels = _judged(table, measure)
    columns = min(4, len(labels))
    rows = -(-len(labels) // columns)
    wrapped = [_wrapped(name) for name in names]
    lines = np.array([text.count("\n") + 1.4 for text in wrapped])
    places = np.cumsum(lines) - lines / 2  # rows as high as their names, downwards
    size = (max(6, _width(wrapped) + 2.4 * columns), rows * (0.6 + LINE_INCHES * lines.sum()) + 0.8)
    figure = Figure(figsize=size, dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, label in zip(panels, labels, strict=False):
        style = dict(color=COLORS[0], marker="o", ms=4, lw=1.4)
        _intervals(axes, table[table["label"] == label], measure, "weights", names, places, style)
        axes.set_title(plain(label), fontsize=8.5)
        _rows(axes, wrapped, measure, places, lines.sum())
        axes.tick_params(labelsize=NAME_POINTS)
    for axes in panels[len(labels) :]:
        axes.set_axis_off()
    figure.supxlabel("\n".join(fit_lines(_interval_words(measure), size[0], 8)), fontsize=8)
    return figure


def _intervals(
    axes,
    table: pd.DataFrame,
    measure: str,
    column: str,
    order: Sequence[str],
    place: np.ndarray,
    style: dict,
    text: str = "",
) -> None:
    """Means over seeds at these places, with the interval of the first seed."""
    groups = table.groupby(column, sort=False)
    centre = groups[measure].mean().reindex(order).to_numpy()
    first = groups[["low", "high"]].first().reindex(order).to_numpy()
    # A percentile interval may leave the value outside where there are few images.
    spread = np.clip([centre - first[:, 0], first[:, 1] - centre], 0, None)
    axes.errorbar(centre, place, xerr=np.nan_to_num(spread), label=text, **style | {"ls": "", "lw": 1, "ms": 3.5})


def _judged(table: pd.DataFrame, measure: str) -> tuple[pd.DataFrame, list[str]]:
    """The rows with a value, and their labels; the mean of one label is that label and stands there once."""
    table = table[table[measure].notna()]
    labels = list(dict.fromkeys(table["label"]))
    if len(labels) == 2 and table["label"].iloc[-1] == MEAN:
        labels.remove(MEAN)
    return table, labels


def _rows(axes, texts: Sequence[str], measure: str, places: np.ndarray, height: float) -> None:
    """Rows at these places below the top, named beside the axis."""
    if measure == "auc":
        axes.axvline(0.5, color="0.6", lw=0.8, zorder=0)
    axes.set_ylim(height, 0)
    _finish(axes)
    axes.set_yticks(places, texts)


def _interval_words(measure: str) -> str:
    word = "accuracy" if measure == "accuracy" else "area under the ROC curve"
    return f"{word}, mean over seeds; bars: 95% bootstrap interval over subjects (first seed)"


def _finish(axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.5)
    axes.spines[["top", "right"]].set_visible(False)
