"""The picture of an ablation: the paired difference of each setting to the reference, per label, with its interval."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from downstream.figure import MARKERS
from downstream.results import MEAN
from util.curves import COLORS
from util.figures import plain


def ablation_figure(table: pd.DataFrame, reference: str) -> Figure:
    """One panel per kind of features, a row of marks per label, a colour per setting.

    Args:
        table: of `downstream.ablation.seed_table`.
        reference: the setting that it was made with, for the title.
    """
    table = table[table["difference"].notna()]
    parts, labels, settings = (list(dict.fromkeys(table[name])) for name in ("features", "label", "setting"))
    height = 1.8 + len(labels) * (0.17 * len(settings) + 0.15)
    figure = Figure(figsize=(1.8 + 3.4 * len(parts), height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(parts), sharex=True, sharey=True, squeeze=False)[0]
    for axes, part in zip(panels, parts, strict=True):
        for i, setting in enumerate(settings):
            rows = table[(table["features"] == part) & (table["setting"] == setting)].set_index("label")
            rows = rows.reindex(labels)
            place = np.arange(len(labels)) + (i - (len(settings) - 1) / 2) * 0.8 / len(settings)
            half = np.nan_to_num((rows["diff_high"] - rows["diff_low"]).to_numpy() / 2)
            axes.errorbar(
                rows["difference"],
                place,
                xerr=half,
                label=plain(setting),
                color=COLORS[i % len(COLORS)],
                fmt=MARKERS[i % len(MARKERS)],
                ms=4,
                lw=1.2,
            )
        axes.axvline(0, color="0.4", lw=0.8, zorder=0)
        axes.set_title(plain(part), fontsize=9)
        axes.set_yticks(
            range(len(labels)), [plain(f"{label} of the labels" if label == MEAN else label) for label in labels]
        )
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.25, lw=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    seeds = " or ".join(map(str, sorted(set(table["seeds"]))))
    figure.suptitle(
        plain(
            f"AUC less that of {reference}, paired by seed: mean over {seeds} seeds\n"
            "and its 95% interval (Student's t); right of the line is better"
        ),
        fontsize=9,
    )
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=min(3, len(settings)), fontsize=8, frameon=False)
    return figure
