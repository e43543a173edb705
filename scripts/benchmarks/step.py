"""A step of training and its parts, in float32 and in half precision, and its memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import models_cxrmim
from datasets import build_dataset
from scripts.benchmarks.targets import direct_hog
from scripts.benchmarks.timing import Report, Settings, alternate
from util.lr_sched import parameter_groups
from util.masking import masked_count, significant_patches


class PlainStep:
    """Baseline: the same model in float32 with the direct HOG, a loop over images for the mask, and
    AdamW's loop over tensors."""

    plain = True
    watched = True  # times the parts, for which a GPU is waited for after each

    def __init__(self, settings: Settings, batch: dict[str, Tensor], dtype: torch.dtype | None = None):
        torch.manual_seed(0)
        self.device = settings.device
        smaller = {"depth": 2, "id_list": (0, 0, 1, 1)} if settings.quick else {}
        self.model = models_cxrmim.ENCODERS[settings.model](img_size=settings.input_size, gaze_weighted=True, **smaller)
        self.model.to(self.device).train()
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
            if not self.watched:
                return
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
        if self.watched:
            self.losses.append(loss.item())


class OurStep(PlainStep):
    """A step as engine_pretrain.py does it."""

    plain = False

    def draw_mask(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.draw_mask(batch, 0.75, 0.5)


def ready_batch(tree: Path, settings: Settings) -> dict[str, Tensor]:
    """A batch as the loader hands it on."""
    dataset = build_dataset(tree, preload=True, cache_size=settings.cache_size, input_size=settings.input_size)
    samples = [dataset[(0, i % len(dataset))] for i in range(settings.batch_size)]
    batch = torch.utils.data.default_collate(samples)
    return {key: value.pin_memory() for key, value in batch.items()} if settings.device == "cuda" else batch


def measure_steps(report: Report, tree: Path, settings: Settings) -> None:
    """A whole step of training and its parts."""
    batch = ready_batch(tree, settings)
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
