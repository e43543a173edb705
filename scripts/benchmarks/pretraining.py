"""Pretraining against plain code as the published program's: samples, HOG targets, steps, a whole run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import models_cxrmim
import run_pretrain
from datasets import build_dataset
from scripts.benchmarks.timing import Report, Settings, alternate, timed
from util.hog import GRADIENT_TOLERANCE, HOGPyramid
from util.lr_sched import parameter_groups
from util.masking import masked_count
from util.precision import set_tf32

REFLACX_IMAGES, PUBLISHED_EPOCHS = 2616, 400
CELL_SIZES, NBINS = (4, 8, 16, 32), 9
COPIES = 64  # of the tree, in what a run on a GPU is trained on


def published_sample(files, size: int = 224) -> Tensor:
    """Baseline: decode three native files in full, to float tensors, crop and resize those: [5, S, S]."""
    image = TF.to_tensor(Image.open(files.image).convert("RGB"))
    maps = [TF.to_tensor(Image.open(file).convert("L")) for file in (files.attention, files.foreground)]
    planes = torch.cat([image, *maps])  # [5, H, W]
    box = RandomResizedCrop.get_params(planes, (0.2, 1.0), (3 / 4, 4 / 3))
    planes = TF.resized_crop(planes, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.cat([TF.normalize(planes[:3], mean, std), planes[3:].clamp(0, 1)])


def measure_samples(report: Report, tree: Path, settings: Settings) -> None:
    """One sample in one thread, as a loader's worker has: from native files and from the cache."""
    native = build_dataset(tree, preload=True, use_cache=False)
    cached = build_dataset(tree, preload=True)
    n, turn, threads, many = len(native), count(), torch.get_num_threads(), 50

    def published() -> Tensor:
        return published_sample(native.files(next(turn) % n))

    torch.set_num_threads(1)
    try:
        times = alternate(published, lambda: native[0, next(turn) % n], settings.repeats)
        report.compare("sample from native files", *times, note="one thread, stored foreground")
        # A cached sample takes less than the clock's noise: many in a turn.
        baseline, ours = alternate(
            published, lambda: [cached[0, next(turn) % n] for _ in range(many)], settings.repeats
        )
        ours = [seconds / many for seconds in ours]
        report.compare("sample from the cache", baseline, ours, note="one thread, stored foreground")
    finally:
        torch.set_num_threads(threads)
    for key in ("img", "attention"):
        differences = [(native[0, i][key].float() - cached[0, i][key].float()).abs().mean().item() for i in range(n)]
        report.value(f"cached vs native {key}, mean difference", "gray levels", float(np.mean(differences)))


def direct_hog(img: Tensor) -> list[Tensor]:
    """Baseline: one pass for each channel and cell size. [B, 3, H, W] -> list of [B, cells, 3*NBINS]."""
    targets = []
    for cell in CELL_SIZES:
        channels = []
        for channel in range(3):
            x = F.pad(img[:, channel : channel + 1].float(), (1, 1, 1, 1), mode="reflect")
            kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
            gradient = F.conv2d(x, torch.stack([kernel, kernel.T])[:, None])  # [B, 2, H, W]
            gradient = F.hardshrink(gradient, GRADIENT_TOLERANCE)
            magnitude = gradient.norm(dim=1, keepdim=True)
            angle = torch.atan2(gradient[:, 1], gradient[:, 0])[:, None]
            bins = (angle / torch.pi * NBINS).floor().long() % NBINS
            batch, _, height, width = magnitude.shape
            one_hot = magnitude.new_zeros(batch, NBINS, height, width).scatter_(1, bins, magnitude)
            channels.append(F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12))
        targets.append(torch.cat(channels, 1).flatten(2).transpose(1, 2))
    return targets


@torch.no_grad()
def measure_hog(report: Report, tree: Path, settings: Settings) -> None:
    """All targets of a batch of gray pictures: 12 direct passes against one."""
    model = models_cxrmim.cxrmim_vit_tiny_patch16().to(settings.device)
    batch, pyramid = model.prepare_batch(ready_batch(tree, settings, 224)), HOGPyramid(NBINS, CELL_SIZES)
    plain, ours = (lambda: direct_hog(batch["img"])), (lambda: pyramid(batch["gray"]))
    difference = max((a - b).abs().max().item() for a, b in zip(plain(), ours(), strict=True))
    times = alternate(plain, ours, settings.repeats, settings.device)
    note = f"{settings.batch_size} images of 224 px; largest difference {difference:.1g}"
    report.compare("HOG targets of a batch", *times, note=note)


def ready_batch(tree: Path, settings: Settings, size: int) -> dict[str, Tensor]:
    """A batch as the loader hands it on."""
    dataset = build_dataset(tree, preload=True, input_size=size)
    batch = torch.utils.data.default_collate([dataset[0, i % len(dataset)] for i in range(settings.batch_size)])
    return {key: value.pin_memory() for key, value in batch.items()} if settings.on_gpu else batch


class Steps:
    """Steps of training in each number format against the baseline in turns: the same model with direct HOG of three
    channels and AdamW tensor by tensor, in float32, or float16 on a GPU, as published."""

    def __init__(self, report: Report, tree: Path, settings: Settings):
        self.report, self.tree, self.settings = report, tree, settings

    def step(self, dtype: torch.dtype, plain: bool = False, compiled: bool = False) -> Callable[[], None]:
        settings = self.settings
        batch = ready_batch(self.tree, settings, settings.input_size)
        torch.manual_seed(0)
        smaller = {"depth": 2, "id_list": (0, 0, 1, 1)} if settings.quick else {}
        model = models_cxrmim.ENCODERS[settings.model](img_size=settings.input_size, gaze_weighted=True, **smaller)
        model.to(settings.device).train()
        how = {"foreach": False} if plain else {"fused": True}
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), **how)
        if plain:
            model.hog.forward = direct_hog
        if compiled:  # a quick run is to show that it runs, not to wait for a compiler
            model.compile(backend="eager" if settings.quick else "inductor")

        def step() -> None:
            ready = model.prepare_batch(batch)
            if plain:
                ready.pop("gray")  # three channels, three times the work
            mask = model.draw_mask(ready, 0.75, 0.5)
            with torch.autocast(settings.device, dtype, enabled=dtype != torch.float32):
                loss = model(ready, mask=mask, n_visible=mask.shape[1] - masked_count(mask.shape[1], 0.75))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def measure(self, name: str, compiled: bool) -> None:
        """`name`: float32, TF32, float16 or bfloat16."""
        settings = self.settings
        plain = torch.float16 if settings.on_gpu else torch.float32
        dtype = torch.float32 if name == "TF32" else getattr(torch, name)
        baseline, ours = self.step(plain, plain=True), self.step(dtype, compiled=compiled)
        title = f"step: {name}" + ", compiled" * compiled
        set_tf32(name == "TF32")
        try:
            start = timed(ours, settings.device)
            if settings.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = alternate(baseline, ours, settings.repeats, settings.device)
        finally:
            set_tf32(False)
            torch.compiler.reset()
        rate = settings.batch_size / float(np.median(times[1]))
        hours = REFLACX_IMAGES * PUBLISHED_EPOCHS / rate / 3600
        note = f"{rate:.4g} images/s, so {hours:.3g} h for the published 400 epochs; baseline: {plain}"
        report_memory = f"; at most {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if settings.on_gpu else ""
        self.report.compare(title, *times, note=f"{note}; first step {start:.3g} s{report_memory}")


def measure_training(report: Report, tree: Path, output: Path, settings: Settings, workers: int) -> None:
    """Images per second of a run of run_pretrain.py, by its log."""
    trees = [f"{output}-tree{i}" for i in range(COPIES if settings.on_gpu else 2)]  # a tree may be named once only
    for copy in trees:
        shutil.copytree(tree, copy, copy_function=os.link)
    n_images = len(build_dataset(trees, preload=True))
    batch_size, epochs = min(settings.batch_size, n_images), 2 if settings.quick else 8
    flags = ["--data_path", *trees, "--preload", "--gaze_weighted", "--model", settings.model, "--pretrained", "none"]
    flags += ["--device", settings.device, "--batch_size", str(batch_size), "--num_workers", str(workers)]
    flags += ["--epochs", str(epochs), "--warmup_epochs", "1", "--output_dir", str(output)]
    with contextlib.redirect_stdout(sys.stderr):
        status = run_pretrain.main(flags)
    if status:  # a signal ended it: of this program, too
        raise SystemExit(status)
    records = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    seconds = sum(record["time_s"] for record in records[1:])  # a device warms up in the first epoch
    per_image = seconds / (len(records) - 1) / (n_images // batch_size * batch_size)
    note = f"{1 / per_image:.4g} images/s at batch {batch_size}, {workers} workers"
    report.value(f"real training, {workers} workers, per image", "s", per_image, note=note)
