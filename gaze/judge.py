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
from gaze.metrics import FIXATION_METRICS, MAP_METRICS, TITLES
from gaze.model import GazeNet
from util.bootstrap import bootstrap_means, interval
from util.files import atomic_write
from util.subjects import MIMIC, overlap_note

JUDGED_AT = (224, 224)  # the grid on which every map is judged: 14 x 14 patches of 16 px
MODEL, PRIOR, READERS = "model", "centre prior", "other readers"
SEVERAL = "images read several times"
DRAWS = 2000
EXAMPLES = 9  # images in examples.png, from the best to the worst


@torch.no_grad()
def judge(model: GazeNet, images: Sequence[GazeImage], device: torch.device) -> pd.DataFrame:
    """Every metric of every predictor against every reading of some images.

    The predictors are the model, its centre prior, and, for images read several times, the mean of the other
    readers' maps. All maps are judged at 224 x 224.

    Returns:
        One row per predictor and reading: predictor, subject, image, reading, several (whether the image was
        read several times), and the metrics of `gaze.metrics`; NaN if the tree has no fixations of the reading.
    """
    tables = {tree: read_fixations(tree.root / FIXATIONS) for tree in {image.tree for image in images}}
    fixations = {  # of a reading that has some: int64 [n, 2]
        (image, reading): saliency.fixation_pixels(*tables[image.tree][reading].T, JUDGED_AT)
        for image in images
        for reading in image.readings
        if reading in tables[image.tree]
    }
    none = torch.empty(0, 2, dtype=torch.int64)
    prior = _at_judged_size(model.log_prior[None])
    rows = []
    for image in images:
        _, predicted, levels = predict_image(model, image, device)
        others = torch.cat([none, *(own for (other, _), own in fixations.items() if other.subject != image.subject)])
        for place, (reading, target) in enumerate(zip(image.readings, levels, strict=True)):
            predictions = {MODEL: predicted, PRIOR: prior}
            if several := len(levels) > 1:
                rest = torch.cat([levels[:place], levels[place + 1 :]])
                predictions[READERS] = saliency.density_of_levels(rest).mean(0)
            own = fixations.get((image, reading))
            for predictor, prediction in predictions.items():
                about = (predictor, image.subject, image.name, reading, several)
                values = [metric(prediction, target) for metric in MAP_METRICS.values()]
                if own is not None:
                    values += [metric(prediction, own, others) for metric in FIXATION_METRICS.values()]
                rows.append([*about, *map(float, values)])
    names = ["predictor", "subject", "image", "reading", "several", *TITLES]
    return pd.DataFrame(rows).reindex(columns=range(len(names))).set_axis(names, axis=1)


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
    lines = []
    for suffix, part, other in (
        ("", rows[rows["predictor"] != READERS], PRIOR),
        (f", {SEVERAL}", rows[rows["several"]], READERS),
    ):
        per_image = part.groupby(["predictor", "several", "subject", "image"])[[*TITLES]].mean()
        tables = {name: per_image.loc[name] for name in part["predictor"].unique()}
        if tables:
            tables[f"{MODEL} - {other}"] = tables[MODEL] - tables[other]
        for name, table in tables.items():
            subjects = table.index.get_level_values("subject").to_numpy()
            means = bootstrap_means(table.to_numpy(dtype=np.float64), subjects, draws=DRAWS, seed=0)
            lines += [
                (name + suffix, metric, *interval(means[:, column]), n)
                for column, (metric, n) in enumerate(table.notna().sum().items())
                if n
            ]
    return pd.DataFrame(lines, columns=["predictor", "metric", "value", "low", "high", "n"])


def write_judgement(model: GazeNet, study: GazeStudy, out: Path, device: torch.device) -> str:
    """Judge a model on the test images of subjects that it has not seen; writes readings.csv, metrics.csv, metrics.png
    and examples.png to `out`, and returns what to print: notes and the table."""
    from gaze.pictures import example, examples_figure, metrics_figure  # here, since matplotlib takes a second to load
    from util.figures import save_figure

    notes = [study.leave_out(model.seen)]
    images = study.parts[TEST]
    rows = judge(model, images, device)
    summary = summarise(rows)
    for name, table in (("readings.csv", rows), ("metrics.csv", summary)):
        with atomic_write(out / name, "w") as file:
            table.to_csv(file, index=False)
    own = rows[rows["predictor"] == MODEL]
    note = overlap_note("the encoder", model.encoder_seen, own["subject"], MIMIC)
    title = f"{out.name} on {', '.join(str(tree.root) for tree in study.trees)}: {len(images)} test images"
    if any(image.tree.entries[index].get("simulated") for image in images for index in image.entries):
        title += ", SIMULATED GAZE"
    title = f"{title}\n{note}".strip()
    save_figure(metrics_figure(summary, title=title), out / "metrics.png")
    scores = own.groupby("image")["cc"].mean()
    order = sorted(images, key=lambda image: -scores[image.name])
    lines = [
        example(f"{image.readings[0]}\nCC {scores[image.name]:.2f}", *predict_image(model, image, device))
        for image in (order[place] for place in np.unique(np.linspace(0, len(order) - 1, EXAMPLES, dtype=int)))
    ]
    save_figure(examples_figure(lines, title=title), out / "examples.png")
    if lacking := int(own["nss"].isna().sum()):
        notes.append(
            f"note: {lacking} of {len(own)} test readings have no fixations in their tree's {FIXATIONS}, so no NSS and no "
            "AUC (prepare it again)"
        )
    cells = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in summary.itertuples()]
    table = summary.assign(cell=cells).set_index(["predictor", "metric"])["cell"].unstack(sort=False)
    notes += [note, table.rename_axis(index=None, columns=None).to_string()]
    return "\n".join([*filter(None, notes), f"wrote metrics.csv, readings.csv, metrics.png, examples.png to {out}"])


@torch.no_grad()
def predict_image(model: GazeNet, image: GazeImage, device: torch.device) -> tuple[np.ndarray, Tensor, Tensor]:
    """Radiograph [224, 224] in 0..1, predicted density [224, 224], and the readings' heatmaps, uint8 [R, 224, 224]."""
    plane, levels = image.read(JUDGED_AT[0])
    predicted = _at_judged_size(model(resize_whole(plane, model.input_size)[None].to(device)))
    return resize_whole(plane, JUDGED_AT[0])[0].numpy() / 255, predicted, levels


def _at_judged_size(log_density: Tensor) -> Tensor:
    """float64 [224, 224] from a logarithm [1, G, G]."""
    return saliency.resize_density(log_density.cpu().double().exp(), JUDGED_AT)[0]
