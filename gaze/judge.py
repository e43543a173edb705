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
from gaze.data import FIXATIONS, TEST, GazeImage, GazeStudy, read_fixations, resize_whole
from gaze.metrics import METRICS, TITLES
from gaze.model import GazeNet
from util.bootstrap import bootstrap_means, interval
from util.files import atomic_write
from util.subjects import MIMIC, overlap_note

JUDGED_AT = (224, 224)  # the grid on which every map is judged: 14 x 14 patches of 16 px
MODEL, PRIOR, READERS = "model", "centre prior", "other readers"
SEVERAL = "images read several times"
DRAWS = 2000


@torch.no_grad()
def judge(model: GazeNet, images: Sequence[GazeImage], device: torch.device) -> pd.DataFrame:
    """Every metric of every predictor against every reading of some images.

    The predictors are the model, its centre prior, and, for images read several times, the mean of the other
    readers' maps. All maps are judged at 224 x 224.

    Returns:
        One row per predictor and reading: predictor, subject, image, reading, several (whether the image was
        read several times), and the metrics of `gaze.metrics`; NaN if the tree has no fixations of the reading.
    """
    tables = {image.tree: read_fixations(image.tree.root / FIXATIONS) for image in images}
    fixations = {  # of a reading that has some: int64 [n, 2]
        (image, reading): saliency.fixation_pixels(*tables[image.tree][reading].T[:2], JUDGED_AT)
        for image in images
        for reading in image.readings
        if reading in tables[image.tree]
    }
    prior = _at_judged_size(model.log_prior[None])
    rows = []
    for image in images:
        _, predicted, levels = predict_image(model, image, device)
        elsewhere = [pixels for (other, _), pixels in fixations.items() if other.subject != image.subject]
        for place, (reading, target) in enumerate(zip(image.readings, levels, strict=True)):
            predictions = {MODEL: predicted, PRIOR: prior}
            if len(levels) > 1:
                others = torch.cat([levels[:place], levels[place + 1 :]])
                predictions[READERS] = saliency.density_of_levels(others).mean(0)
            for predictor, prediction in predictions.items():
                values = {name: getattr(saliency, name)(prediction, target) for name in saliency.MAP_METRICS}
                if (own := fixations.get((image, reading))) is not None:
                    values["nss"] = saliency.nss(prediction, own)
                    values["auc_judd"] = saliency.auc_judd(prediction, own)
                    if elsewhere:
                        values["auc_shuffled"] = saliency.auc_shuffled(prediction, own, torch.cat(elsewhere))
                about = (predictor, image.subject, image.name, reading, len(levels) > 1)
                rows.append([*about, *(float(values.get(name, np.nan)) for name in METRICS)])
    return pd.DataFrame(rows, columns=["predictor", "subject", "image", "reading", "several", *METRICS])


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric for each predictor, with a 95% interval.

    Readings are averaged over an image, images over all. The interval comes from draws of whole subjects with
    replacement (percentiles). Differences are of the same images, drawn together, so their intervals are those of paired
    values. Other readers exist for images read several times only, and are compared with the model on these.

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
        lines += [
            (name, metric, *interval(means[:, column]), n)
            for column, (metric, n) in enumerate(table.notna().sum().items())
            if n
        ]
    return pd.DataFrame(lines, columns=["predictor", "metric", "value", "low", "high", "n"])


def format_table(summary: pd.DataFrame) -> str:
    """The summary as text: a line per predictor, a column per metric, intervals in brackets."""
    cells = summary.assign(
        cell=[
            f"{value:.3f}" + ("" if np.isnan(low) else f" [{low:.3f}, {high:.3f}]")  # of one subject no interval
            for value, low, high in summary[["value", "low", "high"]].to_numpy()
        ]
    )
    table = cells.pivot(index="predictor", columns="metric", values="cell")
    table = table.loc[cells["predictor"].unique(), cells["metric"].unique()].fillna("-").rename(columns=TITLES)
    table.insert(0, "images", cells.groupby("predictor")["n"].max())
    return table.rename_axis(None).rename_axis(None, axis=1).to_string()


def write_judgement(model: GazeNet, study: GazeStudy, out: Path, device: torch.device) -> str:
    """Judge a model on the test images; writes readings.csv, metrics.csv, metrics.png and examples.png to `out`, and
    returns what to print: notes and the table."""
    from gaze.pictures import Example, examples_figure, metrics_figure  # here, since matplotlib takes a second to load
    from util.figures import save_figure

    images = study.part(TEST)
    rows = judge(model, images, device)
    summary = summarise(rows)
    for name, table in (("readings.csv", rows), ("metrics.csv", summary)):
        with atomic_write(out / name, "w") as file:
            table.to_csv(file, index=False)
    own = rows[rows["predictor"] == MODEL]
    is_made_up = any(image.tree.entries[index].get("simulated") for image in images for index in image.entries)
    title = f"{out.name} on {', '.join(str(tree.root) for tree in study.trees)}: {len(images)} test images, "
    title += f"{len(own)} readings{', SIMULATED GAZE' if is_made_up else ''}"
    note = overlap_note("the encoder", model.encoder_seen, own["subject"], MIMIC)
    title = f"{title}\n{note}".strip()
    save_figure(metrics_figure(summary, model=MODEL, title=title), out / "metrics.png")

    scores = own.groupby("image")["cc"].mean()
    order = sorted(images, key=lambda image: -scores[image.name])
    middle = max(0, len(order) // 2 - 1)
    chosen = {"best": order[:3], "median": order[middle : middle + 3], "worst": order[-3:]}

    def example(image: GazeImage) -> Example:
        gray, predicted, levels = predict_image(model, image, device)
        return Example(image.readings[0], gray, levels, predicted, f"CC {scores[image.name]:.2f}")

    groups = [(heading, [example(image) for image in some]) for heading, some in chosen.items()]
    save_figure(examples_figure(groups, title=title), out / "examples.png")
    lines = [note, format_table(summary), f"wrote metrics.csv, readings.csv, metrics.png, examples.png to {out}"]
    if lacking := int(own["nss"].isna().sum()):
        lines.insert(
            0,
            f"note: {lacking} of {len(own)} test readings have no fixations in their tree's {FIXATIONS}, so no NSS and no "
            "AUC (prepare it again)",
        )
    return "\n".join(filter(None, lines))


@torch.no_grad()
def predict_image(model: GazeNet, image: GazeImage, device: torch.device) -> tuple[np.ndarray, Tensor, Tensor]:
    """Radiograph [224, 224] in 0..1, predicted density [224, 224], and the readings' heatmaps, uint8 [R, 224, 224]."""
    plane, levels = image.read(JUDGED_AT[0])
    predicted = _at_judged_size(model(resize_whole(plane, model.input_size)[None].to(device)))
    return resize_whole(plane, JUDGED_AT[0])[0].numpy() / 255, predicted, levels


def _at_judged_size(log_density: Tensor) -> Tensor:
    """float64 [224, 224] from a logarithm [1, G, G]."""
    return saliency.resize_density(log_density.cpu().double().exp(), JUDGED_AT)[0]
