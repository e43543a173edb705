"""Loading: a sample, the cache, memory that workers share, a DataLoader."""

from __future__ import annotations

import multiprocessing
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from datasets import build_dataset
from datasets.sampler import TrainBatches
from datasets.transforms import grid_size, random_crop_box, sample_rng, scale_box
from scripts.benchmarks.timing import Report, Settings, alternate, one_thread, timed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


class PublishedLoading(Dataset):
    """Baseline: decode three native files in full, to float tensors, crop and resize those."""

    def __init__(self, dataset, input_size: int = 224):
        self.files = [dataset.files(i) for i in range(len(dataset))]
        self.input_size = input_size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key) -> dict[str, Tensor]:
        epoch, index = key
        files = self.files[index]
        image = TF.to_tensor(Image.open(files.image).convert("RGB"))  # [3, H, W]
        maps = [TF.to_tensor(Image.open(file).convert("L")) for file in (files.attention, files.foreground)]
        planes = torch.cat([image, *maps])  # [5, H, W] float
        torch.manual_seed(1000 * epoch + index)
        box = RandomResizedCrop.get_params(planes, (0.2, 1.0), (3 / 4, 4 / 3))
        size = [self.input_size] * 2
        planes = TF.resized_crop(planes, *box, size, InterpolationMode.BICUBIC, antialias=True)
        if torch.rand(()) < 0.5:
            planes = TF.hflip(planes)
        return {
            "img": TF.normalize(planes[:3], MEAN, STD),
            "attention": planes[3].clamp(0, 1),
            "foreground": planes[4].clamp(0, 1),
        }


@one_thread()
def measure_samples(report: Report, tree: Path, settings: Settings) -> None:
    """One sample in one thread: published way, our native way, from the cache; and how the cache is built."""
    native = build_dataset(tree, preload=True, use_cache=False, cache_size=settings.cache_size)
    published = PublishedLoading(native)
    n = len(native)
    began = time.perf_counter()
    cached = build_dataset(tree, preload=True, cache_size=settings.cache_size)
    build_seconds = time.perf_counter() - began

    turn = iter(range(10**9))
    times = alternate(
        lambda: published[(0, next(turn) % n)], lambda: native[(0, next(turn) % n)], settings.sample_repeats
    )
    report.compare("sample from native files", *times, at_least=4, note="one thread, stored foreground")
    # A cached sample takes less than the clock's noise: many in a turn.
    many = 50
    baseline, ours = alternate(
        lambda: published[(0, next(turn) % n)],
        lambda: [cached[(0, next(turn) % n)] for _ in range(many)],
        settings.sample_repeats,
    )
    ours = [seconds / many for seconds in ours]
    note = "one thread, stored foreground"
    report.compare("sample from the cache", baseline, ours, at_least=200, note=note)
    epoch = float(np.median(baseline)) * n
    report.value(
        "building the cache, per image",
        "s",
        build_seconds / n,
        baseline=epoch / n,
        note=f"{n / build_seconds:.1f} images/s; baseline: loading them once",
    )

    differences = {key: [] for key in ("img", "attention", "foreground")}
    for epoch in range(settings.sample_repeats // 2 + 1):
        for i in range(n):
            a, b = native[(epoch, i)], cached[(epoch, i)]
            for key, values in differences.items():
                values.append((a[key].float() - b[key].float()).abs().mean().item())
    for key, values in differences.items():
        unit = "share of pixels" if key == "foreground" else "gray levels of 255"
        report.equality[f"cached vs native {key}, mean difference, {unit}"] = float(np.mean(values))
    report.equality["native vs float tensors, same crop, largest difference, gray levels of 255"] = max(
        float_crop_difference(native, i) for i in range(n)
    )


def float_crop_difference(dataset, index: int) -> float:
    """Largest difference of a sample's image from the same crop made from float tensors."""
    file = dataset.files(index).image
    rng = sample_rng(dataset.seed, 0, index)
    gray = TF.to_tensor(Image.open(file).convert("L"))  # [1, H, W]
    size = tuple(gray.shape[1:])
    grid = grid_size(*size, dataset.cache_size)
    box = scale_box(random_crop_box(rng, *grid, dataset.min_crop_ratio), grid, size)
    crop = TF.resized_crop(gray, *box, [dataset.input_size] * 2, InterpolationMode.BICUBIC, antialias=True)
    if rng.random() < 0.5:
        crop = TF.hflip(crop)
    return (crop.clamp(0, 1) * 255 - dataset[(0, index)]["img"].float()).abs().max().item()


@one_thread()
def measure_loader(report: Report, tree: Path, settings: Settings) -> None:
    """Samples per second of a DataLoader as training sets it up."""
    cached = build_dataset([tree] * settings.copies, preload=True, cache_size=settings.cache_size)
    published = PublishedLoading(build_dataset(tree, preload=True, use_cache=False))
    batch_size = min(settings.batch_size, len(cached))
    one = float(np.median([timed(lambda: published[(0, 0)]) for _ in range(3)]))
    warnings.filterwarnings("ignore", message=".*worker processes in total")  # more than CPUs: on purpose
    for workers in settings.workers:
        loader = iter(make_loader(cached, batch_size, workers, settings.loader_batches + 4))
        for _ in range(4):
            next(loader)  # workers start
        seconds = timed(lambda loader=loader: list(loader))
        per_sample = seconds / (settings.loader_batches * batch_size)
        report.value(
            f"loader, {workers} workers, per sample",
            "s",
            per_sample,
            baseline=one,
            note=f"{1 / per_sample:.0f} samples/s; baseline: native files, no worker",
        )


def make_loader(dataset: Dataset, batch_size: int, workers: int, batches: int) -> DataLoader:
    sampler = TrainBatches(len(dataset), batch_size, epochs=batches * batch_size // len(dataset) + 1)
    keys = [key for _, key in zip(range(batches), sampler)]
    return DataLoader(dataset, batch_sampler=keys, num_workers=workers, prefetch_factor=4 if workers else None)


def restart_gap(dataset: Dataset, batch_size: int, workers: int) -> float:
    """Baseline: seconds to an epoch's first batch where every epoch starts its workers anew."""
    loader = make_loader(dataset, batch_size, workers, 3)
    return float(np.median([timed(lambda: next(iter(loader))) for _ in range(3)]))


@one_thread()
def measure_shared_memory(report: Report, tree: Path, settings: Settings) -> None:
    """Two processes, like two ranks, read every pixel of one cache; what the second adds to memory."""
    if not os.path.exists("/proc/self/smaps_rollup"):
        return
    dataset = build_dataset(tree, preload=True, cache_size=min(settings.image_size))
    size = sum(os.path.getsize(plane.path) for plane, _ in dataset.cache.by_plane)
    context = multiprocessing.get_context("fork")
    queue, done = context.Queue(), context.Event()

    def rank() -> None:
        before = private_bytes()
        for i in range(len(dataset)):
            for plane in dataset.read_planes(i)[0]:
                int(plane.max())
        queue.put(private_bytes() - before)
        done.wait(60)

    growth = []
    ranks = [context.Process(target=rank) for _ in range(2)]
    for process in ranks:
        process.start()
        growth.append(queue.get(timeout=60))
    done.set()
    for process in ranks:
        process.join()
    report.value(
        "memory that a second rank adds, of the cache",
        "share",
        growth[1] / size,
        below=0.1,
        note=f"private memory, cache of {size / 2**20:.0f} MiB",
    )


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private"))
