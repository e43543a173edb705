"""Linear evaluation: heads from stored features against the plain published loop, on the same images."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets.downstream import read_dataset
from datasets.downstream.images import CENTRE, Views, normalisation, open_squares
from datasets.downstream.labelled import TEST, TRAIN, VALID, LabelledImages
from datasets.downstream.partition import Rows, partitions
from datasets.phantom.labelled import Chests
from datasets.phantom.rsna import make_rsna
from engine_downstream import (
    ENCODE_BATCH,
    Encoder,
    HeadOptions,
    Keyed,
    encode,
    epoch_order,
    known_loss,
    new_head,
    read_back,
    schedule,
)
from engine_frozen import Frozen, linear
from scripts.benchmarks.timing import Report, Row, Settings, timed
from util.encoders import Candidate
from util.export import read_backbone
from util.features import FeatureFile
from util.jobs import Jobs
from util.roc import auc
from util.stop import StopSignals

FRACTIONS, SEEDS, VIEWS = (0.3, 0.6, 1.0), (43, 44, 45), 10
SHARES = {
    TRAIN: 4,
    VALID: 1,
    TEST: 10,
}  # testing costs the plain loop nothing, and makes AUCs worth comparing


def measure_downstream(report: Report, root: Path, settings: Settings) -> None:
    """3 fractions x 3 seeds of linear heads; and encoding against the encoder's bare forward passes."""
    n_images, epochs, batch_size, width = settings.downstream
    device = torch.device(settings.device)
    chests = Chests(n_images, size=(192, 160), lesion_kinds=("consolidation",), normal_fraction=0.5)
    images = read_dataset("rsna", make_rsna(root, chests, image_format="jpg").raw)
    parts = np.resize(np.repeat(list(SHARES), list(SHARES.values())), n_images)
    images = replace(images, parts=np.random.default_rng(0).permutation(parts))
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", embed_dim=width, depth=2, num_heads=width // 64, num_classes=0
    )
    torch.save(
        {"state_dict": model.state_dict(), "metadata": {"num_heads": str(width // 64)}}, root / "x.pth"
    )
    candidate = Candidate("x", "file", read_backbone(root / "x.pth"))
    measure_heads(report, root, images, candidate, HeadOptions(epochs, batch_size, patience=epochs), device)
    plane = open_squares(images, root / "cache")
    crops, augmented = (
        Views(replace(images, strong_augmentation=strong), plane=plane) for strong in (False, True)
    )
    gpu = device.type == "cuda"
    named = "vit_base_patch16_224" if gpu else "vit_small_patch16_224"
    usual = model if settings.quick else timm.create_model(named, num_classes=0)
    n_tiny, n_usual = (32, 32) if settings.quick else (16384, 16384) if gpu else (1024, 64)
    measure_encoding(report, "encoding, 2 blocks, crops", model, crops, n_tiny, device, root)
    measure_encoding(report, "downstream encoding", usual, augmented, n_usual, device, root)


def measure_heads(
    report: Report,
    root: Path,
    images: LabelledImages,
    candidate: Candidate,
    options: HeadOptions,
    device: torch.device,
) -> None:
    """All heads from stored features, of some views and of one per epoch, against the plain published loop, which
    draws new views for every seed. Without early stopping all do the same steps."""
    encoder = Encoder(candidate.build().eval().to(device), *normalisation("half"), device)
    plain, spent = {}, []
    for fraction in FRACTIONS:
        (rows,) = partitions(images, fraction, seed=0, n_folds=2, validate=True)
        for seed in SEEDS:

            def published(rows: Rows = rows, fraction: float = fraction, seed: int = seed) -> None:
                logits = published_head(encoder, Views(images, seed=seed), images, rows, seed, options)
                plain[fraction, seed] = auc(images.labels[rows.test, 0], logits[:, 0])

            spent.append(timed_twice(published, device.type))
    plain_seconds, plain_processor = np.sum(spent, 0)
    spread = np.mean([np.std([plain[fraction, seed] for seed in SEEDS], ddof=1) for fraction in FRACTIONS])
    report.equality["linear evaluation, mean standard deviation of AUCs over seeds"] = float(spread)
    counts = ", ".join(f"{(images.parts == part).sum()} {part}" for part in SHARES)
    for n_views in (VIEWS, options.epochs):
        found: dict = {}

        def ours(n_views: int = n_views, found: dict = found) -> None:
            with contextlib.redirect_stdout(sys.stderr), StopSignals() as signals:
                place = root / f"views{n_views}"
                plane = open_squares(images, place / "cache")
                frozen = Frozen(
                    images=images, views=Views(images, plane=plane), views_key="", files_key="", study_key="",
                    fractions=FRACTIONS, seeds=SEEDS, n_folds=2, n_views=n_views, heads=options,
                    features_dir=place / "features", jobs=Jobs(place / "jobs"), device=device, dtype=torch.float32,
                    batch_size=ENCODE_BATCH[device.type], num_workers=0, signals=signals,
                )  # fmt: skip
                found |= linear(frozen, candidate, *normalisation("half"))

        seconds, processor = timed_twice(ours, device.type)
        ratio = plain_seconds / seconds
        what = f"{len(FRACTIONS)} fractions x {len(SEEDS)} seeds"
        name = f"linear evaluation, {what}" if n_views == VIEWS else "linear evaluation, a view per epoch"
        bar, met = (">= 10", ratio >= 10) if n_views == VIEWS else (None, None)
        note = (
            f"{counts}; {options.epochs} epochs, {n_views} views, width {encoder.model.embed_dim}; once each; "
            f"{plain_processor / processor:.3g}x by processor time"
        )
        report.add(Row(name, "s", plain_seconds, seconds, ratio, None, 1, bar, met, note))
        differences = []
        for fraction in FRACTIONS:
            own = []
            for seed in SEEDS:
                rows, scores = found["", fraction, seed]
                own.append(auc(images.labels[rows, 0], scores[:, 0]))
            differences.append(abs(np.mean(own) - np.mean([plain[fraction, seed] for seed in SEEDS])))
        title = f"linear evaluation, {n_views} views, largest difference of mean AUCs over fractions"
        report.equality[title] = float(max(differences))


def timed_twice(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock, and of this process on its processors, which other work on the machine disturbs less."""
    began = time.process_time()
    elapsed = timed(function, device)
    return elapsed, time.process_time() - began


def published_head(
    encoder: Encoder, views, images, rows: Rows, seed: int, options: HeadOptions
) -> np.ndarray:
    """The published loop: in every epoch read, augment and encode the training images, then the validation
    images; test the best epoch. Returns the test images' logits, [n, C]."""

    def features(keys: list[tuple[int, int]]):
        for gray in DataLoader(Keyed(views, keys), options.batch_size):
            width = encoder.model.embed_dim
            yield encoder(gray.to(encoder.device))[:, :width]

    def logits_of(part: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([head(batch) for batch in features([(CENTRE, int(i)) for i in part])])

    labels = torch.from_numpy(images.labels).to(encoder.device)
    head = new_head(encoder.model.embed_dim, labels.shape[1], seed).to(encoder.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    steps, best, state = len(rows.train) // options.batch_size, math.inf, {}
    for epoch in range(options.epochs):
        order = rows.train[epoch_order(seed, epoch, len(rows.train))][: steps * options.batch_size]
        for step, batch in enumerate(features([(epoch, int(i)) for i in order])):
            for group in optimizer.param_groups:
                group["lr"] = schedule(epoch * steps + step, steps, options)
            wanted = labels[order[step * options.batch_size : (step + 1) * options.batch_size]]
            optimizer.zero_grad()
            known_loss(head(batch), wanted, images.task).backward()
            optimizer.step()
        loss = known_loss(logits_of(rows.valid), labels[rows.valid], images.task).item()
        if loss < best:
            best, state = loss, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(state)
    return logits_of(rows.test).cpu().numpy()


def measure_encoding(
    report: Report, what: str, model: nn.Module, views: Views, n: int, device: torch.device, root: Path
) -> None:
    """`encode`, from cached images to features on disk, against forward passes of batches that lie ready."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    encoder = Encoder(model.eval().to(device), *normalisation("half"), device, dtype)
    size, workers = ENCODE_BATCH[device.type], 8 if gpu else 0
    keys = [(key // len(views), key % len(views)) for key in range(n)]
    batches = [batch.to(device) for batch in DataLoader(Keyed(views, keys), size)]

    def bare() -> None:
        for _ in read_back(map(encoder, batches)):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=root) as folder, StopSignals() as signals:
            wanted = []
            for view in range(keys[-1][0] + 1):
                images = np.array([image for of, image in keys if of == view])
                file = FeatureFile(Path(folder, str(view)), len(views), model.embed_dim)
                wanted.append((view, images, file))
            encode(
                encoder, views, wanted, device=device, batch_size=size, num_workers=workers, signals=signals,
                what="encoding",
            )  # fmt: skip

    repeats, processor, times = report.settings["repeats"], [], ([], [])
    for turn in range(repeats + 1):
        both = [timed_twice(function, device.type) for function in (bare, whole)]
        if turn:  # the first warms up
            for into, (elapsed, _) in zip(times, both, strict=True):
                into.append(elapsed)
            processor.append(both[0][1] / both[1][1])
    low, middle, high = np.percentile(processor, (25, 50, 75))
    shape = f"width {model.embed_dim}, {len(model.blocks)} blocks, {str(dtype).removeprefix('torch.')}, batch {size}"
    told = f"{workers} workers" if gpu else f"by processor time {middle:.3g} ({low:.3g}..{high:.3g})"
    report.compare(f"{what}: of bare rate", *times, at_least=0.9, note=f"{shape}; {told}")
    report.value(what, "images/s", n / float(np.median(times[1])), note=shape)
