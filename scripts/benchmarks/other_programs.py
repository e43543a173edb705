"""Evaluation from stored features and gaze prediction against plain code for the same work."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from dataclasses import replace
from itertools import count, cycle, islice
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datasets.phantom.labelled import Chests
from datasets.phantom.reflacx import make_study
from datasets.phantom.rsna import make_rsna
from datasets.prepare.mimic import prepare_mimic
from downstream.data import read_dataset
from downstream.data.images import CENTRE, Views, normalisation, open_squares
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.encoders import Candidate
from downstream.features import FeatureFile
from downstream.frozen import Frozen, linear
from downstream.heads import ENCODE_BATCH, Encoder, HeadOptions, Keyed, encode, known_loss, new_head, read_back
from downstream.jobs import Jobs
from gaze.fill import fill_tree
from gaze.model import GazeNet
from scripts.benchmarks.timing import Report, Settings, alternate, timed
from scripts.predict_gaze import as_predictor
from util.cli import available_cpus
from util.export import read_backbone
from util.stop import StopSignals

FRACTIONS, SEEDS, VIEWS = (0.3, 0.6, 1.0), (43, 44, 45), 10
SHARES = {TRAIN: 4, VALID: 1, TEST: 10}  # testing costs the plain loop nothing
BATCHES = 6  # of gaze prediction


def made_up_images(root: Path, n: int) -> LabelledImages:
    chests = Chests(n, size=(192, 160), lesion_kinds=("consolidation",), normal_fraction=0.5)
    return read_dataset("rsna", make_rsna(root, chests, image_format="jpg").raw)


def tiny_vit(width: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_base_patch16_224", embed_dim=width, depth=2, num_heads=width // 64, num_classes=0)


def measure_encoding(report: Report, root: Path, settings: Settings) -> None:
    """From cached images to features on disk, with ChestX-ray14's augmentation, against forward passes of batches
    that lie ready."""
    images = made_up_images(root, 8 if settings.quick else 64)
    views = Views(replace(images, strong_augmentation=True), plane=open_squares(images, root / "cache"))
    device, gpu = torch.device(settings.device), settings.on_gpu
    name = "vit_base_patch16_224" if gpu else "vit_small_patch16_224"
    model = tiny_vit() if settings.quick else timm.create_model(name, num_classes=0)
    dtype = torch.bfloat16 if gpu else torch.float32
    encoder = Encoder(model.eval().to(device), *normalisation("half"), device, dtype)
    size, n_views = ENCODE_BATCH[device.type], 4 if settings.quick else 128 if gpu else 1
    keys = [(view, image) for view in range(n_views) for image in range(len(views))][:1024]
    ready = [batch.to(device) for batch in DataLoader(Keyed(views, keys), size)]
    n = n_views * len(views)

    def bare() -> None:
        for _ in read_back(map(encoder, islice(cycle(ready), n // size))):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=root) as folder, StopSignals() as signals, signals.exit_at_signal():
            rows = np.arange(len(views))
            files = [FeatureFile(Path(folder, str(view)), len(views), model.embed_dim) for view in range(n_views)]
            wanted = [(view, rows, file) for view, file in enumerate(files)]
            how = {"device": device, "batch_size": size, "num_workers": 8 if gpu else 0}
            encode(encoder, views, wanted, **how, signals=signals, what="encoding")

    times = alternate(bare, whole, settings.repeats, settings.device)
    note = f"width {model.embed_dim}, {len(model.blocks)} blocks, {dtype}, batch {size}"
    report.compare("downstream encoding: of bare rate", *times, note=note)
    report.value("downstream encoding", "images/s", n / float(np.median(times[1])), note=note)


def plain_head(encoder: Encoder, views: Views, images: LabelledImages, rows: Rows, options: HeadOptions) -> None:
    """Baseline, the work of the published loop: in every epoch read, augment and encode the training images, then the
    validation images."""

    def features(view: int, part: np.ndarray):
        for gray in DataLoader(Keyed(views, [(view, int(i)) for i in part]), options.batch_size):
            yield encoder(gray.to(encoder.device))[:, : encoder.model.embed_dim]

    def loss_of(batch: Tensor, part: np.ndarray) -> Tensor:
        return known_loss(head(batch), torch.from_numpy(images.labels[part]).to(encoder.device), images.task)

    head = new_head(encoder.model.embed_dim, images.labels.shape[1], 0).to(encoder.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr)
    for epoch in range(options.epochs):
        order = np.random.default_rng(epoch).permutation(rows.train)
        for start, batch in zip(count(0, options.batch_size), features(epoch, order)):
            optimizer.zero_grad()
            loss_of(batch, order[start : start + options.batch_size]).backward()
            optimizer.step()
        loss_of(torch.cat(list(features(CENTRE, rows.valid))), rows.valid)


def measure_heads(report: Report, root: Path, settings: Settings) -> None:
    """3 fractions x 3 seeds of linear heads of a small frozen encoder from stored features, against the plain loop,
    of which one seed is timed for each fraction. Without early stopping all do the same steps."""
    gpu = settings.on_gpu
    n_images, epochs, batch_size, width = (
        (40, 1, 4, 64) if settings.quick else (240, 15, 8, 192) if gpu else (900, 50, 16, 64)
    )
    device = torch.device(settings.device)
    images = made_up_images(root, n_images)
    parts = np.resize(np.repeat(list(SHARES), list(SHARES.values())), n_images)
    images = replace(images, parts=np.random.default_rng(0).permutation(parts))
    torch.save(
        {"state_dict": tiny_vit(width).state_dict(), "metadata": {"num_heads": str(width // 64)}}, root / "x.pth"
    )
    candidate = Candidate("x", "file", read_backbone(root / "x.pth"))
    encoder = Encoder(candidate.build().eval().to(device), *normalisation("half"), device)
    options = HeadOptions(epochs, batch_size, patience=epochs)
    plain = 0.0
    for fraction in FRACTIONS:
        (rows,) = partitions(images, fraction, seed=0, n_folds=2, validate=True)
        plain += timed(lambda rows=rows: plain_head(encoder, Views(images), images, rows, options), device.type)

    def ours() -> None:
        with contextlib.redirect_stdout(sys.stderr), StopSignals() as signals, signals.exit_at_signal():
            frozen = Frozen(
                images=images,
                views=Views(images, plane=open_squares(images, root / "cache")),
                views_key="",
                files_key="",
                study_key="",
                fractions=FRACTIONS,
                seeds=SEEDS,
                n_folds=2,
                n_views=VIEWS,
                heads=options,
                features_dir=root / "features",
                jobs=Jobs(root / "jobs"),
                device=device,
                dtype=torch.float32,
                batch_size=ENCODE_BATCH[device.type],
                num_workers=0,
                signals=signals,
            )
            linear(frozen, candidate, *normalisation("half"))

    seconds = timed(ours, device.type)
    name = f"linear evaluation, {len(FRACTIONS)} fractions x {len(SEEDS)} seeds"
    counts = ", ".join(f"{(images.parts == part).sum()} {part}" for part in SHARES)
    note = f"{counts}; {epochs} epochs, {VIEWS} views, width {width}; baseline: one seed timed, times {len(SEEDS)}"
    report.value(name, "s", seconds, note, len(SEEDS) * plain)


def measure_prediction(report: Report, root: Path, settings: Settings) -> None:
    """Seconds for some batches of images: bare forward passes, and from the files of a tree to the files of a tree."""
    batch_size, quick = 2 if settings.quick else 32 if settings.on_gpu else 8, settings.quick
    n_images = BATCHES * batch_size
    height, width = settings.image_size if quick else (624, 512)  # as prepare_mimic.py scales a film
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

    times = alternate(forward, fill, settings.repeats, settings.device)
    note = f"{model.config['backbone']} at {side} px, {n_images} images of {width} x {height} px"
    report.compare("gaze prediction of a tree", *times, note=note)
