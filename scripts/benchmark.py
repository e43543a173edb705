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
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from itertools import count, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import models_cxrmim
import run_downstream
import run_pretrain
from datasets.build import build_dataset
from gaze.model import GazeNet
from scripts import make_phantom, predict_gaze, prepare_mimic, prepare_reflacx
from util.checkpoint import FORMAT, save_checkpoint
from util.cli import Parser, available_cpus, check_device
from util.errors import run_cli
from util.export import check_file_place
from util.files import atomic_write
from util.hog import GRADIENT_TOLERANCE, HOGPyramid
from util.lr_sched import parameter_groups
from util.masking import masked_count
from util.output import versions
from util.precision import set_tf32

REFLACX_IMAGES, PUBLISHED_EPOCHS = 2616, 400
CELL_SIZES, NBINS = (4, 8, 16, 32), 9


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    check_device(args.device)
    if args.json:
        check_file_place(args.json, "--json")
    set_tf32(False)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        bench = Benchmark(args, Path(root))
        for name, part in bench.parts().items():
            try:
                part()
            except Exception:  # costs its own rows alone
                traceback.print_exc()
                bench.failures.append(name)
    bench.write()
    if bench.failures:
        print(f"error: {len(bench.failures)} parts failed: {'; '.join(bench.failures)}", file=sys.stderr)
    return 1 if bench.failures else 0


def published_sample(files) -> Tensor:
    """Baseline: decode three native files in full, to float tensors, crop and resize those: [5, 224, 224]."""
    image = TF.to_tensor(Image.open(files.image).convert("RGB"))
    maps = [TF.to_tensor(Image.open(file).convert("L")) for file in (files.attention, files.foreground)]
    planes = torch.cat([image, *maps])  # [5, H, W]
    box = RandomResizedCrop.get_params(planes, (0.2, 1.0), (3 / 4, 4 / 3))
    planes = TF.resized_crop(planes, *box, [224, 224], InterpolationMode.BICUBIC, antialias=True)
    image = TF.normalize(planes[:3], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return torch.cat([image, planes[3:].clamp(0, 1)])


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


class Benchmark:
    """What is measured, with its inputs in `root`, and the rows so far."""

    def __init__(self, args: argparse.Namespace, root: Path):
        self.args, self.root, self.quick, self.device = args, root, args.quick, args.device
        self.gpu = self.device == "cuda"
        self.batch_size = args.batch_size or self.of(2, 8, 128)
        self.repeats = self.of(2, 5, 10)
        self.input_size = self.of(64, 224, 224)
        self.model = f"cxrmim_vit_{self.of('tiny', 'base', 'base')}_patch16"
        self.rows: list[dict] = []
        self.failures: list[str] = []

    def of(self, quick, cpu, gpu):
        """A size for this run."""
        return quick if self.quick else gpu if self.gpu else cpu

    def parts(self) -> dict[str, Callable[[], None]]:
        """All measurements by name, the most important first."""
        # Those of a GPU also in a quick run: they must work the first time.
        formats = ("bfloat16", "float16", "TF32", "float32")
        formats = self.of(formats, formats[::3], formats)
        workers = self.of([1], [2], [4, 16])
        compiled = self.of(formats[:1], (), formats)  # a minute or more each
        return {
            "samples": self.samples,
            "HOG targets": self.hog,
            **{f"step: {name}": partial(self.step, name) for name in formats},
            **{f"training, {n} workers": partial(self.training, n) for n in workers},
            "encoding": self.encoding,
            "gaze prediction": self.prediction,
            "linear evaluation": self.heads,
            **{f"step: {name}, compiled": partial(self.step, name, compiled=True) for name in compiled},
        }

    def timed(self, function: Callable[[], object]) -> float:
        began = time.perf_counter()
        function()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def in_turns(self, *functions: Callable[[], object]) -> np.ndarray:
        """Seconds of baseline and ours, called in turns after one call each to warm up: [turns, 2]."""
        return np.array([[self.timed(function) for function in functions] for _ in range(self.repeats + 1)][1:])

    def add(self, name: str, note: str, turns: np.ndarray, unit: str = "s") -> None:
        """Add a row of `turns`: baseline and ours [n, 2], or ours alone [n, 1]."""
        *baseline, ours = np.median(turns, 0).tolist()
        low, ratio, high = np.percentile(turns[:, 0] / turns[:, -1], (25, 50, 75)).tolist() if baseline else [None] * 3
        row = {"name": name, "unit": unit, "baseline": baseline[0] if baseline else None, "ours": ours, "ratio": ratio}
        self.rows.append(row | {"ratio_quartiles": (low, high), "repeats": len(turns), "note": note})
        times = f"; baseline {baseline[0]:.4g}, {ratio:.3g} times as much ({low:.3g} to {high:.3g})" if baseline else ""
        print(f"{name}: {ours:.4g} {unit}{times}; {note}", flush=True)
        self.write()

    def write(self) -> None:
        if self.args.json is None:
            return
        machine = {"platform": platform.platform(), "cores": available_cpus(), "threads": torch.get_num_threads()}
        machine |= {"gpu": torch.cuda.get_device_name() if self.gpu else None, **versions()}
        settings = vars(self.args) | {"batch_size": self.batch_size, "repeats": self.repeats}
        with atomic_write(self.args.json, "w") as file:
            report = {"machine": machine, "settings": settings, "rows": self.rows, "failures": self.failures}
            json.dump(report, file, indent=2)

    def run(self, program, text: str) -> None:
        """Call one of our programs, which speaks on stderr, with the words of a text."""
        with contextlib.redirect_stdout(sys.stderr):
            status = program.main([word.format(root=self.root) for word in text.split()])
        if status:  # a signal ended it: of this program, too
            raise SystemExit(status)

    @cached_property
    def tree(self) -> Path:
        """A processed tree in native resolution with JPG images, as the published program reads it."""
        size = self.of("2 --width 560 --height 640", *["8 --width 2544 --height 3056"] * 2)
        self.run(make_phantom, f"--out {{root}}/raw --shared_images 0 --n_images {size}")
        source = "--raw {root}/raw/reflacx --images {root}/raw/mimic --out {root}/tree --size 0"
        self.run(prepare_reflacx, f"{source} --workers {available_cpus()}")
        tree = self.root / "tree"
        for image in tree.glob("images/**/*.png"):  # MIMIC-CXR-JPG's own file in place of the lossless copy
            next(self.root.glob(f"raw/mimic/**/{image.stem}.jpg")).rename(image.with_suffix(".jpg"))
            image.unlink()
        index = tree / "reflacx.json"
        index.write_text(index.read_text().replace(".png", ".jpg"))
        return tree

    def samples(self) -> None:
        """One sample in one thread, as a loader's worker has: from native files and from the cache."""
        native, cached = (build_dataset(self.tree, preload=True, use_cache=use) for use in (False, True))
        turn, threads, many, note = count(), torch.get_num_threads(), 50, "one thread, stored foreground"

        def published() -> Tensor:
            return published_sample(native.files(next(turn) % len(native)))

        def several(dataset, n: int) -> None:
            for _ in range(n):
                dataset[0, next(turn) % len(native)]

        torch.set_num_threads(1)
        self.add("sample from native files", note, self.in_turns(published, partial(several, native, 1)))
        # A cached sample takes less than the clock's noise.
        turns = self.in_turns(published, partial(several, cached, many)) / [1, many]
        self.add("sample from the cache", note, turns)
        torch.set_num_threads(threads)

    def ready_batch(self, size: int) -> dict[str, Tensor]:
        """A batch as the loader hands it on."""
        dataset = build_dataset(self.tree, preload=True, input_size=size)
        keys = [(0, i % len(dataset)) for i in range(self.batch_size)]
        return next(iter(DataLoader(dataset, self.batch_size, sampler=keys, pin_memory=self.gpu)))

    @torch.no_grad()
    def hog(self) -> None:
        """All targets of a batch of gray pictures: 12 direct passes against one."""
        model = models_cxrmim.cxrmim_vit_tiny_patch16().to(self.device)
        batch, pyramid = model.prepare_batch(self.ready_batch(224)), HOGPyramid(NBINS, CELL_SIZES)
        plain, ours = (lambda: direct_hog(batch["img"])), (lambda: pyramid(batch["gray"]))
        difference = max((a - b).abs().max().item() for a, b in zip(plain(), ours(), strict=True))
        note = f"{self.batch_size} images of 224 px; largest difference {difference:.1g}"
        self.add("HOG targets of a batch", note, self.in_turns(plain, ours))

    def training_step(self, dtype: torch.dtype, plain: bool = False, compiled: bool = False) -> Callable[[], None]:
        """A step; `plain`: the same model with direct HOG of three channels and AdamW tensor by tensor."""
        batch = self.ready_batch(self.input_size)
        torch.manual_seed(0)
        smaller = self.of({"depth": 2, "id_list": (0, 0, 1, 1)}, {}, {})
        model = models_cxrmim.ENCODERS[self.model](img_size=self.input_size, gaze_weighted=True, **smaller)
        model.to(self.device).train()
        how = {"foreach": False} if plain else {"fused": True}
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), **how)
        if plain:
            model.hog.forward = direct_hog
        if compiled:  # a quick run is to show that it runs, not to wait for a compiler
            model.compile(backend=self.of("eager", "inductor", "inductor"))

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

    def step(self, name: str, compiled: bool = False) -> None:
        """`name`: float32, TF32, float16 or bfloat16; the baseline is in float32, or float16 on a GPU, as published."""
        plain = torch.float16 if self.gpu else torch.float32
        dtype = torch.float32 if name == "TF32" else getattr(torch, name)
        baseline, ours = self.training_step(plain, plain=True), self.training_step(dtype, compiled=compiled)
        set_tf32(name == "TF32")
        first = self.timed(ours)
        turns = self.in_turns(baseline, ours)
        set_tf32(False)
        torch.compiler.reset()
        rate = self.batch_size / np.median(turns[:, 1])
        hours = REFLACX_IMAGES * PUBLISHED_EPOCHS / rate / 3600
        note = f"baseline: {plain}; first step {first:.3g} s; {rate:.4g} images/s, so {hours:.3g} h for the published "
        note += f"400 epochs; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB of GPU memory at most so far"
        self.add(f"step: {name}" + ", compiled" * compiled, note, turns)

    def training(self, workers: int) -> None:
        """Images per second of a run of run_pretrain.py, by its log."""
        output = self.root / f"output-{workers}"
        trees = [f"{output}-tree{i}" for i in range(64 if self.gpu else 2)]  # a tree may be named once only
        for copy in trees:
            shutil.copytree(self.tree, copy, copy_function=os.link)
        n_images = len(trees) * len(build_dataset(self.tree, preload=True))
        text = f"--data_path {' '.join(trees)} --preload --gaze_weighted --model {self.model} --pretrained none"
        text += f" --device {self.device} --batch_size {self.batch_size} --num_workers {workers} --output_dir {output}"
        self.run(run_pretrain, f"{text} --warmup_epochs 1 --epochs {self.of(2, 8, 8)}")
        records = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
        # A device warms up in the first epoch.
        per_image = np.mean([record["time_s"] for record in records[1:]]) / n_images
        note = f"{1 / per_image:.4g} images/s at batch {self.batch_size}"
        self.add(f"real training, {workers} workers, per image", note, np.array([[per_image]]))

    def labelled(self, name: str, n: int, model: str) -> str:
        """Make labelled images; the flags to judge an encoder with random weights on them."""
        made = "--layout rsna --format jpg --height 192 --width 160 --normal_fraction 0.5 --lesion_kinds consolidation"
        self.run(make_phantom, f"--out {{root}}/{name} --n_images {n} {made}")
        return f"--dataset rsna --data_path {{root}}/{name}/rsna --weights random@{model} --device {self.device}"

    def encoding(self) -> None:
        """From image files to features on disk, against forward passes of a batch that lies ready.

        Ours is a call of run_downstream.py less a second one that finds all features there.
        """
        name = f"vit_{self.of('tiny', 'small', 'base')}_patch16_224"
        n, size = self.of((24, 8), (128, 32), (2048, 256))
        flags = f"{self.labelled('encoded', n, name)} --method probe --encode_batch {size} --bootstrap 200"
        flags += f" --num_workers {self.of(0, 0, 8)}"
        batch = torch.rand(size, 3, 224, 224, device=self.device)
        model = timm.create_model(name, num_classes=0).eval().to(self.device)

        @torch.inference_mode()
        def bare() -> None:
            for _ in range(n // size):
                with torch.autocast(self.device, torch.bfloat16, enabled=self.gpu):  # as run_downstream.py has it
                    model(batch).float().cpu()

        turns = []
        for turn in range(self.repeats):
            judge = partial(self.run, run_downstream, f"{flags} --output_dir {{root}}/encoding-{turn}")
            first, again = self.timed(judge), self.timed(judge)
            turns.append((self.timed(bare), max(first - again, 1e-9)))
        note = f"{name}, batch {size}, {n} images"
        self.add("downstream encoding: of bare rate", note, np.array(turns))
        self.add("downstream encoding", note, np.array([[n / self.rows[-1]["ours"]]]), "images/s")

    def heads(self) -> None:
        """3 fractions x 3 seeds of linear heads on a frozen encoder, against the published loop for each: in every
        epoch read and encode the training images, then the validation images. One seed of each fraction is timed."""
        name = "vit_tiny_patch16_224"
        n, epochs, size = self.of((24, 1, 4), (240, 5, 16), (240, 5, 16))
        flags, model = self.labelled("heads", n, name), timm.create_model(name, num_classes=0).eval().to(self.device)
        files = sorted(self.root.glob("heads/rsna/**/*.jpg"))

        @torch.inference_mode()
        def encode(paths: list[Path]) -> Tensor:
            images = [TF.to_tensor(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
            return model(torch.stack(images).to(self.device))

        def plain() -> None:
            for fraction in (0.3, 0.6, 1.0):
                head = torch.nn.Linear(model.num_features, 1).to(self.device)
                optimizer = torch.optim.Adam(head.parameters())
                parts = (files[: round(0.7 * fraction * n)], True), (files[round(0.85 * n) :], False)
                for _, (paths, learns) in product(range(epochs), parts):
                    for start in range(0, len(paths), size):
                        scores = head(encode(paths[start : start + size]).clone())
                        if learns:
                            optimizer.zero_grad()
                            F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores)).backward()
                            optimizer.step()

        flags += f" --method linear --fractions 0.3 0.6 1.0 --seeds 43 44 45 --epochs {epochs} --patience {epochs}"
        flags += f" --batch_size {size} --bootstrap 200 --num_workers 0 --output_dir {{root}}/judged"
        ours = self.timed(partial(self.run, run_downstream, flags))
        note = f"{name}, {n} images, {epochs} epochs; baseline: one seed timed, times 3"
        self.add("linear evaluation, 3 fractions x 3 seeds", note, np.array([[3 * self.timed(plain), ours]]))

    def prediction(self) -> None:
        """Bare forward passes of the gaze predictor, and from the files of a tree to the files of a tree."""
        batches, size = 6, self.of(2, 8, 32)
        n = batches * size  # films as prepare_mimic.py scales them
        self.run(make_phantom, f"--out {{root}}/films --n_images {n} --shared_images 0 --height 624 --width 512")
        cpus = available_cpus()
        self.run(prepare_mimic, f"--images {{root}}/films/mimic --out {{root}}/images --views all --workers {cpus}")
        torch.manual_seed(0)
        model = GazeNet("test_resnet", input_size=64) if self.quick else GazeNet()
        about = {"config": model.config, "seen": [], "encoder_seen": [], "format": FORMAT}
        save_checkpoint({"model": model.state_dict()} | about, self.root / "best.pth")
        model.eval().to(self.device)
        batch = torch.randint(0, 256, (size, 1, *[model.input_size] * 2), dtype=torch.uint8)

        @torch.inference_mode()
        def forward() -> None:
            for _ in range(batches):
                model(batch.to(self.device)).exp().cpu()

        flags = f"--weights {{root}}/best.pth --tree {{root}}/images --device {self.device} --overwrite"
        fill = partial(self.run, predict_gaze, f"{flags} --batch_size {size} --workers {cpus}")
        note = f"{model.config['backbone']} at {model.input_size} px, {n} images of 512 x 624 px"
        self.add("gaze prediction of a tree", note, self.in_turns(forward, fill))


if __name__ == "__main__":
    run_cli(main)
