"""The gaze predictor: the losses of a batch for the training loop (`util.training`), validation and judgement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Subset

from gaze import metrics as saliency
from gaze.data import TEST, GazeImage, GazeSamples, GazeStudy, resize_whole
from gaze.model import GazeNet
from util.distributed import Ranks
from util.files import atomic_write
from util.loading import SampleLoader
from util.stop import ignore_stop_signals
from util.subjects import MIMIC, overlap_note
from util.training import Training

JUDGED_AT = 224  # side of the grid on which every map is judged: 14 x 14 patches of 16 px
MODEL, PRIOR, READERS = "model", "centre prior", "other readers"


@dataclass(frozen=True)
class Best:
    """The epoch (from 0) with the lowest validation KLD so far, and its scores."""

    epoch: int = -1
    kld: float = math.inf
    cc: float = -math.inf

    def after(self, epoch: int, scores: Mapping[str, float]) -> tuple[Best, bool]:
        """The best after a further epoch, and whether that is it."""
        if scores["val_kld"] < self.kld:
            return Best(epoch, scores["val_kld"], scores["val_cc"]), True
        return self, False

    def is_stale(self, epochs_done: int, patience: int) -> bool:
        """Whether the last `patience` epochs were all worse."""
        return epochs_done - 1 - self.epoch >= patience


def batch_losses(training: Training, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss [1] of this rank's next batch; and its KLD and CC, [2]."""
    img, target = (batch[key].to(training.ranks.device, non_blocking=True) for key in ("img", "target"))
    with training.autocast():
        log_p = training.model(img)  # [B, G, G]
    kld = saliency.log_kld(log_p, target).mean()
    cc = saliency.cc(log_p.exp(), target).mean().float()
    return kld[None], torch.stack([kld.detach().double(), cc.detach().double()])


def name_means(means: list[float]) -> dict[str, float]:
    """Names, in TensorBoard, of the means [2] of what `batch_losses` gives."""
    return {"train_kld": means[0], "train_cc": means[1]}


@torch.no_grad()
def validate(model: GazeNet, samples: GazeSamples, ranks: Ranks, *, batch_size: int, dtype: str, workers: int) -> dict:
    """Mean KLD and CC over images, of the map against their mean target, on the map's own grid.

    The ranks share the images; the result is the same for any number of them, but for the batches' rounding.
    """
    model.eval()
    mine = range(ranks.rank, len(samples), ranks.world_size)
    loader = SampleLoader(
        Subset(samples, mine), batch_size=batch_size, num_workers=workers, worker_init_fn=ignore_stop_signals
    )
    kind = getattr(torch, dtype)
    values = []
    for batch in loader:
        with torch.autocast(ranks.device.type, kind, enabled=kind != torch.float32):
            log_p = model(batch["img"].to(ranks.device))
        log_p, target = log_p.double().cpu(), batch["target"].double()
        values.append(torch.stack([saliency.log_kld(log_p, target), saliency.cc(log_p.exp(), target)], 1))
    own = torch.cat(values).tolist() if values else []
    of_all = [row for group in zip(mine, own, strict=True) for row in [group]]
    gathered = sorted(row for rows in ranks.gather(of_all) for row in rows)
    means = np.mean([row for _, row in gathered], axis=0)
    return {"val_kld": float(means[0]), "val_cc": float(means[1])}


def centre_prior(samples: GazeSamples, workers: int) -> Tensor:
    """Mean of the training images' targets: float64 [G, G], of sum 1. Reads every heatmap once."""
    loader = SampleLoader(samples, batch_size=32, num_workers=workers, worker_init_fn=ignore_stop_signals)
    total = sum(batch["target"].double().sum(0) for batch in loader)
    return total / total.sum()


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
    fixations = _pixels_of_fixations(study, images)
    subjects = np.array([subject for subject, _ in fixations.values()])
    prior = _at_judged_size(model.log_prior[None])
    rows = []
    for number, image in enumerate(images):
        _, predicted, levels = predict_image(model, study, image, device)
        several = len(levels) > 1
        for place, target in enumerate(levels):
            predictions = {MODEL: predicted, PRIOR: prior}
            if several:
                others = torch.cat([levels[:place], levels[place + 1 :]])
                predictions[READERS] = saliency.density_of_levels(others).mean(0)
            key = (number, place)
            for predictor, prediction in predictions.items():
                row: dict[str, Any] = {
                    "predictor": predictor,
                    "subject": image.subject,
                    "image": study.name(image),
                    "reading": study.reading_id(image, place),
                    "several": several,
                }
                row |= {name: float(getattr(saliency, name)(prediction, target)) for name in saliency.MAP_METRICS}
                if key in fixations:
                    own = fixations[key][1]
                    elsewhere = [f for (s, f), differs in zip(fixations.values(), subjects != image.subject) if differs]
                    row |= _fixation_metrics(prediction, own, torch.cat(elsewhere) if elsewhere else None)
                rows.append(row)
    columns = ["predictor", "subject", "image", "reading", "several", *saliency.MAP_METRICS, *saliency.FIXATION_METRICS]
    return pd.DataFrame(rows).reindex(columns=columns)


def _pixels_of_fixations(study: GazeStudy, images: Sequence[GazeImage]) -> dict[tuple[int, int], tuple[str, Tensor]]:
    """Subject and pixels, int64 [n, 2], of the fixations of each reading that has some, by (image, reading)."""
    found = {}
    for number, image in enumerate(images):
        for place in range(len(image.entries)):
            values = study.fixations(image, place)
            if values is not None:
                pixels = saliency.fixation_pixels(values[:, 0], values[:, 1], (JUDGED_AT, JUDGED_AT))
                found[number, place] = (image.subject, pixels)
    return found


def _fixation_metrics(prediction: Tensor, own: Tensor, elsewhere: Tensor | None) -> dict[str, float]:
    values = {"nss": saliency.nss(prediction, own), "auc_judd": saliency.auc_judd(prediction, own)}
    if elsewhere is not None:
        values["auc_shuffled"] = saliency.auc_shuffled(prediction, own, elsewhere)
    return {name: float(value) for name, value in values.items()}


def describe_run(args, core: GazeNet, study: GazeStudy, steps: int, told: str, ranks: Ranks) -> str:
    """What a user checks before leaving a run alone."""
    n_parameters = sum(p.numel() for p in core.parameters() if p.requires_grad)
    lines = [
        f"model            {core.config['backbone']}, {n_parameters / 1e6:.1f} M trained parameters, {args.dtype} on "
        f"{ranks.device}",
        f"                 {told}",
        f"input and map    {core.input_size} x {core.input_size} px, {core.map_size} x {core.map_size}",
        f"effective batch  {args.batch_size * ranks.world_size}, {steps} steps per epoch, learning rate {args.lr:.2e}",
        study.describe(),
    ]
    if study.n_drawn:
        lines.append(f"note: {study.n_drawn} subjects have no split in their tree; their parts were drawn by subject")
    if study.merged:
        more = f", and {len(study.merged) - 1} more such" if len(study.merged) > 1 else ""
        lines.append(f"warning: subjects {study.merged[0]}{more} are taken for one")
    return "\n".join(lines)


def write_judgement(model: GazeNet, study: GazeStudy, out: Path, device: torch.device) -> str:
    """Judge a model on the test images; writes readings.csv, metrics.csv, metrics.png and examples.png to `out`, and
    returns the table as text."""
    from gaze.pictures import Example, examples_figure  # here, since matplotlib takes a second to load
    from gaze.table import format_table, metrics_figure, summarise
    from util.figures import save_figure

    images = study.part(TEST)
    rows = judge(model, study, images, device)
    summary = summarise(rows, model=MODEL, prior=PRIOR, readers=READERS)
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
    written = ", ".join(("metrics.csv", "readings.csv", "metrics.png", "examples.png"))
    return f"{note}\n{format_table(summary)}".strip() + f"\nwrote {written} to {out}"


@torch.no_grad()
def predict_image(
    model: GazeNet, study: GazeStudy, image: GazeImage, device: torch.device
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Radiograph [224, 224] in 0..1, predicted density [224, 224], and the readings' heatmaps, uint8 [R, 224, 224]."""
    gray = resize_whole(study.planes(image)[0], JUDGED_AT)[0].numpy() / 255
    img = resize_whole(study.planes(image)[0], model.input_size)
    predicted = _at_judged_size(model(img[None].to(device)))
    return gray, predicted, study.levels(image, JUDGED_AT)


def _at_judged_size(log_density: Tensor) -> Tensor:
    """float64 [224, 224] from a logarithm [1, G, G]."""
    return saliency.resize_density(log_density.cpu().double().exp(), (JUDGED_AT, JUDGED_AT))[0]
