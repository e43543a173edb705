"""Text in figures: letter by letter, and never cut."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from downstream.figure import results_figure, summary_figure
from downstream.results import MEAN
from gaze.pictures import Example, examples_figure, metrics_figure
from models_cxrmim import CXRMIM
from scripts.plot_log import loss_figure
from util.pictures import contact_sheet, reconstruction_figure

# One "$" pair is a formula to matplotlib, and a broken one an error; a label with "_" first is left out.
ODD = r"_runs/$\frac$ of a_b$ with 100% " + "and/a/long-path " * 12


def reconstruction() -> Figure:
    return reconstruction_figure(*made_up_batch(), names=[ODD], title=ODD)


def sheet() -> Figure:
    return contact_sheet(*made_up_batch(), names=[ODD], title=ODD)


def made_up_batch():
    model = CXRMIM(
        img_size=32,
        embed_dim=16,
        depth=1,
        num_heads=1,
        decoder_embed_dim=16,
        decoder_num_heads=1,
        id_list=(0,),
        scale_list=(2.0,),
    )
    batch = {"img": torch.zeros(1, 1, 32, 32, dtype=torch.uint8), "attention": torch.rand(1, 32, 32)}
    return model, batch, torch.tensor([[1.0, 1.0, 1.0, 0.0]])


def losses() -> Figure:
    log = [{"epoch": epoch, "train_loss": 1.0, "train_loss_scale_4.0": 1.0} for epoch in range(2)]
    return loss_figure({ODD[:60]: log, "b": log})


def results() -> Figure:
    row = {"fraction": 1.0, "seed": 0, "auc": 0.6, "low": 0.5, "high": 0.7}
    table = pd.DataFrame([row | {"weights": ODD[:50], "label": label} for label in ("_$a$", MEAN)])
    return results_figure(table, [ODD, ODD])


def metrics() -> Figure:
    row = {"predictor": "model", "value": 0.6, "low": 0.5, "high": 0.7, "n": 3}
    return metrics_figure(
        pd.DataFrame([row | {"metric": metric} for metric in ("cc", "kld", "sim")]), model="model", title=ODD
    )


def examples() -> Figure:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (1, 32, 32), generator=generator, dtype=torch.uint8)
    one = Example(ODD, np.zeros((32, 32)), levels, torch.rand(32, 32, generator=generator), "CC 0.5")
    return examples_figure([("best", [one])], title=ODD)


@pytest.mark.parametrize("draw", [reconstruction, sheet, losses, results, metrics, examples])
def test_no_text_is_cut_or_read_as_a_formula(draw):
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    ticks = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        for label in (tick.label1, tick.label2)  # those out of view are there too
    }
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text not in ticks]
    assert any(r"\frac" in text.get_text() for text in texts)
    for text in texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < width + 2 and box.y1 < height + 2, text.get_text()
    assert all(legend.get_texts() for legend in figure.legends)


def made_up_results(n: int, fractions: list[float]) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [
        [
            f"_encoder $ {i:02d}" + " of a long name" * (i == 7),
            "x",
            "linear",
            fraction,
            seed,
            label,
            rng.random(),
            0,
            1,
            9,
            5,
        ]
        for i in range(n)
        for fraction in fractions
        for seed in (43, 44)
        for label in ("A", MEAN)
    ]
    columns = "weights dataset method fraction seed label auc low high n n_positive".split()
    return pd.DataFrame(rows, columns=columns)


@pytest.mark.parametrize("fractions", [[0.01, 1.0], [1.0]], ids=["over fractions", "one fraction"])
def test_many_encoders_are_named_from_the_best_on_and_no_name_hides_another(fractions):
    table = made_up_results(25, fractions)
    figure = results_figure(table, ["title"])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,) = figure.axes
    texts = axes.texts if len(fractions) > 1 else axes.get_yticklabels()
    final = table[(table["fraction"] == 1) & (table["label"] == MEAN)].groupby("weights")["auc"].mean()
    wanted = final.sort_values(ascending=False).index
    assert [text.get_text().replace("\n", " ").partition("_")[2] for text in texts] == [
        name[1:].replace("$", r"\$") for name in wanted
    ]
    boxes = [Text.get_window_extent(text) for text in texts]  # without its line
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
    styles = {(line.get_color(), line.get_linestyle()) for line in axes.lines if len(line.get_xdata()) > 1}
    assert len(styles) >= (25 if len(fractions) > 1 else 1)


def test_models_of_other_shares_of_labels_end_where_theirs_is():
    """As --method evaluate judges them."""
    table = made_up_results(2, [0.1, 1.0])
    first, second = table["weights"].unique()
    table = table[(table["weights"] == first) == (table["fraction"] == 1)]
    (axes,) = results_figure(table, ["title"]).axes
    for text in axes.texts:
        (name,) = (name for name in (first, second) if name[9:13] in text.get_text())
        own = table[(table["weights"] == name) & (table["label"] == MEAN)]
        assert text.get_text().startswith(f"{own['auc'].mean():.3f}")
        assert text.xy[0] == 100 * own["fraction"].iloc[0]
    assert len(axes.texts) == 2


def test_the_summary_of_many_encoders_names_each_and_tells_what_its_bars_are():
    table = made_up_results(25, [0.1, 1.0])
    means = table[table["label"] == MEAN].assign(measure="auc", value=table["auc"], run="x linear")
    figure = summary_figure(means)
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 25
    box = legend.get_window_extent()
    assert box.y0 >= 0 and box.y1 <= figure.bbox.y1 and box.x1 <= figure.bbox.x1
    assert "bars: ± one standard deviation over seeds" in figure.axes[0].get_xlabel()
