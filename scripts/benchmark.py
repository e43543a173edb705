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
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
import timm
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import run_downstream
import run_pretrain
from datasets.build import build_dataset
from datasets.phantom.gaze_study import make_study
from datasets.phantom.labelled import make_rsna
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.readings import prepare
from gaze.fill import fill_tree
from gaze.model import GazeNet
from models_cxrmim import CXRMIM, ENCODERS
from scripts.predict_gaze import as_predictor
from util.cli import Parser, available_cpus, check_device
from util.errors import run_cli
from util.export import check_file_place
from util.files import atomic_write
from util.hog import sobel
from util.lr_sched import parameter_groups
from util.output import versions
from util.precision import set_tf32

CELL_SIZES, NBINS = (4, 8, 16, 32), 9
FORMATS = ("bfloat16", "float16", "TF32", "float32")
SIZES = {  # compiling takes a minute or more for each format
    "cpu": {"batch_size": 8, "repeats": 5, "formats": FORMATS[::3], "compiled": (), "workers": (2,)},
    "cuda": {"batch_size": 128, "repeats": 10, "formats": FORMATS, "compiled": FORMATS, "workers": (4, 16)},
}
NATIVE_IMAGES, NATIVE_SIZE, INPUT_SIZE = 8, (3056, 2544), 224
MODEL, ENCODER, PREDICTOR = "cxrmim_vit_base_patch16", "vit_base_patch16_224", {}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
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
        for part, *how in bench.parts():
            try:
                part(*how)
            except Exception:  # costs its own rows alone
                traceback.print_exc()
                bench.failures.append(" ".join([part.__name__, *map(str, how)]))
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

    def one_pass(x: Tensor, cell: int) -> Tensor:
        gx, gy = sobel(x)  # [B, H, W]
        bins = (torch.atan2(gy, gx) / torch.pi * NBINS).floor().long() % NBINS
        one_hot = x.new_zeros(len(x), NBINS, *x.shape[1:]).scatter_(1, bins[:, None], torch.hypot(gx, gy)[:, None])
        return F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12).flatten(2)

    channels = img.float().unbind(1)
    return [torch.cat([one_pass(x, cell) for x in channels], 1).transpose(1, 2) for cell in CELL_SIZES]


class Benchmark:
    """What is measured, with its inputs in `root`, and the rows so far."""

    def __init__(self, args: argparse.Namespace, root: Path):
        self.args, self.root, self.device, self.gpu = args, root, args.device, args.device == "cuda"
        self.sizes = SimpleNamespace(**SIZES[args.device])
        self.rows: list[dict] = []
        self.failures: list[str] = []

    def parts(self) -> list[tuple]:
        """All measurements with their arguments, the most important first."""
        return [
            (self.sample, "native files", False, 1),
            (self.sample, "the cache", True, 50),  # a single one takes less than the clock's noise
            (self.hog,),
            *((self.step, name) for name in self.sizes.formats),
            *((self.training, workers) for workers in self.sizes.workers),
            (self.prediction,),
            (self.downstream,),
            *((self.step, name, "compiled") for name in self.sizes.compiled),
        ]

    def timed(self, function: Callable[[], object]) -> float:
        began = time.perf_counter()
        function()
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def in_turns(self, *functions: Callable[[], object]) -> np.ndarray:
        """Seconds of each function, called in turns after one call each to warm up: [functions, turns]."""
        return np.array([[self.timed(function) for function in functions] for _ in range(self.sizes.repeats + 1)][1:]).T

    def add(self, name: str, note: str, ours, plain=None, images: int = 1) -> None:
        """Add a row of seconds for so many images, ours and the baseline's: numbers, or an array by turn."""
        row = {"name": name, "ours": np.median(ours), "repeats": np.size(ours), "note": note}
        row["images_per_s"] = images / row["ours"]
        text = f"{name}: {row['ours']:.4g} s, {row['images_per_s']:.4g} images/s"
        if plain is not None:
            low, ratio, high = np.percentile(plain / ours, (25, 50, 75))
            row |= {"baseline": np.median(plain), "ratio": ratio, "ratio_quartiles": (low, high)}
            text += f"; baseline {row['baseline']:.4g} s, {ratio:.3g} times as much ({low:.3g} to {high:.3g})"
        self.rows.append(row)
        print(f"{text}; {note}", flush=True)
        self.write()

    def write(self) -> None:
        if self.args.json is None:
            return
        machine = versions() | {"cores": available_cpus(), "gpu": self.gpu and torch.cuda.get_device_name()}
        report = {"machine": machine, "settings": vars(self.sizes), "rows": self.rows, "failures": self.failures}
        with atomic_write(self.args.json, "w") as file:
            json.dump(report, file, indent=2)

    def run(self, program, text: str) -> None:
        """Call one of our programs, which speaks on stderr, with the words of a text."""
        with contextlib.redirect_stdout(sys.stderr):
            status = program.main(text.split())
        if status:  # a signal ended it: of this program, too
            raise SystemExit(status)

    @cached_property
    def tree(self) -> Path:
        """A processed tree in native resolution with JPG images, as the published program reads it."""
        study, tree = (
            make_study(self.root / "raw", NATIVE_IMAGES, size=NATIVE_SIZE, shared_images=0),
            self.root / "tree",
        )
        prepare(study.raw, study.images, tree, size=0, workers=available_cpus())
        for image in tree.glob("images/**/*.png"):  # MIMIC-CXR-JPG's own file in place of the lossless copy
            next(study.images.glob(f"**/{image.stem}.jpg")).rename(image.with_suffix(".jpg"))
            image.unlink()
        index = tree / "reflacx.json"
        index.write_text(index.read_text().replace(".png", ".jpg"))
        return tree

    def sample(self, source: str, use_cache: bool, times: int) -> None:
        """A sample in one thread, as a loader's worker has."""
        dataset, threads = build_dataset(self.tree, preload=True, use_cache=use_cache), torch.get_num_threads()
        turn = cycle(range(len(dataset)))
        torch.set_num_threads(1)
        ours, plain = self.in_turns(
            lambda: [dataset[0, next(turn)] for _ in range(times)], lambda: published_sample(dataset.files(next(turn)))
        )
        torch.set_num_threads(threads)
        self.add(f"sample from {source}", "one thread, stored foreground", ours / times, plain)

    def ready_batch(self) -> dict[str, Tensor]:
        """A batch as the loader hands it on."""
        dataset = build_dataset(self.tree, preload=True, input_size=INPUT_SIZE)
        keys = [(0, i % len(dataset)) for i in range(self.sizes.batch_size)]
        return next(iter(DataLoader(dataset, len(keys), sampler=keys, pin_memory=self.gpu)))

    def training_model(self) -> CXRMIM:
        torch.manual_seed(0)
        model = ENCODERS[MODEL](img_size=INPUT_SIZE, gaze_weighted=True)
        return model.to(self.device).train()

    @torch.no_grad()
    def hog(self) -> None:
        """All targets of a batch of gray pictures: 12 direct passes against one."""
        model = self.training_model()
        batch, note = model.prepare_batch(self.ready_batch()), f"{self.sizes.batch_size} images of {INPUT_SIZE} px"
        ours, plain = self.in_turns(lambda: model.hog(batch["gray"]), lambda: direct_hog(batch["img"]))
        self.add("HOG targets of a batch", note, ours, plain, self.sizes.batch_size)

    def training_step(self, dtype: torch.dtype, compiled: bool = False, plain: bool = False) -> Callable[[], None]:
        """A step; `plain`: the same with direct HOG of three channels."""
        batch, model = self.ready_batch(), self.training_model()
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), fused=True)
        if plain:
            model.hog.forward = direct_hog
        if compiled:
            model.compile()

        def step() -> None:
            ready = model.prepare_batch(batch)
            if plain:
                ready.pop("gray")  # three channels, three times the work
            with torch.autocast(self.device, dtype, enabled=dtype != torch.float32):
                loss = model(ready, mask=model.draw_mask(ready, 0.75, 0.5), n_visible=model.num_patches // 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def step(self, name: str, compiled: str = "") -> None:
        """`name`: float32, TF32, float16 or bfloat16; the baseline is in float32, or float16 on a GPU, as published."""
        dtype, published = getattr(torch, name.replace("TF32", "float32")), torch.float16 if self.gpu else torch.float32
        ours, baseline = self.training_step(dtype, bool(compiled)), self.training_step(published, plain=True)
        set_tf32(name == "TF32")
        note = f"baseline: {published}; first step {self.timed(ours):.3g} s"
        turns = self.in_turns(ours, baseline)
        set_tf32(False)
        torch.compiler.reset()
        self.add(f"step: {name}" + f", {compiled}" * bool(compiled), note, *turns, self.sizes.batch_size)

    def training(self, workers: int) -> None:
        """Seconds per image of a run of run_pretrain.py, by its log."""
        output = self.root / f"output-{workers}"
        trees = [f"{output}-tree{i}" for i in range(self.sizes.batch_size // 4)]  # a tree may be named once only
        for copy in trees:
            shutil.copytree(self.tree, copy, copy_function=os.link)
        text = f"--data_path {' '.join(trees)} --preload --gaze_weighted --model {MODEL} --pretrained none"
        text += f" --device {self.device} --batch_size {self.sizes.batch_size} --num_workers {workers} --epochs 8"
        self.run(run_pretrain, f"{text} --input_size {INPUT_SIZE} --output_dir {output} --warmup_epochs 1")
        seconds = pd.read_json(output / "log.txt", lines=True)["time_s"].to_numpy()[
            1:
        ]  # a device warms up in the first
        per_image = seconds / len(trees) / NATIVE_IMAGES
        self.add(f"real training, {workers} workers, per image", f"batch {self.sizes.batch_size}", per_image)

    def prediction(self) -> None:
        """From the files of a tree to the files of a tree, against bare forward passes of the gaze predictor."""
        size, cpus, tree, batches = self.sizes.batch_size, available_cpus(), self.root / "images", 2
        study = make_study(self.root / "films", batches * size, size=(624, 512), shared_images=0)
        prepare_mimic(study.images, None, tree, views=["all"], workers=cpus)
        model = GazeNet(**PREDICTOR).eval().to(self.device)
        predictor = as_predictor(model)
        batch = torch.randint(0, 256, (size, 1, *[model.input_size] * 2), dtype=torch.uint8)
        turns = self.in_turns(
            lambda: fill_tree(tree, predictor, overwrite=True, batch_size=size, workers=cpus),
            lambda: [predictor.maps(batch) for _ in range(batches)],
        )
        note = f"{model.config['backbone']} at {model.input_size} px, images of 512 x 624 px"
        self.add("gaze prediction of a tree", note, *turns, batches * size)

    def downstream(self) -> None:
        """From image files to features on disk, against forward passes of a batch that lies ready; and 3 fractions x 3
        seeds of linear heads on them, against the published loop for each head, which in every epoch reads and encodes
        the training images, then the validation images."""
        size, images, probed = self.sizes.batch_size, 16 * self.sizes.batch_size, self.root / "probed"
        make_rsna(self.root, images, size=(192, 160), image_format="jpg", lesion_kinds=["consolidation"])
        flags = f"--dataset rsna --data_path {self.root}/rsna --weights random@{ENCODER} --device {self.device}"
        flags += f" --bootstrap 200 --encode_batch {size} --num_workers {8 * self.gpu}"
        probe = partial(self.run, run_downstream, f"{flags} --method probe --output_dir {probed}")
        model = timm.create_model(ENCODER, num_classes=0).eval().to(self.device)
        batch = torch.rand(size, *model.default_cfg["input_size"], device=self.device)

        def probe_anew() -> None:
            shutil.rmtree(probed, ignore_errors=True)
            probe()

        def bare() -> None:
            # As run_downstream.py has it.
            with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=self.gpu):
                for _ in range(images // size):
                    model(batch).float().cpu()

        first, again, plain = self.in_turns(probe_anew, probe, bare)
        encoding = np.maximum(first - again, 1e-9)  # the second finds all features there
        self.add("downstream encoding", ENCODER, encoding, plain, images)

        flags += " --method linear --fractions 0.3 0.6 1 --seeds 43 44 45 --epochs 5 --patience 5 --batch_size 4"
        flags += f" --output_dir {self.root}/heads"
        ours = self.timed(partial(self.run, run_downstream, flags))
        # 5 epochs of 3 heads for each fraction; 70% of the images are for training, 15% for validation.
        passes = 5 * 3 * (0.7 * (0.3 + 0.6 + 1) + 3 * 0.15)
        note = f"{images} images, 5 epochs; baseline: {passes:.3g} times our encoding of all images"
        self.add("linear evaluation, 3 fractions x 3 seeds", note, ours, passes * np.median(encoding))


if __name__ == "__main__":
    run_cli(main)
