"""Text in figures: letter by letter, and never cut."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from downstream.figure import results_figure, summary_figure
from downstream.results import MEAN


def made_up_results(n: int, fractions: list[float]) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = [f"_encoder $ {i:02d}" + " of a long name" * (i == 7) for i in range(n)]
    rows = list(itertools.product(names, fractions, (43, 44), ("A", MEAN)))
    table = pd.DataFrame(rows, columns="weights fraction seed label".split())
    return table.assign(dataset="x", method="linear", auc=rng.random(len(rows)), low=0, high=1, n=9, n_positive=5)


@pytest.mark.parametrize("summary", [False, True])
def test_the_legend_names_each_of_many_encoders(summary):
    table = made_up_results(25, [0.01, 1.0])
    means = table[table["label"] == MEAN].assign(measure="auc", value=table["auc"], run="x linear")
    figure = summary_figure(means) if summary else results_figure(table, "title")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    texts = [text.get_text().replace("\n", " ").partition("_")[2] for text in legend.get_texts()]
    assert texts == [name[1:].replace("$", r"\$") for name in table["weights"].unique()]
    box = legend.get_window_extent()
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1
    styles = {(line.get_color(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(styles) == 25


def test_the_mean_over_seeds_stands_at_its_share_of_labels():
    table = made_up_results(2, [0.1, 1.0])
    (axes,) = results_figure(table, "title").axes
    for name, bars in zip(table["weights"].unique(), axes.containers, strict=True):
        own = table[(table["weights"] == name) & (table["label"] == MEAN)].groupby("fraction")["auc"]
        np.testing.assert_allclose(bars.lines[0].get_ydata().astype(float), own.mean())
        np.testing.assert_allclose(bars.lines[0].get_xdata().astype(float), [10, 100], rtol=0.1)
        ends = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
        np.testing.assert_allclose(ends, np.stack([own.mean() - own.std(), own.mean() + own.std()], 1))
