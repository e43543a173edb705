"""Fine-tuned models, judged on the test images of other data without training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import timm

from downstream.data.images import reading_as_trained
from downstream.data.labelled import MULTICLASS, TEST, check_judged, files_digest
from downstream.data.partition import Rows
from downstream.driver import Method, Part, Runs, Scores, Work
from downstream.encoders import digest_of, named_files
from downstream.forward import predict
from downstream.frozen import probabilities
from util.errors import UserError
from util.weights import read_state_dict

# What `read_tuned` needs beside timm's name of the model and the task: its outputs, mean and std of its input, options of
# `downstream.data.images.Reading` that mattered to its images, share of the labels and seed that it was trained with.
FACTS = ("timm_args", "labels", "mean", "std", "reading", "fraction", "seed")


def read_tuned(path: str | os.PathLike, name: str = "") -> SimpleNamespace:
    """A best.pth, on the CPU: `FACTS` of it, the `model`, `name` as given, and `seen`, `subject_marks` of the subjects
    that trained or validated it, or pretrained its encoder.

    Raises:
        UserError: another kind of file, one that is damaged, or of a model that this timm lacks.
    """
    state, info = read_state_dict(path)
    facts = info.metadata
    if lacking := {"timm_model", "task", *FACTS} - facts.keys():
        raise UserError(
            f"{info.path}: not a best.pth of --method finetune ({min(lacking)} is not in its metadata); only those can be "
            "judged without training"
        )
    tuned = SimpleNamespace(**{fact: json.loads(facts[fact]) for fact in FACTS}, task=facts["task"])
    try:
        model = timm.create_model(facts["timm_model"], **tuned.timm_args)
        model.load_state_dict(state)
    except RuntimeError as error:  # timm's, of names and tensors
        raise UserError(f"{info.path}: not a model of this timm: {' '.join(str(error).split())[:200]}") from None
    tuned.model, tuned.name, tuned.seen = model, name, info.seen
    return tuned


class Evaluate(Method):
    """A fine-tuned model on the test images of any data set, by the labels that both name."""

    def __init__(self, work: Work, tuned: SimpleNamespace, labels: list[str]):
        self.work, self.tuned, self.label_names = work, tuned, labels
        self.name, self.seen, nothing = tuned.name, tuned.seen, np.empty(0, np.int64)
        self.plan = [
            Part(tuned.fraction, [tuned.seed], Rows(nothing, nothing, work.images.indices(TEST)), f"{tuned.fraction:g}")
        ]
        self.reading = reading_as_trained(work.args, tuned.reading, tuned.name)
        self.scale, files = (tuned.mean, tuned.std), files_digest(work.images)
        self.key = [digest_of(tuned.model), self.scale, str(work.dtype), files, str(self.reading), labels]

    def scores(self, part: Part, runs: Runs) -> Scores:
        work, tuned, views = self.work, self.tuned, self.work.open_views(self.reading)
        how = {"ranks": work.ranks, "what": f"{self.name}: testing", **work.loading}
        logits = predict(tuned.model.to(work.ranks.device), views, part.rows.test, self.scale, **how)
        columns = [tuned.labels.index(label) for label in self.label_names]
        yield tuned.seed, probabilities(logits, tuned.task)[None, :, columns]


def read_models(work: Work) -> list[Callable[[], Evaluate]]:
    """Makers of the method for fine-tuned models. All are judged by the labels that they and the images share, since one
    table and one mean hold them.

    Raises:
        UserError: a file that can't be read, labels that can't be judged, or options that ask for another reading of
            files than in training.
    """
    args, images = work.args, work.images
    models = [read_tuned(path, name) for name, path, _ in named_files(args.weights)]
    labels = [label for label in images.label_names if all(label in model.labels for model in models)]
    for model in models:
        reading_as_trained(args, model.reading, model.name)
        facts = (
            f"{model.name} predicts {', '.join(model.labels)} ({model.task}), and {images.name} has "
            f"{', '.join(images.label_names)} ({images.task})"
        )
        if model.task != images.task or not labels:
            raise UserError(f"{facts}: all weights and the images need a label in common")
        if model.task == MULTICLASS and set(model.labels) != set(images.label_names):
            raise UserError(f"{facts}: the classes must be the same; --where can leave out images of other classes")
        work.ranks.say(f"{facts}: judged by {', '.join(labels)}")
    targets = images.labels[images.indices(TEST)][:, [images.label_names.index(label) for label in labels]]
    check_judged(images, targets, TEST, args.min_positives)
    return [partial(Evaluate, work, model, labels) for model in models]
