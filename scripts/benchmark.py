#!/usr/bin/env python3
"""Measure this program against plain code for the same work, in one run on one machine.

Every row holds two measurements that were taken in turns: the *baseline*, written out below as the
published program does it (or the nearest plain way), and ours. The ratio is the median of the ratios of
the turns, its spread their quartiles. Inputs are phantoms of 2544 x 3056 px, made here.

    python scripts/benchmark.py                 # CPU or GPU, whichever is there; about 8 minutes on 2 cores
    python scripts/benchmark.py --json out.json
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import models_cxrmim
import run_pretrain
from datasets import build_dataset
from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import prepare
from datasets.sampler import TrainBatches
from datasets.transforms import grid_size, random_crop_box, sample_rng, scale_box
from util.errors import UserError, run_cli
from util.files import atomic_write
from util.hog import GRADIENT_TOLERANCE, HOGPyramid
from util.lr_sched import parameter_groups
from util.masking import masked_count, significant_patches

CELL_SIZES = (4, 8, 16, 32)
NBINS = 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


@dataclass
class Row:
    """One line of the table. Times are seconds, `ratio` is baseline / ours unless the name says otherwise."""

    name: str
    unit: str
    baseline: float | None
    ours: float
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    repeats: int = 1
    bar: str | None = None
    met: bool | None = None
    note: str = ""


@dataclass
class Settings:
    """Sizes of a run; `--quick` shrinks them all."""

    image_size: tuple[int, int] = (3056, 2544)  # height, width
    n_images: int = 8
    model: str = "cxrmim_vit_base_patch16"
    batch_size: int = 8
    repeats: int = 5
    sample_repeats: int = 12
    cache_size: int = 512
    epochs: int = 8
    loader_batches: int = 60
    workers: tuple[int, ...] = (0, 1, 2, 4)
    device: str = "cpu"
    compile: bool = False


@dataclass
class Report:
    machine: dict
    settings: dict
    rows: list[Row] = field(default_factory=list)
    equality: dict[str, float] = field(default_factory=dict)

    def compare(
        self,
        name: str,
        baseline: list[float],
        ours: list[float],
        *,
        at_least: float | None = None,
        note: str = "",
    ) -> None:
        """Add a row of paired times in seconds."""
        ratios = np.array(baseline) / np.array(ours)
        median = float(np.median(ratios))
        self.add(
            Row(
                name,
                "s",
                float(np.median(baseline)),
                float(np.median(ours)),
                median,
                (float(np.percentile(ratios, 25)), float(np.percentile(ratios, 75))),
                len(ratios),
                None if at_least is None else f">= {at_least:g}",
                None if at_least is None else median >= at_least,
                note,
            )
        )

    def value(
        self,
        name: str,
        unit: str,
        ours: float,
        *,
        below: float | None = None,
        baseline: float | None = None,
        note: str = "",
    ) -> None:
        """Add a row of one value, with a baseline where there is one."""
        self.add(
            Row(
                name,
                unit,
                baseline,
                ours,
                ratio=baseline / ours if baseline is not None and ours > 0 else None,
                bar=None if below is None else f"< {below:g}",
                met=None if below is None else ours < below,
                note=note,
            )
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(format_row(row), flush=True)


def format_row(row: Row) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    spread = f" ({row.ratio_quartiles[0]:.3g}..{row.ratio_quartiles[1]:.3g})" if row.ratio_quartiles else ""
    ratio = f"{row.ratio:.3g}x{spread}" if row.ratio is not None else ""
    bar = f"{row.bar} {'met' if row.met else 'MISSED'}" if row.bar else ""
    cells = (f"{row.name:44}", f"{number(row.baseline):>9}", f"{number(row.ours):>9}", f"{row.unit:10}")
    return "  ".join((*cells, f"{ratio:24}", f"{bar:14}", row.note)).rstrip()


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also measure compiled steps")
    parser.add_argument("--work_dir", help="where inputs are made and removed again (default: /tmp)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use")
    settings = Settings(device=device)
    if device == "cuda":
        settings.batch_size, settings.workers, settings.repeats = 128, (0, 4, 16), 20
    if args.quick:
        settings = Settings(
            (330, 380), 2, "cxrmim_vit_tiny_patch16", 2, 2, 2, 64, 2, 3, (0, 1), device
        )  # fmt: skip
    settings.compile = args.compile
    if args.batch_size:
        settings.batch_size = args.batch_size

    report = Report(machine(device), asdict(settings))
    print(" | ".join(f"{key}: {value}" for key, value in report.machine.items()))
    header = f"{'':44}  {'baseline':>9}  {'ours':>9}  {'':10}  {'ratio (quartiles)':24}  bar"
    print(header, flush=True)
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.work_dir) as name:
        tree = make_inputs(Path(name), settings)
        torch.set_num_threads(1)  # as a loader's worker has
        measure_samples(report, tree, settings)
        measure_shared_memory(report, tree, settings)
        measure_loader(report, tree, settings)
        torch.set_num_threads(threads)
        measure_hog(report, settings)
        measure_steps(report, tree, settings)
        measure_training(report, tree, Path(name) / "output", settings)
    for name, value in report.equality.items():
        print(f"{name}: {value:.3g}")
    if args.json:
        with atomic_write(args.json, "w") as file:
            json.dump(asdict(report), file, indent=2)
    return 0


def machine(device: str) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    result = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "Pillow": Image.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        result["gpu"] = torch.cuda.get_device_name()
    return result


def make_inputs(root: Path, settings: Settings) -> Path:
    """A processed tree in native resolution with JPG images, as the published program reads it."""
    study = make_study(root / "raw", n_images=settings.n_images, size=settings.image_size, shared_images=0)
    with contextlib.redirect_stdout(sys.stderr):
        prepare(raw=study.raw, images=study.images, out=root / "tree", size=0, workers=os.cpu_count() or 1)
    index = root / "tree" / "reflacx.json"
    entries = json.loads(index.read_text())
    originals = {path.stem: path for path in Path(study.images).rglob("*.jpg")}
    for entry in entries:  # MIMIC-CXR-JPG's own file in place of the lossless copy
        image = root / "tree" / entry["image_path"]
        entry["image_path"] = str(Path(entry["image_path"]).with_suffix(".jpg"))
        originals[image.stem].rename(image.with_suffix(".jpg"))
        image.unlink()
    index.write_text(json.dumps(entries))
    return root / "tree"


def alternate(baseline: Callable[[], object], ours: Callable[[], object], repeats: int, device: str = "cpu"):
    """Times of two functions called in turns, after one call each to warm up: two lists of seconds."""
    times = ([], [])
    for turn in range(repeats + 1):
        for function, into in zip((baseline, ours), times):
            seconds = timed(function, device)
            if turn:
                into.append(seconds)
    return times


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


# ---- loading ---------------------------------------------------------------------------------------


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


def measure_loader(report: Report, tree: Path, settings: Settings) -> None:
    """Samples per second of a DataLoader as training sets it up."""
    cached = build_dataset(tree, preload=True, cache_size=settings.cache_size)
    published = PublishedLoading(cached)
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
    return DataLoader(
        dataset, batch_sampler=keys, num_workers=workers, prefetch_factor=4 if workers else None
    )


def restart_gap(dataset: Dataset, batch_size: int, workers: int) -> float:
    """Baseline: seconds to an epoch's first batch where every epoch starts its workers anew."""
    loader = make_loader(dataset, batch_size, workers, 3)
    return float(np.median([timed(lambda: next(iter(loader))) for _ in range(3)]))


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


# ---- HOG -------------------------------------------------------------------------------------------


def direct_hog(img: Tensor, cell_sizes=CELL_SIZES, nbins: int = NBINS) -> list[Tensor]:
    """Baseline: one pass for each channel and cell size. [B, 3, H, W] -> list of [B, cells, 3*nbins]."""
    targets = []
    for cell in cell_sizes:
        channels = []
        for channel in range(3):
            x = F.pad(img[:, channel : channel + 1].float(), (1, 1, 1, 1), mode="reflect")
            kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
            gradient = F.conv2d(x, torch.stack([kernel, kernel.T])[:, None])  # [B, 2, H, W]
            gradient = F.hardshrink(gradient, GRADIENT_TOLERANCE)
            magnitude = gradient.norm(dim=1, keepdim=True)
            angle = torch.atan2(gradient[:, 1], gradient[:, 0])[:, None]
            bins = (angle / torch.pi * nbins).floor().long() % nbins
            batch, _, height, width = magnitude.shape
            one_hot = magnitude.new_zeros(batch, nbins, height, width).scatter_(1, bins, magnitude)
            channels.append(F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12))
        targets.append(torch.cat(channels, 1).flatten(2).transpose(1, 2))
    return targets


def noise_batch(settings: Settings, generator: torch.Generator) -> dict[str, Tensor]:
    """Made-up samples in the form of the data sets."""
    shape = (settings.batch_size, 224, 224)
    attention = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {
        "img": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[:, None],
        "attention": attention,
        "foreground": (F.avg_pool2d(attention.float(), 33, 1, 16) > 127.5).to(torch.uint8),
    }


@torch.no_grad()
def measure_hog(report: Report, settings: Settings) -> None:
    """All targets of a batch of gray pictures: 12 direct passes against one."""
    model = models_cxrmim.cxrmim_vit_tiny_patch16().to(settings.device)
    batch = model.prepare_batch(noise_batch(settings, torch.Generator().manual_seed(0)))
    pyramid = HOGPyramid(NBINS, CELL_SIZES)
    times = alternate(
        lambda: direct_hog(batch["img"]), lambda: pyramid(batch["gray"]), settings.repeats, settings.device
    )
    note = f"{settings.batch_size} images of 224 px"
    report.compare("HOG targets of a batch", *times, at_least=10, note=note)
    report.equality["HOG, largest difference from 12 direct passes"] = max(
        (a - b).abs().max().item() for a, b in zip(direct_hog(batch["img"]), pyramid(batch["gray"]))
    )


# ---- the training step -----------------------------------------------------------------------------


class PlainStep:
    """Baseline: the same model in float32 with the direct HOG, a loop over images for the mask, and
    AdamW's loop over tensors."""

    plain = True

    def __init__(self, settings: Settings, batch: dict[str, Tensor], dtype: torch.dtype | None = None):
        torch.manual_seed(0)
        self.device = settings.device
        self.model = getattr(models_cxrmim, settings.model)(gaze_weighted=True).to(self.device).train()
        how = {"foreach": False} if self.plain else {"fused": True}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.05), 1e-4, betas=(0.9, 0.95), **how)
        self.batch, self.dtype = batch, dtype
        self.parts: dict[str, list[float]] = {"masks": [], "forward": [], "backward": [], "optimiser": []}
        self.losses: list[float] = []
        if self.plain:
            self.model.hog.forward = direct_hog

    def draw_mask(self, batch: dict[str, Tensor]) -> Tensor:
        significant = significant_patches(batch["foreground"], 16)
        n_masked = masked_count(significant.shape[1], 0.75)
        masks = torch.zeros(significant.shape)
        for mask, chosen in zip(masks, significant.cpu()):
            inside, outside = chosen.nonzero()[:, 0], (~chosen).nonzero()[:, 0]
            n_inside = max(min(int(len(inside) * 0.5), n_masked), n_masked - len(outside))
            mask[inside[torch.randperm(len(inside))[:n_inside]]] = 1
            mask[outside[torch.randperm(len(outside))[: n_masked - n_inside]]] = 1
        return masks.to(significant.device)

    def __call__(self) -> None:
        seconds = [time.perf_counter()]

        def lap() -> None:
            if self.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter())

        batch = self.model.prepare_batch(self.batch)
        if self.plain:
            batch.pop("gray")  # three channels, three times the work
        mask = self.draw_mask(batch)
        lap()
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            loss = self.model(batch, mask=mask, n_visible=mask.shape[1] - masked_count(mask.shape[1], 0.75))
        lap()
        loss.backward()
        lap()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lap()
        for part, duration in zip(self.parts.values(), np.diff(seconds)):
            part.append(float(duration))
        self.losses.append(loss.item())


class OurStep(PlainStep):
    """A step as engine_pretrain.py does it."""

    plain = False

    def draw_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.draw_mask(batch, 0.75, 0.5)


def measure_steps(report: Report, tree: Path, settings: Settings) -> None:
    """A whole step of training and its parts."""
    dataset = build_dataset(tree, preload=True, cache_size=settings.cache_size)
    samples = [dataset[(0, i % len(dataset))] for i in range(settings.batch_size)]
    batch = torch.utils.data.default_collate(samples)
    baseline, ours = PlainStep(settings, batch), OurStep(settings, batch)
    times = alternate(baseline, ours, settings.repeats, settings.device)
    size = settings.model.split("_")[2]
    note = f"ViT-{size}, batch {settings.batch_size}, float32"
    for part in ours.parts:
        report.compare(f"step: {part}", baseline.parts[part][1:], ours.parts[part][1:], note=note)
    rate = settings.batch_size / float(np.median(times[1]))
    report.compare("step: whole", *times, at_least=1.4, note=f"{note}, {rate:.1f} images/s")
    with torch.no_grad():
        prepared = ours.model.prepare_batch(batch)
        mask = ours.draw_mask(prepared)
        ours_loss = ours.model(prepared, mask=mask).item()
        baseline.model.load_state_dict(ours.model.state_dict())
        prepared.pop("gray")
        plain_loss = baseline.model(prepared, mask=mask).item()
    difference = abs(ours_loss / plain_loss - 1)
    report.equality["loss with our and with direct HOG, relative difference"] = difference

    memory = [peak_memory(step, settings.device) for step in (baseline, ours)]
    if memory[0]:
        report.value("step: peak memory beyond the model", "MiB", memory[1], baseline=memory[0], note=note)
    measure_variants(report, batch, settings)


def measure_variants(report: Report, batch: dict[str, Tensor], settings: Settings) -> None:
    """Steps in half precision, and compiled if asked for, against the plain step."""
    on_gpu = settings.device == "cuda"
    if on_gpu:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    plain_name = "float16" if on_gpu else "float32"
    baseline = PlainStep(settings, batch, torch.float16 if on_gpu else None)
    variants = [("bfloat16", torch.bfloat16, False)]
    if on_gpu:
        variants.insert(0, ("float16", torch.float16, False))
    if settings.compile:
        variants += [(f"{name}, compiled", dtype, True) for name, dtype, _ in variants]
        if not on_gpu:
            variants.append(("float32, compiled", None, True))
    for name, dtype, compiled in variants:
        ours = OurStep(settings, batch, dtype)
        if compiled:
            ours.model.compile()
        times = alternate(baseline, ours, settings.repeats, settings.device)
        rate = settings.batch_size / float(np.median(times[1]))
        report.compare(f"step: whole, {name}", *times, note=f"{rate:.3g} images/s; baseline: {plain_name}")
        if on_gpu:
            memory = [peak_memory(step, "cuda") for step in (baseline, ours)]
            report.value(f"step: peak memory, {name}", "MiB", memory[1], baseline=memory[0])


def peak_memory(step: Callable[[], object], device: str) -> float:
    """MiB that a step takes at its peak on top of what is there before; 0 where that can't be known."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def resident(key: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the step would take what an earlier one left
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except OSError:
        return 0.0
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


# ---- real training ---------------------------------------------------------------------------------


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


def measure_training(report: Report, tree: Path, output: Path, settings: Settings) -> None:
    """A real run of run_pretrain.py, watched from outside: data wait, and the gap between epochs."""
    epochs: list[tuple[float, float, TimedBatches]] = []  # began, ended, batches
    original = run_pretrain.train_one_epoch

    def watched(training, *args):
        if not isinstance(training.batches, TimedBatches):
            training.batches = TimedBatches(training.batches)
        began = time.perf_counter()
        result = original(training, *args)
        epochs.append((began, time.perf_counter(), training.batches))
        return result

    workers = 2 if settings.device == "cpu" else settings.workers[-1]
    batch_size = min(settings.batch_size, settings.n_images)
    run_pretrain.train_one_epoch = watched
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run_pretrain.main(
                [
                    *("--data_path", str(tree), str(tree), "--preload", "--gaze_weighted"),
                    *("--model", settings.model, "--pretrained", "none", "--device", settings.device),
                    *("--batch_size", str(batch_size)),
                    *("--epochs", str(settings.epochs), "--warmup_epochs", "1"),
                    *("--num_workers", str(workers)),
                    *("--cache_size", str(settings.cache_size), "--output_dir", str(output)),
                ]
            )
    finally:
        run_pretrain.train_one_epoch = original
    waits = epochs[0][2].waits
    steps = len(waits) // len(epochs)
    seconds = sum(ended - began for began, ended, _ in epochs) - waits[0]
    share = sum(waits[1:]) / seconds
    note = f"{len(waits)} steps in {len(epochs)} epochs, {workers} workers; first batch {waits[0]:.2f} s"
    report.value("data wait in a real training", "share", share, below=0.03, note=note)
    gaps = [
        after[0] - before[1] + waits[(i + 1) * steps] for i, (before, after) in enumerate(pairwise(epochs))
    ]
    report.value(
        "gap between two epochs",
        "s",
        float(np.median(gaps)),
        below=0.2,
        baseline=restart_gap(build_dataset(tree, cache_size=settings.cache_size), batch_size, workers),
        note=f"largest {max(gaps):.3f} s; baseline: workers started anew",
    )


if __name__ == "__main__":
    run_cli(main)
