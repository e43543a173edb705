"""A step in each number format, eager, compiled and with CUDA graphs: rate, arithmetic, launches, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scripts.benchmarks.operations import CASTS, count_flops, count_kernels, count_operations
from scripts.benchmarks.step import OurStep, PlainStep, peak_memory, ready_batch
from scripts.benchmarks.timing import Report, Settings, alternate, timed
from util.errors import UserError
from util.precision import set_tf32

REFLACX_IMAGES, PUBLISHED_EPOCHS = 2616, 400


class Variant(NamedTuple):
    name: str
    dtype: torch.dtype | None  # of autocast
    tf32: bool = False
    compile_mode: str | None = None


def variants(settings: Settings) -> list[Variant]:
    """What there is on this device, or, in a quick run, on any; `settings.compile` adds the compiled ones, the
    likeliest to be used first, since compiling takes long."""
    everything = settings.device == "cuda" or settings.quick
    eager = [Variant("float32", None), Variant("bfloat16", torch.bfloat16)]
    if everything:
        eager[1:1] = [Variant("TF32", None, tf32=True), Variant("float16", torch.float16)]
    if not settings.compile:
        return eager
    modes = {"compiled": "default"} | ({"CUDA graphs": "reduce-overhead"} if everything else {})
    return eager + [
        variant._replace(name=f"{variant.name}, {name}", compile_mode=mode)
        for variant in (eager[-1:] if settings.quick else eager[::-1])  # tracing is the same for all
        for name, mode in modes.items()
    ]


class VariantSteps:
    """Each variant's step against the plain step of the same inputs, in turns: float16 on a GPU, as published."""

    def __init__(self, report: Report, tree: Path, settings: Settings):
        self.report, self.tree, self.settings = report, tree, settings
        self.on_gpu = settings.device == "cuda"

    @cached_property
    def batch(self) -> dict[str, Tensor]:
        return ready_batch(self.tree, self.settings)

    @cached_property
    def baseline(self) -> PlainStep:
        step = PlainStep(self.settings, self.batch, torch.float16 if self.on_gpu else None)
        step.watched = False
        return step

    @cached_property
    def flops(self) -> int:
        """Of a step, whatever its number format."""
        return count_flops(self._step(None))

    def _step(self, dtype: torch.dtype | None) -> OurStep:
        step = OurStep(self.settings, self.batch, dtype)
        step.watched = False
        return step

    def measure(self, variant: Variant) -> None:
        try:
            with _precision(variant):
                self._measure(variant)
        finally:
            torch.compiler.reset()

    def _measure(self, variant: Variant) -> None:
        report, settings, name = self.report, self.settings, f"step: {variant.name}"
        flops, step = self.flops, self._step(variant.dtype)
        if variant.compile_mode is not None:
            # A quick run is to show that it runs, not to wait for a compiler.
            how = {"backend": "eager"} if settings.quick else {"mode": variant.compile_mode}
            step.model.compile(**how)
            # With CUDA graphs the first step runs as it is, and the second is recorded.
            started = timed(lambda: [step() for _ in range(3)], settings.device)
            report.value(f"{name}, start", "s", started, note="the first 3 steps, most of it compiling")
        times = alternate(self.baseline, step, settings.repeats, settings.device)
        seconds = float(np.median(times[1]))
        rate = settings.batch_size / seconds
        hours = REFLACX_IMAGES * PUBLISHED_EPOCHS / rate / 3600
        plain = "float16" if self.on_gpu else "float32"
        note = f"{rate:.4g} images/s, so {hours:.3g} h for the published 400 epochs; baseline: {plain}"
        report.compare(name, *times, note=note)
        ceiling = product_rate(variant.dtype or torch.float32, settings)
        report.value(
            f"{name}, arithmetic",
            "TFLOP/s",
            flops / seconds / 1e12,
            note=f"{flops / seconds / ceiling:.0%} of a large matrix product's {ceiling / 1e12:.3g} here",
        )
        if variant.compile_mode is None:
            found, before = count_operations(step), count_operations(self.baseline)
            note = f"{sum(found[cast] for cast in CASTS)} casts; operations of torch, some of several kernels"
            report.value(f"{name}, operations", "launches", found.total(), baseline=before.total(), note=note)
        if self.on_gpu:
            kernels = [count_kernels(one) for one in (self.baseline, step)]
            if not all(kernels):
                raise UserError(f"{name}: the profiler saw no kernel; it needs CUPTI, and the right to trace")
            report.value(f"{name}, kernels", "launches", kernels[1], baseline=kernels[0])
        memory = [peak_memory(one, settings.device) for one in (self.baseline, step)]
        if memory[1]:
            report.value(f"{name}, peak memory", "MiB", memory[1], baseline=memory[0])


def product_rate(dtype: torch.dtype, settings: Settings) -> float:
    """Floating-point operations per second of a product of large square matrices: the ceiling on this machine."""
    side = 64 if settings.quick else {"cuda": 8192, "cpu": 1024}[settings.device]
    a = torch.randn(side, side, device=settings.device).to(dtype)
    b = torch.randn(side, side, device=settings.device).to(dtype)
    timed(lambda: a @ b, settings.device)
    return 2 * side**3 / min(timed(lambda: a @ b, settings.device) for _ in range(5))


@contextlib.contextmanager
def _precision(variant: Variant) -> Iterator[None]:
    set_tf32(variant.tf32)
    try:
        yield
    finally:
        set_tf32(False)
