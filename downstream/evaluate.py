"""Models on labelled images as they are: scores in validation and tests, and a best.pth judged on other data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.data import Dataset

from downstream.data.images import CENTRE, reading_as_trained
from downstream.data.labelled import MULTICLASS, TEST, LabelledImages, check_min_positives, files_digest
from downstream.data.partition import Rows
from downstream.encoders import digest_of, named_files
from downstream.forward import Stopped, forward_all, network_input
from downstream.heads import probabilities
from downstream.tuned import Tuned, read_tuned
from downstream.work import Method, Work
from util.distributed import Ranks
from util.errors import UserError
from util.progress import Progress


@torch.no_grad()
def predict(
    model: VisionTransformer,
    views: Dataset,
    rows: np.ndarray,
    scale: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    dtype: torch.dtype,
    ranks: Ranks,
    progress: Progress | None = None,
    **options,
) -> Tensor:
    """Logits of images in their centre crop, float32 [len(rows), C] on the CPU; the ranks share the work, and
    all get the whole.

    Args:
        scale: mean and std of the model's input.
        options: of `forward_all`.

    Raises:
        Stopped: on all ranks, if a stop was requested of any.
    """
    model.eval()
    keys = [(CENTRE, row) for row in rows[ranks.rank :: ranks.world_size].tolist()]

    def forward(gray: Tensor) -> Tensor:
        with torch.autocast(gray.device.type, dtype, enabled=dtype != torch.float32):
            return model(network_input(gray, model, *scale)).float()

    logits = [torch.empty(0, model.num_classes)]
    for found in forward_all(forward, views, keys, **options):
        logits.append(found)
        if progress is not None:
            progress.add(len(found))
    gathered, requests = zip(*ranks.gather((torch.cat(logits).numpy(), options["signals"].request)), strict=True)
    if any(requests):
        raise Stopped
    whole = np.empty((len(rows), model.num_classes), np.float32)
    for rank, part in enumerate(gathered):
        whole[rank :: ranks.world_size] = part
    return torch.from_numpy(whole)


class Evaluate(Method):
    """A fine-tuned model on the test images of any data set, by the labels that both name."""

    def __init__(self, work: Work, model: tuple[str, Tuned, list[str]]):
        self.work = work
        self.name, self.tuned, self.label_names = model
        self.seen, self.fractions, self.seeds = self.tuned.seen, [self.tuned.fraction], [self.tuned.seed]
        self.reading = reading_as_trained(work.args, self.tuned.reading, self.name)
        weights, scale = digest_of(self.tuned.model), (self.tuned.mean, self.tuned.std)
        self.key = [weights, scale, str(work.dtype), files_digest(work.images), repr(self.reading), self.label_names]
        for title, names in (("model", self.tuned.labels), ("data", work.images.label_names)):
            if left := [label for label in names if label not in self.label_names]:
                work.ranks.say(f"{self.name}: not judged, only the {title} has {', '.join(left)}")

    def partitions(self, fraction: float, seed: int) -> list[Rows]:
        nothing = np.empty(0, np.int64)
        return [Rows(nothing, nothing, self.work.images.indices(TEST))]

    def scores(
        self, rows: Rows, names: Mapping[int, str], fraction: float, what: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        work, tuned = self.work, self.tuned
        model, views = tuned.model.to(work.ranks.device), work.open_views(self.reading)
        options = dict(dtype=work.dtype, ranks=work.ranks, **work.forward_options)
        with Progress(f"{self.name}: testing", len(rows.test), "images", enabled=work.ranks.is_main) as progress:
            logits = predict(model, views, rows.test, (tuned.mean, tuned.std), progress=progress, **options)
        scores = probabilities(logits, tuned.task).astype(np.float32)
        yield tuned.seed, scores[None, :, [tuned.labels.index(label) for label in self.label_names]]


def read_models(work: Work) -> list[tuple[str, Tuned, list[str]]]:
    """Fine-tuned models by name, with the labels to judge them by.

    Raises:
        UserError: a file that can't be read, labels that can't be judged, or options that ask for another reading of
            files than in training.
    """
    args, images = work.args, work.images
    tuned = {name: read_tuned(path) for name, path in named_files(args.weights)}
    for name, model in tuned.items():
        reading_as_trained(args, model.reading, name)
    labels = shared_labels(tuned, images) if tuned else []
    rows = images.indices(TEST)
    if not len(rows):
        raise UserError(f"{images.name}: no test images; --split test makes all of them test images")
    targets = images.labels[rows][:, [images.label_names.index(label) for label in labels]]
    if tuned and not np.stack([(targets == value).any(0) for value in (0, 1)]).all(0).any():
        raise UserError(
            f"{images.name}: the test images are all of one kind by {', '.join(labels)}, so {', '.join(tuned)} can't be "
            "judged by them; --split test makes all images test images"
        )
    if tuned:
        check_min_positives(args.min_positives, images, targets)
    return [(name, model, labels) for name, model in tuned.items()]


def shared_labels(models: Mapping[str, Tuned], images: LabelledImages) -> list[str]:
    """The labels that models and images have, in the images' order: the same for all models, since one table and one
    mean hold them all.

    Raises:
        UserError: no label in common, another task, a class that only one side has, or models with different labels.
    """
    judged_by: dict[tuple[str, ...], str] = {}
    for name, tuned in models.items():
        both = [label for label in images.label_names if label in tuned.labels]
        facts = (
            f"{name} predicts {', '.join(tuned.labels)} ({tuned.task}), and {images.name} has "
            f"{', '.join(images.label_names)} ({images.task})"
        )
        if tuned.task != images.task or not both:
            raise UserError(f"{facts}: no labels in common to judge it by")
        if tuned.task == MULTICLASS and set(tuned.labels) != set(images.label_names):
            raise UserError(f"{facts}: the classes must be the same; --where can leave out images of other classes")
        judged_by.setdefault(tuple(both), name)
    if len(judged_by) > 1:
        two = " and ".join(f"{name} by {', '.join(labels)}" for labels, name in list(judged_by.items())[:2])
        raise UserError(
            f"--weights: only {two} can be judged; choose common labels by --labels, or judge each in a call and "
            "--output_dir of its own"
        )
    return list(next(iter(judged_by)))
