"""Fine-tuned models on test images: logits, on one process or several, and a best.pth judged on other data."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import Dataset

from downstream.data.images import CENTRE, Reading, reading_as_trained
from downstream.data.labelled import MULTICLASS, TEST, LabelledImages, check_min_positives
from downstream.encoders import named_files
from downstream.heads import Stopped, network_input, probabilities, read_back
from downstream.results import Outcome
from downstream.tuned import Tuned, read_tuned
from util.distributed import Ranks
from util.errors import UserError
from util.loading import SampleLoader, ignore_stop_signals
from util.output import Progress
from util.stop import StopSignals
from util.subjects import overlap_note


class TestViews(Dataset):
    """Centre crops of some images."""

    def __init__(self, views: Dataset, rows: np.ndarray):
        self.views, self.rows = views, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Tensor:
        return self.views[int(self.rows[place]), CENTRE]


@torch.no_grad()
def predict(
    model: VisionTransformer,
    views: Dataset,
    rows: np.ndarray,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
    ranks: Ranks,
    signals: StopSignals,
    progress: Progress | None = None,
) -> Tensor:
    """Logits of images in their centre crop, float32 [len(rows), C] on the CPU; the ranks share the work, and
    all get the whole.

    Raises:
        Stopped: on all ranks, where a stop was asked of any.
    """
    device = ranks.device
    model.eval()
    own = rows[ranks.rank :: ranks.world_size]
    loader = SampleLoader(
        TestViews(views, own),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_stop_signals,
    )

    def judged() -> Iterator[Tensor]:
        for gray in loader:
            if signals.request:
                return
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                found = model(network_input(gray.to(device, non_blocking=True), model, mean, std))
            yield found.float()

    logits = [torch.empty(0, model.num_classes)]
    for found in read_back(judged()):
        logits.append(found)
        if progress is not None:
            progress.add(len(found))
    gathered, requests = zip(*ranks.gather((torch.cat(logits).numpy(), signals.request)), strict=True)
    if any(requests):
        raise Stopped
    whole = np.empty((len(rows), model.num_classes), np.float32)
    for rank, part in enumerate(gathered):
        whole[rank :: ranks.world_size] = part
    return torch.from_numpy(whole)


def read_models(
    args: argparse.Namespace, images: LabelledImages
) -> tuple[dict[str, Tuned], list[str], dict[str, Reading]]:
    """Fine-tuned models by name, the labels to judge them by, and how each reads files. Raises `UserError`."""
    tuned = {name: read_tuned(path) for name, path in named_files(args.weights)}
    readings = {name: reading_as_trained(args, model.reading, name) for name, model in tuned.items()}
    return tuned, shared_labels(tuned, images), readings


def shared_labels(models: Mapping[str, Tuned], images: LabelledImages) -> list[str]:
    """The labels that models and images have, in the images' order: the same for all models, since one table and one
    mean hold them all.

    Raises:
        UserError: no label in common, another task, a class that only one side has, or models with different labels.
    """
    judged_by: dict[tuple[str, ...], str] = {}
    for name, tuned in models.items():
        both = [label for label in images.label_names if label in tuned.labels]
        told = (
            f"{name} predicts {', '.join(tuned.labels)} ({tuned.task}), and {images.name} has "
            f"{', '.join(images.label_names)} ({images.task})"
        )
        if tuned.task != images.task or not both:
            raise UserError(f"{told}: no labels in common to judge it by")
        if tuned.task == MULTICLASS and set(tuned.labels) != set(images.label_names):
            raise UserError(f"{told}: the classes must be the same; --where can leave out images of other classes")
        judged_by.setdefault(tuple(both), name)
    if len(judged_by) > 1:
        two = " and ".join(f"{name} by {', '.join(labels)}" for labels, name in list(judged_by.items())[:2])
        raise UserError(
            f"--weights: only {two} can be judged; choose common labels by --labels, or judge each in a call and "
            "--output_dir of its own"
        )
    return [label for labels in judged_by for label in labels]


def evaluate(
    name: str,
    tuned: Tuned,
    images: LabelledImages,
    shared: list[str],
    views: Dataset,
    common: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    batch_size: int,
    num_workers: int,
    ranks: Ranks,
    signals: StopSignals,
) -> Outcome:
    """Judge a fine-tuned model on the test images of any data set, by their `shared_labels`; `common` are the fields of
    an outcome that do not depend on the model.

    Raises:
        UserError: no test image, test images of one kind, or fewer than --min_positives.
    """
    rows = images.indices(TEST)
    if not len(rows):
        raise UserError(f"{images.name}: no test images; --split test makes all of them test images")
    targets = images.labels[rows][:, [images.label_names.index(label) for label in shared]]
    kinds = np.stack([(targets == value).any(0) for value in (0, 1)])
    if not kinds.all(0).any():
        raise UserError(
            f"{images.name}: the test images are all of one kind by {', '.join(shared)}, so {name} can't be judged by "
            "them; --split test makes all images test images"
        )
    check_min_positives(common["min_count"], images, targets)
    if warning := overlap_note(name, tuned.seen, images.subjects[rows], images.study):
        ranks.say(warning)
    for title, names, others in (("model", tuned.labels, shared), ("data", images.label_names, shared)):
        if left := [label for label in names if label not in others]:
            ranks.say(f"{name}: not judged, only the {title} has {', '.join(left)}")
    with Progress(f"{name}: testing", len(rows), "images", enabled=ranks.is_main) as progress:
        logits = predict(
            tuned.model.to(ranks.device),
            views,
            rows,
            mean=tuned.mean,
            std=tuned.std,
            dtype=dtype,
            batch_size=batch_size,
            num_workers=num_workers,
            ranks=ranks,
            signals=signals,
            progress=progress,
        )
    scores = probabilities(logits, tuned.task).astype(np.float32)
    return Outcome(
        **common,
        weights=name,
        fraction=tuned.fraction,
        seed=tuned.seed,
        label_names=shared,
        ids=[images.ids[row] for row in rows],
        subjects=images.subjects[rows],
        targets=targets,
        scores=scores[:, [tuned.labels.index(label) for label in shared]],
        note=warning,
    )
