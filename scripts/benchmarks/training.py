"""A real run of run_pretrain.py, watched from outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

import run_pretrain
from datasets import build_dataset
from scripts.benchmarks.loading import restart_gap
from scripts.benchmarks.timing import Report, Settings
from util.training import Training


class TimedBatches:
    """Passes batches on and notes how long each was waited for."""

    def __init__(self, batches):
        self.batches = batches
        self.waits: list[float] = []

    def __next__(self):
        began = time.perf_counter()
        batch = next(self.batches)
        self.waits.append(time.perf_counter() - began)
        return batch


def measure_training(report: Report, tree: Path, output: Path, settings: Settings, workers: int) -> None:
    """A real run of run_pretrain.py, watched from outside: rate, data wait, and the gap between epochs."""
    epochs: list[tuple[float, float, TimedBatches]] = []  # began, ended, batches
    original = Training.train_epoch

    def watched(training):
        if not isinstance(training.batches, TimedBatches):
            training.batches = TimedBatches(training.batches)
        began = time.perf_counter()
        request = original(training)
        epochs.append((began, time.perf_counter(), training.batches))
        return request

    trees = [f"{output}-tree{i}" for i in range(settings.copies)]  # a tree may be named once only
    for copy in trees:
        shutil.copytree(tree, copy, copy_function=os.link)
    batch_size = min(settings.batch_size, settings.n_images * settings.copies)
    Training.train_epoch = watched
    try:
        with contextlib.redirect_stdout(sys.stderr):
            status = run_pretrain.main(
                [
                    *("--data_path", *trees, "--preload", "--gaze_weighted"),
                    *("--model", settings.model, "--pretrained", "none", "--device", settings.device),
                    *("--batch_size", str(batch_size)),
                    *("--epochs", str(settings.epochs), "--warmup_epochs", "1"),
                    *("--num_workers", str(workers)),
                    *("--cache_size", str(settings.cache_size), "--output_dir", str(output)),
                ]
            )
    finally:
        Training.train_epoch = original
    if status:  # a signal ended it: of this program, too
        raise SystemExit(status)
    waits = epochs[0][2].waits
    steps = len(waits) // len(epochs)
    seconds = sum(ended - began for began, ended, _ in epochs) - waits[0]
    share = sum(waits[1:]) / seconds
    # A device warms up in the first epoch.
    per_image = sum(ended - began for began, ended, _ in epochs[1:]) / (len(epochs[1:]) * steps * batch_size)
    note = f"{1 / per_image:.4g} images/s at batch {batch_size}, {workers} workers"
    report.value(f"real training, {workers} workers, per image", "s", per_image, note=note)
    note = f"{len(waits)} steps in {len(epochs)} epochs; first batch {waits[0]:.2f} s"
    report.value(f"data wait in a real training, {workers} workers", "share", share, below=0.03, note=note)
    gaps = [after[0] - before[1] + waits[(i + 1) * steps] for i, (before, after) in enumerate(pairwise(epochs))]
    report.value(
        f"gap between two epochs, {workers} workers",
        "s",
        float(np.median(gaps)),
        below=0.2,
        baseline=restart_gap(build_dataset(trees, cache_size=settings.cache_size), batch_size, workers),
        note=f"largest {max(gaps):.3f} s; baseline: workers started anew",
    )
