"""A step in each number format, eager, compiled and with CUDA graphs: rate, arithmetic, launches, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets import build_dataset
from scripts.benchmarks.operations import CASTS, count_flops, count_kernels, count_operations
from scripts.benchmarks.step import OurStep, PlainStep, peak_memory
from scripts.benchmarks.timing import Report, Settings, alternate, timed
from util.precision import set_tf32

REFLACX_IMAGES, PUBLISHED_EPOCHS = 2616, 400


class Variant(NamedTuple):
    name: str
    dtype: torch.dtype | None  # of autocast
    tf32: bool = False
    compile_mode: str | None = None


def variants(settings: Settings) -> list[Variant]:
    """What there is on this device, or, in a quick run, on any; `settings.compile` adds the compiled ones."""
    everything = settings.device == "cuda" or settings.quick
    eager = [Variant("float32", None), Variant("bfloat16", torch.bfloat16)]
    if everything:
        eager[1:1] = [Variant("TF32", None, tf32=True), Variant("float16", torch.float16)]
    if not settings.compile:
        return eager
    modes = {"compiled": "default"} | ({"CUDA graphs": "reduce-overhead"} if everything else {})
    return eager + [
        variant._replace(name=f"{variant.name}, {name}", compile_mode=mode)
        for name, mode in modes.items()
        for variant in (
            eager[-1:] if settings.quick else eager
        )  # tracing takes long, and is the same for all
    ]


def measure_variants(report: Report, tree: Path, settings: Settings) -> None:
    """Each variant's step against the plain step of the same inputs, in turns: float16 on a GPU, as published."""
    dataset = build_dataset(
        tree, preload=True, cache_size=settings.cache_size, input_size=settings.input_size
    )
    samples = [dataset[(0, i % len(dataset))] for i in range(settings.batch_size)]
    batch = torch.utils.data.default_collate(samples)
    on_gpu = settings.device == "cuda"
    if on_gpu:
        batch = {key: value.pin_memory() for key, value in batch.items()}
    baseline = PlainStep(settings, batch, torch.float16 if on_gpu else None)
    baseline.watched = False
    flops, plain_name = None, "float16" if on_gpu else "float32"
    for variant in variants(settings):
        with _precision(variant):
            step = OurStep(settings, batch, variant.dtype)
            step.watched = False
            if flops is None:
                flops = count_flops(step)
            operations = count_operations(step)
            if (
                variant.compile_mode is not None
            ):  # a quick run is to show that it runs, not to wait for a compiler
                step.model.compile(
                    **({"backend": "eager"} if settings.quick else {"mode": variant.compile_mode})
                )
            times = alternate(baseline, step, settings.repeats, settings.device)
            seconds = float(np.median(times[1]))
            rate = settings.batch_size / seconds
            hours = REFLACX_IMAGES * PUBLISHED_EPOCHS / rate / 3600
            note = (
                f"{rate:.4g} images/s, so {hours:.3g} h for the published 400 epochs; baseline: {plain_name}"
            )
            report.compare(f"step: {variant.name}", *times, note=note)
            ceiling = product_rate(variant.dtype or torch.float32, settings)
            report.value(
                f"step: {variant.name}, arithmetic", "TFLOP/s", flops / seconds / 1e12,
                note=f"{flops / seconds / ceiling:.0%} of a large matrix product's {ceiling / 1e12:.3g} here",
            )  # fmt: skip
            if variant.compile_mode is None:
                casts = sum(operations[name] for name in CASTS)
                report.value(
                    f"step: {variant.name}, operations",
                    "launches",
                    sum(operations.values()),
                    note=f"{casts} casts",
                )
            if on_gpu:
                report.value(f"step: {variant.name}, kernels", "launches", count_kernels(step))
            memory = [peak_memory(one, settings.device) for one in (baseline, step)]
            if memory[1]:
                report.value(f"step: {variant.name}, peak memory", "MiB", memory[1], baseline=memory[0])
        torch.compiler.reset()


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
