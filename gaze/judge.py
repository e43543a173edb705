"""Judging a gaze predictor on the test images: every metric of every reading, means with intervals over subjects, a
table and two pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from gaze import metrics as saliency
from gaze.data import TEST, GazeImage, GazeStudy, resize_whole
from gaze.metrics import LOWER_IS_BETTER, METRICS, TITLES
from gaze.model import GazeNet
from util.bootstrap import bootstrap_means, interval
from util.files import atomic_write
from util.subjects import MIMIC, overlap_note

JUDGED_AT = (224, 224)  # the grid on which every map is judged: 14 x 14 patches of 16 px
MODEL, PRIOR, READERS = "model", "centre prior", "other readers"
SEVERAL = "images read several times"
DRAWS = 2000


@torch.no_grad()
def judge(model: GazeNet, study: GazeStudy, images: Sequence[GazeImage], device: torch.device) -> pd.DataFrame:
    """Every metric of every predictor against every reading of some images.

    The predictors are the model, its centre prior, and, for images read several times, the mean of the other
    readers' maps. All maps are judged at 224 x 224.

    Returns:
        One row per predictor and reading: predictor, subject, image, reading, several (whether the image was
        read several times), and the metrics of `gaze.metrics`; NaN where a tree keeps no fixations.
    """
    model.eval()
    fixations = {}  # of a reading that has some, by image and place: int64 [n, 2]
    for number, image in enumerate(images):
        for place in range(len(image.entries)):
            if (found := study.fixations(image, place)) is not None:
                fixations[number, place] = saliency.fixation_pixels(found[:, 0], found[:, 1], JUDGED_AT)
    prior = _at_judged_size(model.log_prior[None])
    rows = []
    for number, image in enumerate(images):
        _, predicted, levels = predict_image(model, study, image, device)
        elsewhere = [pixels for (other, _), pixels in fixations.items() if images[other].subject != image.subject]
        for place, target in enumerate(levels):
            predictions = {MODEL: predicted, PRIOR: prior}
            if len(levels) > 1:
                others = torch.cat([levels[:place], levels[place + 1 :]])
                predictions[READERS] = saliency.density_of_levels(others).mean(0)
            for predictor, prediction in predictions.items():
                values = {name: getattr(saliency, name)(prediction, target) for name in saliency.MAP_METRICS}
                if (own := fixations.get((number, place))) is not None:
                    values["nss"] = saliency.nss(prediction, own)
                    values["auc_judd"] = saliency.auc_judd(prediction, own)
                    if elsewhere:
                        values["auc_shuffled"] = saliency.auc_shuffled(prediction, own, torch.cat(elsewhere))
                about = (predictor, image.subject, study.name(image), study.reading_id(image, place), len(levels) > 1)
                rows.append([*about, *(float(values.get(name, np.nan)) for name in METRICS)])
    return pd.DataFrame(rows, columns=["predictor", "subject", "image", "reading", "several", *METRICS])


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric for each predictor, with a 95% interval.

    A reading is judged, the readings of an image are averaged, and images are averaged; the interval comes from
    draws of whole subjects with replacement (percentiles). Differences are of the same images, drawn together, so their
    intervals are those of paired values. Other readers are there for images read several times only, and are compared
    with the model on these.

    Args:
        rows: of `judge`.

    Returns:
        Columns predictor, metric, value, low, high, n (images). A metric that no reading has is left out.
    """
    per_image = rows.groupby(["predictor", "several", "subject", "image"])[list(METRICS)].mean()
    tables = {name: per_image.loc[name] for name in (MODEL, PRIOR)}
    tables[f"{MODEL} - {PRIOR}"] = tables[MODEL] - tables[PRIOR]
    if rows["several"].any():
        shared = {name: per_image.xs((name, True), level=(0, 1)) for name in (MODEL, PRIOR, READERS)}
        shared[f"{MODEL} - {READERS}"] = shared[MODEL] - shared[READERS]
        tables |= {f"{name}, {SEVERAL}": table for name, table in shared.items()}
    lines = []
    for name, table in tables.items():
        subjects = table.index.get_level_values("subject").to_numpy()
        means = bootstrap_means(table.to_numpy(dtype=np.float64), subjects, draws=DRAWS, seed=0)
        for column, metric in enumerate(METRICS):
            if n := int(table[metric].notna().sum()):
                lines.append((name, metric, *interval(means[:, column]), n))
    return pd.DataFrame(lines, columns=["predictor", "metric", "value", "low", "high", "n"])


def format_table(summary: pd.DataFrame) -> str:
    """The summary as text: a line per predictor, a column per metric, intervals in brackets."""

    def cell(value: float, low: float, high: float) -> str:
        return f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")  # of one subject no interval

    metrics = [metric for metric in METRICS if (summary["metric"] == metric).any()]
    lines = [["", "images", *(f"{TITLES[m]}{' (less is better)' if m in LOWER_IS_BETTER else ''}" for m in metrics)]]
    for name in summary["predictor"].unique():
        own = summary[summary["predictor"] == name].set_index("metric")
        cells = [cell(*own.loc[m, ["value", "low", "high"]]) if m in own.index else "-" for m in metrics]
        lines.append([name, str(own["n"].max()), *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def write_judgement(model: GazeNet, study: GazeStudy, out: Path, device: torch.device) -> str:
    """Judge a model on the test images; writes readings.csv, metrics.csv, metrics.png and examples.png to `out`, and
    returns the table as text."""
    from gaze.pictures import Example, examples_figure, metrics_figure  # here, since matplotlib takes a second to load
    from util.figures import save_figure

    images = study.part(TEST)
    rows = judge(model, study, images, device)
    summary = summarise(rows)
    for name, table in (("readings.csv", rows), ("metrics.csv", summary)):
        with atomic_write(out / name, "w") as file:
            table.to_csv(file, index=False)
    entries = [study.trees[image.tree].entries[index] for image in images for index in image.entries]
    made_up = ", SIMULATED GAZE" if any(entry.get("simulated") for entry in entries) else ""
    trees = ", ".join(str(tree.root) for tree in study.trees)
    title = f"{out.name} on {trees}: {len(images)} test images, {len(entries)} readings{made_up}"
    if note := overlap_note("the encoder", model.encoder_seen, (image.subject for image in images), MIMIC):
        title += f"\n{note}"
    save_figure(metrics_figure(summary, model=MODEL, title=title), out / "metrics.png")

    own = rows[rows["predictor"] == MODEL].groupby("image")["cc"].mean()
    order = sorted(range(len(images)), key=lambda number: (-own[study.name(images[number])], number))
    middle = max(0, len(order) // 2 - 1)
    chosen = {"best": order[:3], "median": order[middle : middle + 3], "worst": order[-3:]}

    def example(number: int) -> Example:
        gray, predicted, levels = predict_image(model, study, images[number], device)
        note = f"CC {own[study.name(images[number])]:.2f}"
        return Example(study.reading_id(images[number], 0), gray, levels, predicted, note)

    groups = [(heading, [example(number) for number in numbers]) for heading, numbers in chosen.items()]
    save_figure(examples_figure(groups, title=title), out / "examples.png")
    written = "metrics.csv, readings.csv, metrics.png, examples.png"
    return f"{note}\n{format_table(summary)}".strip() + f"\nwrote {written} to {out}"


@torch.no_grad()
def predict_image(
    model: GazeNet, study: GazeStudy, image: GazeImage, device: torch.device
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Radiograph [224, 224] in 0..1, predicted density [224, 224], and the readings' heatmaps, uint8 [R, 224, 224]."""
    plane = study.planes(image)[0]
    gray = resize_whole(plane, JUDGED_AT[0])[0].numpy() / 255
    predicted = _at_judged_size(model(resize_whole(plane, model.input_size)[None].to(device)))
    return gray, predicted, study.levels(image, JUDGED_AT[0])


def _at_judged_size(log_density: Tensor) -> Tensor:
    """float64 [224, 224] from a logarithm [1, G, G]."""
    return saliency.resize_density(log_density.cpu().double().exp(), JUDGED_AT)[0]
