#!/usr/bin/env python3
"""Measure this program against plain code for the same work, in one run on one machine.

A row compares two functions called in turns: the *baseline*, the published program's way or the nearest plain one, and
ours. The ratio is the median over the turns, its spread their quartiles. Inputs are phantoms of 2544 x 3056 px, made
below TMPDIR and removed again.

    python scripts/benchmark.py                 # CPU or GPU, whichever is there
    python scripts/benchmark.py --json out.json # written after every row: what is measured is kept

If a part fails, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import models_cxrmim
import run_downstream
import run_pretrain
from datasets import build_dataset
from gaze.model import GazeNet
from scripts import make_phantom, predict_gaze, prepare_mimic, prepare_reflacx
from util.checkpoint import FORMAT, KEYS, save_checkpoint
from util.cli import Parser, available_cpus, check_least, finite_float
from util.errors import UserError, run_cli
from util.files import atomic_write, check_file_place
from util.hog import GRADIENT_TOLERANCE, HOGPyramid
from util.lr_sched import parameter_groups
from util.masking import masked_count
from util.precision import set_tf32
from util.stop import StopSignals

REFLACX_IMAGES, PUBLISHED_EPOCHS = 2616, 400
CELL_SIZES, NBINS = (4, 8, 16, 32), 9
FRACTIONS, SEEDS = (0.3, 0.6, 1.0), (43, 44, 45)


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if PyTorch can use a GPU")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also measure compiled steps (on a GPU always)")
    parser.add_argument("--minutes", type=finite_float, default=math.inf, help="begin no part after so long")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    if args.batch_size is not None:
        check_least(args, 1, "batch_size")
    if args.json:
        check_file_place(args.json, "--json")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use")
    set_tf32(False)
    deadline = time.monotonic() + 60 * args.minutes
    with StopSignals() as signals, signals.exit_at_signal():  # inputs are removed
        with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
            bench = Benchmark(args, Path(root))
            bench.write()  # so that a place that can't be written to ends the run now
            print(f"{'':44} {'baseline':>9} {'ours':>9} {'':10} ratio (quartiles)", flush=True)
            for name, part in bench.parts().items():
                if time.monotonic() >= deadline:
                    bench.skipped.append(name)
                    continue
                try:
                    part()
                except Exception as error:  # costs its own rows alone
                    traceback.print_exc()
                    bench.failures[name] = f"{type(error).__name__}: {error}"
    bench.write(whole=True)
    if bench.skipped:
        print(f"not measured, --minutes {args.minutes:g} are over: {'; '.join(bench.skipped)}")
    if bench.failures:
        print(f"error: {len(bench.failures)} parts failed: {'; '.join(bench.failures)}", file=sys.stderr)
    return 1 if bench.failures or not bench.rows else 0


def published_sample(files, size: int = 224) -> Tensor:
    """Baseline: decode three native files in full, to float tensors, crop and resize those: [5, S, S]."""
    image = TF.to_tensor(Image.open(files.image).convert("RGB"))
    maps = [TF.to_tensor(Image.open(file).convert("L")) for file in (files.attention, files.foreground)]
    planes = torch.cat([image, *maps])  # [5, H, W]
    box = RandomResizedCrop.get_params(planes, (0.2, 1.0), (3 / 4, 4 / 3))
    planes = TF.resized_crop(planes, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.cat([TF.normalize(planes[:3], mean, std), planes[3:].clamp(0, 1)])


def direct_hog(img: Tensor) -> list[Tensor]:
    """Baseline: one pass for each channel and cell size. [B, 3, H, W] -> list of [B, cells, 3*NBINS]."""
    targets = []
    for cell in CELL_SIZES:
        channels = []
        for x in img.float().split(1, 1):
            kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
            gradient = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), torch.stack([kernel, kernel.T])[:, None])
            gradient = F.hardshrink(gradient, GRADIENT_TOLERANCE)  # [B, 2, H, W]
            angle = torch.atan2(gradient[:, 1:], gradient[:, :1])
            bins = (angle / torch.pi * NBINS).floor().long() % NBINS
            one_hot = x.new_zeros(len(x), NBINS, *x.shape[2:]).scatter_(1, bins, gradient.norm(dim=1, keepdim=True))
            channels.append(F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12))
        targets.append(torch.cat(channels, 1).flatten(2).transpose(1, 2))
    return targets


@dataclass
class Benchmark:
    """What is measured, with its inputs in `root`, and the rows so far."""

    args: argparse.Namespace
    root: Path

    def __post_init__(self):
        self.quick, self.device = self.args.quick, self.args.device
        self.gpu = self.device == "cuda"
        self.batch_size = self.args.batch_size or (2 if self.quick else 128 if self.gpu else 8)
        self.repeats = 2 if self.quick else 10 if self.gpu else 5
        self.input_size = 64 if self.quick else 224
        self.height, self.width = (640, 560) if self.quick else (3056, 2544)
        self.model = f"cxrmim_vit_{'tiny' if self.quick else 'base'}_patch16"
        self.rows, self.failures, self.skipped = [], {}, []

    def parts(self) -> dict[str, Callable[[], None]]:
        """All measurements by name, the most important first."""
        # Those of a GPU also in a quick run: they must work the first time.
        many = self.gpu or self.quick
        formats = ("bfloat16", "float16", "TF32", "float32") if many else ("bfloat16", "float32")
        found = {"samples": self.samples, "HOG targets": self.hog}
        found |= {f"step: {name}": partial(self.step, name, False) for name in formats}
        for workers in (1,) if self.quick else (4, 16) if self.gpu else (2,):
            found[f"training, {workers} workers"] = partial(self.training, workers)
        found |= {"encoding": self.encoding, "gaze prediction": self.prediction, "linear evaluation": self.heads}
        if many or self.args.compile:  # compiling takes a minute or more each
            for name in formats[:1] if self.quick else formats:
                found[f"step: {name}, compiled"] = partial(self.step, name, True)
        return found

    def timed(self, function: Callable[[], object]) -> float:
        began = time.perf_counter()
        function()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def compare(self, name: str, baseline: Callable, ours: Callable, note: str = "", calls: int = 1) -> float:
        """Add a row of two functions called in turns, after one call each to warm up; returns the median of ours,
        which does `calls` times in a turn what `baseline` does once."""
        turns = [[self.timed(function) for function in (baseline, ours)] for _ in range(self.repeats + 1)]
        return self.add_turns(name, np.array(turns[1:]) / [1, calls], note)

    def add_turns(self, name: str, turns: np.ndarray, note: str) -> float:
        """Add a row of seconds [turns, 2], baseline and ours; returns the median of ours."""
        low, ratio, high = np.percentile(turns[:, 0] / turns[:, 1], (25, 50, 75)).tolist()
        before, after = np.median(turns, 0).tolist()
        self.add(name, "s", after, note, before, ratio, (low, high))
        return after

    def add(self, name, unit, ours, note="", baseline=None, ratio=None, quartiles=None) -> None:
        row = {"name": name, "unit": unit, "baseline": baseline, "ours": ours, "ratio": ratio}
        self.rows.append(
            row | {"ratio_quartiles": quartiles, "repeats": len(quartiles or ()) and self.repeats, "note": note}
        )
        before, ratio = (f"{value:.4g}" if value is not None else "" for value in (baseline, ratio))
        spread = "({:.3g}..{:.3g})".format(*quartiles) if quartiles else ""
        print(f"{name:44} {before:>9} {ours:9.4g} {unit:10} {ratio:>6} {spread:14} {note}".rstrip(), flush=True)
        self.write()

    def write(self, whole: bool = False) -> None:
        """Raises `UserError`."""
        if self.args.json is None:
            return
        cpu = platform.processor() or platform.machine()
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
        machine = {"cpu": cpu, "cores": available_cpus(), "threads": torch.get_num_threads()}
        machine |= {"gpu": torch.cuda.get_device_name() if self.gpu else None, "python": platform.python_version()}
        machine |= {module.__name__: module.__version__ for module in (torch, torchvision, Image)}
        settings = {"device": self.device, "quick": self.quick, "batch_size": self.batch_size, "repeats": self.repeats}
        report = {"machine": machine, "settings": settings, "rows": self.rows, "failures": self.failures}
        try:
            with atomic_write(self.args.json, "w") as file:
                json.dump(report | {"skipped": self.skipped, "whole": whole}, file, indent=2)
        except OSError as error:
            raise UserError(f"--json {self.args.json}: can't be written: {error.strerror}") from None

    def run(self, program, *words) -> None:
        """Call one of our programs, which speaks on stderr."""
        with contextlib.redirect_stdout(sys.stderr):
            status = program.main([str(word) for word in words])
        if status:  # a signal ended it: of this program, too
            raise SystemExit(status)

    @cached_property
    def tree(self) -> Path:
        """A processed tree in native resolution with JPG images, as the published program reads it."""
        raw, tree = self.root / "raw", self.root / "tree"
        size = ("--height", self.height, "--width", self.width)
        self.run(make_phantom, "--out", raw, "--n_images", 2 if self.quick else 8, "--shared_images", 0, *size)
        source = ("--raw", raw / "reflacx", "--images", raw / "mimic")
        self.run(prepare_reflacx, *source, "--out", tree, "--size", 0, "--workers", available_cpus())
        entries = json.loads((tree / "reflacx.json").read_text())
        originals = {path.stem: path for path in (raw / "mimic").rglob("*.jpg")}
        for entry in entries:  # MIMIC-CXR-JPG's own file in place of the lossless copy
            image = tree / entry["image_path"]
            entry["image_path"] = str(Path(entry["image_path"]).with_suffix(".jpg"))
            originals[image.stem].rename(image.with_suffix(".jpg"))
            image.unlink()
        (tree / "reflacx.json").write_text(json.dumps(entries))
        return tree

    def samples(self) -> None:
        """One sample in one thread, as a loader's worker has: from native files and from the cache."""
        native, cached = (build_dataset(self.tree, preload=True, use_cache=use) for use in (False, True))
        n, turn, threads, many = len(native), count(), torch.get_num_threads(), 50

        def published() -> Tensor:
            return published_sample(native.files(next(turn) % n))

        def several() -> None:  # a cached sample takes less than the clock's noise
            for _ in range(many):
                cached[0, next(turn) % n]

        note = "one thread, stored foreground"
        torch.set_num_threads(1)
        try:
            self.compare("sample from native files", published, lambda: native[0, next(turn) % n], note)
            self.compare("sample from the cache", published, several, note, many)
        finally:
            torch.set_num_threads(threads)
        for key in ("img", "attention"):
            means = [(native[0, i][key].float() - cached[0, i][key].float()).abs().mean().item() for i in range(n)]
            self.add(f"cached vs native {key}, mean difference", "gray levels", float(np.mean(means)))

    def ready_batch(self, size: int) -> dict[str, Tensor]:
        """A batch as the loader hands it on."""
        dataset = build_dataset(self.tree, preload=True, input_size=size)
        batch = torch.utils.data.default_collate([dataset[0, i % len(dataset)] for i in range(self.batch_size)])
        return {key: value.pin_memory() for key, value in batch.items()} if self.gpu else batch

    @torch.no_grad()
    def hog(self) -> None:
        """All targets of a batch of gray pictures: 12 direct passes against one."""
        model = models_cxrmim.cxrmim_vit_tiny_patch16().to(self.device)
        batch, pyramid = model.prepare_batch(self.ready_batch(224)), HOGPyramid(NBINS, CELL_SIZES)
        plain, ours = (lambda: direct_hog(batch["img"])), (lambda: pyramid(batch["gray"]))
        difference = max((a - b).abs().max().item() for a, b in zip(plain(), ours(), strict=True))
        note = f"{self.batch_size} images of 224 px; largest difference {difference:.1g}"
        self.compare("HOG targets of a batch", plain, ours, note)

    def training_step(self, dtype: torch.dtype, plain: bool = False, compiled: bool = False) -> Callable[[], None]:
        """A step; `plain`: the same model with direct HOG of three channels and AdamW tensor by tensor."""
        batch = self.ready_batch(self.input_size)
        torch.manual_seed(0)
        smaller = {"depth": 2, "id_list": (0, 0, 1, 1)} if self.quick else {}
        model = models_cxrmim.ENCODERS[self.model](img_size=self.input_size, gaze_weighted=True, **smaller)
        model.to(self.device).train()
        how = {"foreach": False} if plain else {"fused": True}
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), **how)
        if plain:
            model.hog.forward = direct_hog
        if compiled:  # a quick run is to show that it runs, not to wait for a compiler
            model.compile(backend="eager" if self.quick else "inductor")

        def step() -> None:
            ready = model.prepare_batch(batch)
            if plain:
                ready.pop("gray")  # three channels, three times the work
            mask = model.draw_mask(ready, 0.75, 0.5)
            with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
                loss = model(ready, mask=mask, n_visible=mask.shape[1] - masked_count(mask.shape[1], 0.75))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def step(self, name: str, compiled: bool) -> None:
        """`name`: float32, TF32, float16 or bfloat16; the baseline is in float32, or float16 on a GPU, as published."""
        plain = torch.float16 if self.gpu else torch.float32
        dtype = torch.float32 if name == "TF32" else getattr(torch, name)
        baseline, ours = self.training_step(plain, plain=True), self.training_step(dtype, compiled=compiled)
        set_tf32(name == "TF32")
        try:
            first = self.timed(ours)
            note = f"baseline: {plain}; first step {first:.3g} s"
            seconds = self.compare(f"step: {name}" + ", compiled" * compiled, baseline, ours, note)
        finally:
            set_tf32(False)
            torch.compiler.reset()
        rate = self.batch_size / seconds
        hours = REFLACX_IMAGES * PUBLISHED_EPOCHS / rate / 3600
        self.rows[-1]["note"] += f"; {rate:.4g} images/s, so {hours:.3g} h for the published 400 epochs"
        self.rows[-1]["note"] += f"; at most {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB so far" * self.gpu
        print(f"{'':44} {self.rows[-1]['note']}", flush=True)

    def training(self, workers: int) -> None:
        """Images per second of a run of run_pretrain.py, by its log."""
        output = self.root / f"output-{workers}"
        trees = [f"{output}-tree{i}" for i in range(64 if self.gpu else 2)]  # a tree may be named once only
        for copy in trees:
            shutil.copytree(self.tree, copy, copy_function=os.link)
        n_images = len(build_dataset(trees, preload=True))
        batch_size = min(self.batch_size, n_images)
        flags = ["--data_path", *trees, "--preload", "--gaze_weighted", "--model", self.model, "--pretrained", "none"]
        flags += ["--device", self.device, "--batch_size", batch_size, "--num_workers", workers]
        flags += ["--epochs", 2 if self.quick else 8, "--warmup_epochs", 1, "--output_dir", output]
        self.run(run_pretrain, *flags)
        records = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
        seconds = sum(record["time_s"] for record in records[1:])  # a device warms up in the first epoch
        per_image = seconds / (len(records) - 1) / (n_images // batch_size * batch_size)
        note = f"{1 / per_image:.4g} images/s at batch {batch_size}, {workers} workers"
        self.add(f"real training, {workers} workers, per image", "s", per_image, note)

    def labelled(self, name: str, n: int, model: str) -> tuple[Path, list]:
        """Made-up labelled images, and the flags to judge an encoder with random weights on them."""
        made = ("--layout", "rsna", "--format", "jpg", "--height", 192, "--width", 160, "--normal_fraction", 0.5)
        self.run(make_phantom, "--out", self.root / name, "--n_images", n, "--lesion_kinds", "consolidation", *made)
        flags = ["--dataset", "rsna", "--data_path", self.root / name / "rsna", "--weights", f"random@{model}"]
        return self.root / name / "rsna", [*flags, "--device", self.device]

    def encoder(self, model: str) -> torch.nn.Module:
        return timm.create_model(model, num_classes=0).eval().to(self.device)

    def encoding(self) -> None:
        """From image files to features on disk, against forward passes of a batch that lies ready.

        Ours is a call of run_downstream.py less a second one that finds all features there.
        """
        name = "vit_tiny_patch16_224" if self.quick else f"vit_{'base' if self.gpu else 'small'}_patch16_224"
        n, size = (40, 8) if self.quick else (2048, 256) if self.gpu else (128, 32)
        _, flags = self.labelled("encoded", n, name)
        dtype = torch.bfloat16 if self.gpu else torch.float32
        flags += ["--method", "probe", "--encode_batch", size, "--dtype", str(dtype).removeprefix("torch.")]
        flags += ["--bootstrap", 200, "--num_workers", 8 if self.gpu else 0]
        model, batch = self.encoder(name), torch.rand(size, 3, 224, 224, device=self.device)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(n // size):
                with torch.autocast(self.device, dtype, enabled=self.gpu):
                    model(batch).float().cpu()

        turns = []
        for turn in range(self.repeats):
            output = ["--output_dir", self.root / f"encoding-{turn}"]
            first, again = [self.timed(partial(self.run, run_downstream, *flags, *output)) for _ in range(2)]
            turns.append((self.timed(bare), max(first - again, 1e-9)))
        note = f"{name}, {dtype}, batch {size}, {n} images"
        ours = self.add_turns("downstream encoding: of bare rate", np.array(turns), note)
        self.add("downstream encoding", "images/s", n / ours, note)

    def heads(self) -> None:
        """3 fractions x 3 seeds of linear heads on a frozen encoder, against the published loop for each: in every
        epoch read and encode the training images, then the validation images. One seed of each fraction is timed."""
        name = "vit_tiny_patch16_224"
        n, epochs, size = (40, 1, 4) if self.quick else (240, 5, 16)
        folder, flags = self.labelled("heads", n, name)
        files = sorted(folder.rglob("*.jpg"))
        model = self.encoder(name)

        @torch.inference_mode()
        def encode(paths: list[Path]) -> Tensor:
            images = [TF.to_tensor(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
            return model(torch.stack(images).to(self.device))

        def plain() -> None:
            for fraction in FRACTIONS:
                head = torch.nn.Linear(model.num_features, 1).to(self.device)
                optimizer = torch.optim.Adam(head.parameters())
                train, valid = files[: round(0.7 * fraction * n)], files[round(0.85 * n) :]
                for _ in range(epochs):
                    for start in range(0, len(train), size):
                        optimizer.zero_grad()
                        scores = head(encode(train[start : start + size]).clone())
                        F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)).backward()
                        optimizer.step()
                    for start in range(0, len(valid), size):
                        head(encode(valid[start : start + size]).clone())

        flags += ["--method", "linear", "--fractions", *FRACTIONS, "--seeds", *SEEDS, "--epochs", epochs]
        flags += ["--patience", epochs, "--batch_size", size, "--bootstrap", 200, "--num_workers", 0]
        ours = self.timed(lambda: self.run(run_downstream, *flags, "--output_dir", self.root / "judged"))
        baseline = len(SEEDS) * self.timed(plain)
        note = f"{name}, {n} images, {epochs} epochs; baseline: one seed timed, times {len(SEEDS)}"
        title = f"linear evaluation, {len(FRACTIONS)} fractions x {len(SEEDS)} seeds"
        self.add(title, "s", ours, note, baseline, baseline / ours)

    def prediction(self) -> None:
        """Bare forward passes of the gaze predictor, and from the files of a tree to the files of a tree."""
        batches, size = 6, 2 if self.quick else 32 if self.gpu else 8
        n, films, tree = batches * size, self.root / "films", self.root / "images"
        height, width = (640, 560) if self.quick else (624, 512)  # as prepare_mimic.py scales a film
        how = ("--n_images", n, "--shared_images", 0, "--height", height, "--width", width)
        self.run(make_phantom, "--out", films, *how)
        words = ("--images", films / "mimic", "--out", tree, "--views", "all", "--workers", available_cpus())
        self.run(prepare_mimic, *words)
        torch.manual_seed(0)
        model = GazeNet("test_resnet", input_size=64) if self.quick else GazeNet()
        about = {"config": model.config, "seen": [], "encoder_seen": [], "format": FORMAT}
        save_checkpoint(dict.fromkeys(KEYS) | {"model": model.state_dict()} | about, self.root / "best.pth")
        model.eval().to(self.device)
        batch = torch.randint(0, 256, (size, 1, *[model.input_size] * 2), dtype=torch.uint8)

        @torch.inference_mode()
        def forward() -> None:
            for _ in range(batches):
                model(batch.to(self.device)).exp().cpu()

        words = ("--weights", self.root / "best.pth", "--tree", tree, "--device", self.device, "--overwrite")
        fill = partial(self.run, predict_gaze, *words, "--batch_size", size, "--workers", available_cpus())
        note = f"{model.config['backbone']} at {model.input_size} px, {n} images of {width} x {height} px"
        self.compare("gaze prediction of a tree", forward, fill, note)


if __name__ == "__main__":
    run_cli(main)
