"""Gaze prediction: filling a prepared tree against the predictor's bare forward pass on the same images."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from datasets.phantom.reflacx import make_study
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.predicted import fill_tree
from models_gaze import GazeNet
from scripts.benchmarks.timing import Report, Settings, alternate
from scripts.predict_gaze import as_predictor
from util.cpus import available_cpus

BATCHES = 6
SIZE = (624, 512)  # of a film that prepare_mimic.py has scaled to short side 512


def measure_prediction(report: Report, root: Path, settings: Settings, quick: bool) -> None:
    """Seconds for some batches of images: bare forward passes, and from the files of a tree to the files of a tree."""
    n_images = BATCHES * settings.batch_size
    height, width = settings.image_size if quick else SIZE
    study = make_study(root / "films", n_images=n_images, size=(height, width), shared_images=0)
    with contextlib.redirect_stdout(sys.stderr):
        prepare_mimic(study.images, None, root / "images", views=("all",), workers=available_cpus())
    torch.manual_seed(0)
    model = GazeNet("test_resnet", input_size=64) if quick else GazeNet()
    predictor = as_predictor(model.eval().to(settings.device))
    side = predictor.input_size
    batch = torch.randint(0, 256, (settings.batch_size, 1, side, side), dtype=torch.uint8)

    def forward() -> None:
        for _ in range(BATCHES):
            predictor.maps(batch)

    def fill() -> None:
        options = {"batch_size": settings.batch_size, "workers": available_cpus(), "overwrite": True}
        assert fill_tree(root / "images", predictor, **options).counts["entries"] == n_images

    times = alternate(forward, fill, settings.repeats, settings.device)
    name = model.config["backbone"]
    note = f"{name} at {side} px, {n_images} images of {width} x {height} px"
    report.compare("gaze prediction of a tree", *times, at_least=0.8, note=note)
