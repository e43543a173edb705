"""The gaze predictor: filling a prepared tree against its bare forward pass on the same images, and an epoch of
run_gaze.py's training against a bare loop on the same batches."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import gaze.main
from datasets.phantom.reflacx import make_study
from datasets.prepare.mimic import prepare_mimic
from gaze import metrics as saliency
from gaze.fill import fill_tree
from gaze.main import batch_losses, name_means
from gaze.model import GazeNet
from scripts.benchmarks.timing import Report, Settings, alternate
from scripts.predict_gaze import as_predictor
from util import distributed
from util.cpus import available_cpus
from util.finite import make_scaler
from util.logging import RunLog
from util.lr_sched import parameter_groups
from util.progress import Progress
from util.stop import StopSignals
from util.training import Training

BATCHES = 6
SIZE = (624, 512)  # of a film that prepare_mimic.py has scaled to short side 512


def measure_prediction(report: Report, root: Path, settings: Settings) -> None:
    """Seconds for some batches of images: bare forward passes, and from the files of a tree to the files of a tree."""
    batch_size, quick = settings.prediction_batch, settings.quick
    n_images = BATCHES * batch_size
    height, width = settings.image_size if quick else SIZE
    study = make_study(root / "films", n_images=n_images, size=(height, width), shared_images=0)
    with contextlib.redirect_stdout(sys.stderr):
        prepare_mimic(study.images, None, root / "images", views=("all",), workers=available_cpus())
    torch.manual_seed(0)
    model = GazeNet("test_resnet", input_size=64) if quick else GazeNet()
    predictor = as_predictor(model.eval().to(settings.device))
    side = predictor.input_size
    batch = torch.randint(0, 256, (batch_size, 1, side, side), dtype=torch.uint8)

    def forward() -> None:
        for _ in range(BATCHES):
            predictor.maps(batch)

    def fill() -> None:
        options = {"batch_size": batch_size, "workers": available_cpus(), "overwrite": True}
        assert fill_tree(root / "images", predictor, **options).counts["entries"] == n_images

    times = alternate(forward, fill, min(settings.repeats, 5), settings.device)
    torch.backends.cudnn.deterministic = False  # as it was before `as_predictor`
    name = model.config["backbone"]
    note = f"{name} at {side} px, {n_images} images of {width} x {height} px"
    report.compare("gaze prediction of a tree", *times, at_least=0.8, note=note)


def measure_gaze_training(report: Report, root: Path, settings: Settings) -> None:
    """Seconds for some batches that are ready on the device: run_gaze.py's epoch against the bare steps."""
    args = gaze.main.get_args_parser().parse_args(
        ["--data_path", "none", "--epochs", "1", "--warmup_epochs", "0", "--print_every", str(BATCHES)]
    )
    args.dtype = "float16" if settings.device == "cuda" else "float32"  # as run_gaze.py chooses
    ranks, dtype = distributed.start(settings.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    model = GazeNet("test_resnet", input_size=64) if settings.quick else GazeNet()
    model.to(ranks.device).train()
    shape = (settings.batch_size, model.map_size, model.map_size)
    target = torch.rand(shape, device=ranks.device)
    batch = {
        "img": torch.randint(
            256, (settings.batch_size, 1, model.input_size, model.input_size), dtype=torch.uint8, device=ranks.device
        ),
        "target": target / target.sum((1, 2), keepdim=True),
    }
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=1e-4, fused=True)
    scaler = make_scaler(args.dtype, ranks.device)

    def bare() -> None:
        for _ in range(BATCHES):
            with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
                log_p = model(batch["img"])
            scaler.scale(saliency.log_kld(log_p, batch["target"]).mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

    class Batches:
        batch_sampler = SimpleNamespace(steps_per_epoch=BATCHES)

        def __iter__(self):
            return iter([batch] * BATCHES)

    def ours() -> None:
        with StopSignals() as signals, signals.exit_at_signal():
            training = Training(
                core=model,
                optimizer=optimizer,
                ranks=ranks,
                signals=signals,
                options=vars(args),
                n_values=2,
                losses=batch_losses,
                name_means=name_means,
            )
            log = RunLog(root, root, 0.0, enabled=False)
            training.start(Batches(), log=log, progress=Progress("training", BATCHES, "steps", enabled=False))
            training.train_epoch()

    times = alternate(bare, ours, settings.repeats, settings.device)
    rate = BATCHES * settings.batch_size / float(np.median(times[1]))
    note = f"{rate:.4g} images/s; {model.config['backbone']} at {model.input_size} px, {args.dtype}"
    report.compare("gaze training", *times, note=note)
