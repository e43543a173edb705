"""How predictors of gaze compare: means over images, with intervals over subjects, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from gaze.metrics import FIXATION_METRICS, LOWER_IS_BETTER, MAP_METRICS
from util.bootstrap import bootstrap_means, interval
from util.figures import fit_lines

METRICS = (*MAP_METRICS, *FIXATION_METRICS)
TITLES = {
    "cc": "CC",
    "kld": "KLD",
    "sim": "SIM",
    "patch_iou": "patch IoU",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
    "auc_shuffled": "shuffled AUC",
}
SEVERAL = "images read several times"
DRAWS = 2000


def summarise(
    rows: pd.DataFrame, *, model: str, prior: str, readers: str, draws: int = DRAWS, seed: int = 0
) -> pd.DataFrame:
    """Mean of each metric for each predictor, with a 95% interval.

    A reading is judged, the readings of an image are averaged, and images are averaged; the interval comes from
    `draws` draws of whole subjects with replacement (percentiles). Differences are of the same images, drawn
    together, so their intervals are those of paired values.

    Args:
        rows: of `gaze.engine.judge`.
        model, prior, readers: names of its predictors. The last is there for images read several times only, and
            is compared with the others on these.

    Returns:
        Columns predictor, metric, value, low, high, n (images). A metric that no reading has is left out.
    """
    per_image = rows.groupby(["predictor", "several", "subject", "image"], sort=True)[list(METRICS)].mean()
    tables = {name: per_image.loc[name] for name in (model, prior)}
    lines = [
        _lines(model, tables[model], draws, seed),
        _lines(prior, tables[prior], draws, seed),
        _lines(f"{model} - {prior}", tables[model] - tables[prior], draws, seed),
    ]
    if rows["several"].any():
        shared = {name: _several(per_image.loc[name]) for name in (model, prior, readers)}
        lines += [_lines(f"{name}, {SEVERAL}", table, draws, seed) for name, table in shared.items()]
        difference = shared[model] - shared[readers]
        lines.append(_lines(f"{model} - {readers}, {SEVERAL}", difference, draws, seed))
    return pd.DataFrame([line for group in lines for line in group])


def _several(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.index.get_level_values("several").to_numpy(dtype=bool)]


def _lines(name: str, table: pd.DataFrame, draws: int, seed: int) -> list[dict]:
    subjects = table.index.get_level_values("subject").to_numpy()
    means = bootstrap_means(table.to_numpy(dtype=np.float64), subjects, draws=draws, seed=seed)
    lines = []
    for column, metric in enumerate(table.columns):
        n = int(table[metric].notna().sum())
        if n:
            value, low, high = interval(means[:, column])
            lines.append({"predictor": name, "metric": metric, "value": value, "low": low, "high": high, "n": n})
    return lines


def format_table(summary: pd.DataFrame) -> str:
    """The summary as text: a line per predictor, a column per metric, intervals in brackets."""
    metrics = [metric for metric in METRICS if (summary["metric"] == metric).any()]
    lines = [["", "images", *(f"{TITLES[m]}{' (less is better)' if m in LOWER_IS_BETTER else ''}" for m in metrics)]]
    for name in summary["predictor"].unique():
        own = summary[summary["predictor"] == name].set_index("metric")
        cells = [_with_interval(*own.loc[m, ["value", "low", "high"]]) if m in own.index else "-" for m in metrics]
        lines.append([name, str(own["n"].max()), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _with_interval(value: float, low: float, high: float) -> str:
    """Of a single subject there is no interval."""
    return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")


def metrics_figure(summary: pd.DataFrame, *, model: str, title: str = "") -> Figure:
    """One panel per metric, one interval per predictor, under a title that says of what; differences are left to the
    table."""
    shown = summary[~summary["predictor"].str.contains(" - ", regex=False)]
    metrics = [metric for metric in METRICS if (shown["metric"] == metric).any()]
    names: Sequence[str] = list(shown["predictor"].unique())
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
