"""Encoding with frozen encoders: from cached images to features on disk, against bare forward passes."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader

from datasets.phantom.labelled import Chests
from datasets.phantom.rsna import make_rsna
from downstream.data import read_dataset
from downstream.data.images import Views, normalisation, open_squares
from downstream.features import FeatureFile
from downstream.heads import ENCODE_BATCH, Encoder, Keyed, encode, read_back
from scripts.benchmarks.timing import Report, Settings, timed_twice
from util.stop import StopSignals

READY = 1024  # views that lie ready for the bare forward passes, again and again


def measure_encoding(report: Report, root: Path, settings: Settings) -> None:
    """The encoder that is usual on the device, with ChestX-ray14's augmentation; on a CPU also a tiny one, with crops
    alone, which shows what is not the encoder's."""
    chests = Chests(8 if settings.quick else 64, size=(192, 160), lesion_kinds=("consolidation",))
    images = read_dataset("rsna", make_rsna(root, chests, image_format="jpg").raw)
    plane = open_squares(images, root / "cache")
    crops, augmented = (Views(replace(images, strong_augmentation=strong), plane=plane) for strong in (False, True))
    gpu = settings.device == "cuda"
    named = "vit_base_patch16_224" if gpu else "vit_small_patch16_224"
    tiny = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=2, num_heads=1, num_classes=0)
    usual = tiny if settings.quick else timm.create_model(named, num_classes=0)
    n_tiny, n_usual = (32, 32) if settings.quick else (1024, 8192 if gpu else 32)
    repeats = settings.repeats // 2 if gpu else settings.repeats
    if not gpu:
        measure_encoder(report, "encoding, tiny encoder", tiny, crops, n_tiny, root, settings.device, repeats)
    measure_encoder(report, "downstream encoding", usual, augmented, n_usual, root, settings.device, repeats)


def measure_encoder(
    report: Report, what: str, model: nn.Module, views: Views, n: int, root: Path, device: str, repeats: int
) -> None:
    """`encode`, from cached images to features on disk, against forward passes of batches that lie ready."""
    device, gpu = torch.device(device), device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    encoder = Encoder(model.eval().to(device), *normalisation("half"), device, dtype)
    size, workers = ENCODE_BATCH[device.type], 8 if gpu else 0
    keys = [(key // len(views), key % len(views)) for key in range(n)]
    ready = [batch.to(device) for batch in DataLoader(Keyed(views, keys[:READY]), size)]  # made one by one

    def bare() -> None:
        for _ in read_back(map(encoder, islice(cycle(ready), n // size))):
            pass

    def whole() -> None:
        with tempfile.TemporaryDirectory(dir=root) as folder, StopSignals() as signals, signals.exit_at_signal():
            wanted = []
            for view in range(keys[-1][0] + 1):
                images = np.array([image for of, image in keys if of == view])
                file = FeatureFile(Path(folder, str(view)), len(views), model.embed_dim)
                wanted.append((view, images, file))
            encode(
                encoder,
                views,
                wanted,
                device=device,
                batch_size=size,
                num_workers=workers,
                signals=signals,
                what="encoding",
            )

    processor, times = [], ([], [])
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
