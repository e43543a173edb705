"""best.pth: a fine-tuned model with its labels, for timm, for other programs, and to be judged on other data."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from downstream.data.images import reading_as_trained
from downstream.data.labelled import MULTICLASS, TEST, LabelledImages, check_min_positives, files_digest
from downstream.data.partition import Rows
from downstream.driver import Method, Work
from downstream.encoders import Candidate, digest_of, named_files
from downstream.forward import predict
from downstream.heads import probabilities
from util.errors import UserError
from util.export import attention_heads_of
from util.files import atomic_write
from util.output import Progress
from util.weights import read_state_dict

BEST = "best.pth"


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model as best.pth has it.

    Attributes:
        labels: what its outputs are.
        mean, std: of its input.
        reading: options of `downstream.data.images.Reading` that mattered to its images.
        dataset, fraction, seed: what it was trained on, with which share of the labels and seed.
        seen: `subject_marks` of the subjects that trained or validated it, or pretrained its encoder.
    """

    model: VisionTransformer
    labels: list[str]
    task: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reading: dict[str, Any]
    dataset: str
    fraction: float
    seed: int
    seen: frozenset[str]


def write_tuned(
    path: Path,
    state: Mapping[str, Tensor],
    candidate: Candidate,
    model: VisionTransformer,
    *,
    pool: str,
    labels: Sequence[str],
    **facts: Any,
) -> None:
    """Write `state` and what `read_tuned` and `timm.create_model(timm_model, **timm_args, checkpoint_path=...)`
    need; whole or not at all.

    Args:
        facts: the other fields of `Tuned`, and more to be kept.
    """
    name, arguments = candidate.model
    arguments = arguments | {"num_classes": len(labels)}
    if "cls_token" in candidate.encoder.state:
        arguments["global_pool"] = pool
    if candidate.encoder.block is not None:
        arguments["depth"] = len(model.blocks)
    heads = attention_heads_of(model)
    metadata = {
        "timm_model": name,
        "timm_args": json.dumps(arguments),
        **({} if heads is None else {"num_heads": str(heads)}),
        "labels": json.dumps(list(labels)),
        "weights": candidate.name,
    } | {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(state), "metadata": metadata}, buffer)
    try:
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; make room") from None


def read_tuned(path: str | os.PathLike) -> Tuned:
    """The model of a best.pth, on the CPU.

    Raises:
        UserError: another kind of file, one that is damaged, or of a model that this timm lacks.
    """
    state, info = read_state_dict(path)
    facts = info.metadata
    try:
        model = timm.create_model(facts["timm_model"], **json.loads(facts["timm_args"]))
        model.load_state_dict(state)
        return Tuned(
            model,
            json.loads(facts["labels"]),
            facts["task"],
            tuple(json.loads(facts["mean"])),
            tuple(json.loads(facts["std"])),
            json.loads(facts["reading"]),
            facts["dataset"],
            float(facts["fraction"]),
            int(facts["seed"]),
            info.seen,
        )
    except KeyError as error:
        raise UserError(
            f"{info.path}: not a {BEST} of --method finetune ({error} is not in its metadata); "
            "only those can be judged without training"
        ) from None
    except RuntimeError as error:  # timm's, of names and tensors
        raise UserError(f"{info.path}: not a model of this timm: {' '.join(str(error).split())[:200]}") from None


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
    if not args.weights:  # --dry_run
        return []
    tuned = {name: read_tuned(path) for name, path, _ in named_files(args.weights)}
    for name, model in tuned.items():
        reading_as_trained(args, model.reading, name)
    rows = images.indices(TEST)
    if not len(rows):
        raise UserError(f"{images.name}: no test images; --split test makes all of them test images")
    labels = shared_labels(tuned, images)
    targets = images.labels[rows][:, [images.label_names.index(label) for label in labels]]
    if not np.stack([(targets == value).any(0) for value in (0, 1)]).all(0).any():
        raise UserError(
            f"{images.name}: the test images are all of one kind by {', '.join(labels)}, so {', '.join(tuned)} can't be "
            "judged by them; --split test makes all images test images"
        )
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
