#!/usr/bin/env python3
"""Measure this program against plain code for the same work, in one run on one machine.

A row compares two functions called in turns: the *baseline*, the published program's way or the nearest plain one, and
ours. The ratio is the median over the turns, its spread their quartiles. Inputs are phantoms of 2544 x 3056 px, made
in a folder in TMPDIR, which is removed at the end.

    python scripts/benchmark.py                 # CPU or GPU, whichever is there
    python scripts/benchmark.py --json out.json # rewritten after every row, so that an interrupted run keeps its rows

If a part fails, its traceback is printed, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode, RandomResizedCrop

import run_downstream
import run_pretrain
from datasets.build import build_dataset
from datasets.phantom.gaze_study import make_study
from datasets.phantom.label_study import make_rsna
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
NATIVE_IMAGES, NATIVE_SIZE, INPUT_SIZE = 8, (3056, 2544), 224
MODEL, PREDICTOR = "cxrmim_vit_base_patch16", {}
SIZES = {  # `labelled` images, and the `encoder` that is judged on them
    "cpu": {"batch_size": 8, "workers": (2,), "labelled": 40, "encoder": "vit_tiny_patch16_224"},
    "cuda": {"batch_size": 128, "workers": (4, 16), "labelled": 1024, "encoder": "vit_base_patch16_224"},
}
REPEATS = 5
# Compiling takes a minute or more for each format.
STEPS = {"cpu": FORMATS[::3], "cuda": (*FORMATS, *(f"{name}, compiled" for name in FORMATS))}


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
    s = SimpleNamespace(device=args.device, gpu=args.device == "cuda", **SIZES[args.device])
    machine = versions() | {"cores": available_cpus(), "gpu": s.gpu and torch.cuda.get_device_name()}
    rows, status = [], 0
    parts = [(sample, "native files"), (sample, "the cache"), (hog,), *((training, n) for n in s.workers)]
    parts += [(prediction,), (encoding,), (heads,), *((step, name) for name in STEPS[s.device])]
    # `s` goes to every part: sizes, device, a folder, and what earlier parts have made.
    with tempfile.TemporaryDirectory(prefix="benchmark-") as root:
        s.root = Path(root)
        make_tree(s)
        for part, *how in parts:
            try:
                rows.append(measured(*part(s, *how)))
            except Exception:  # only this row is lost
                traceback.print_exc()
                status = 1
            if args.json:
                with atomic_write(args.json, "w") as file:
                    json.dump({"machine": machine, "settings": SIZES[args.device], "rows": rows}, file, indent=2)
    return status


def measured(name: str, note: str, ours, plain=None, images: int = 1) -> dict:
    """A row of the report. `ours` and `plain`: seconds for `images` images, a number or an array by turn."""
    values = {"ours": np.median(ours), "images_per_s": images / np.median(ours)}
    if plain is not None:
        low, ratio, high = np.percentile(plain / ours, (25, 50, 75))
        values |= {"baseline": np.median(plain), "ratio": ratio, "ratio_low": low, "ratio_high": high}
    print(f"{name}: {', '.join(f'{key} {value:.4g}' for key, value in values.items())}; {note}", flush=True)
    return {"name": name, "note": note, "repeats": np.size(ours), **values}


def timed(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(*functions: Callable[[], object]) -> np.ndarray:
    """Seconds of each function, called in turns after one call each to warm up: [functions, turns]."""
    return np.array([[timed(function) for function in functions] for _ in range(REPEATS + 1)][1:]).T


def run(program, text: str) -> None:
    """Call one of our programs with the words of `text` as its arguments; its output goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        status = program.main(text.split())
    if status:  # a signal stopped it; stop here, too
        raise SystemExit(status)


# ---------------------------------------------------------------- pretraining


def make_tree(s) -> None:
    """Make a processed tree in native resolution with JPG images, as the published program reads it. Its index
    lists each image several times, enough for two batches."""
    s.tree = s.root / "tree"
    study = make_study(s.root / "raw", NATIVE_IMAGES, size=NATIVE_SIZE, shared_images=0)
    prepare(study.raw, study.images, s.tree, size=0)
    for image in study.truth:  # MIMIC-CXR-JPG's own file in place of the lossless copy
        image.path.rename(s.tree / "images" / image.study_id / image.path.name)
    index = s.tree / "reflacx.json"
    entries = json.loads(index.read_text().replace(".png", ".jpg"))
    index.write_text(json.dumps(entries * (2 * s.batch_size // NATIVE_IMAGES)))


def published_sample(files) -> Tensor:
    """Baseline: decode native files in full, to float tensors, crop and resize those: [5, 224, 224] of an entry's three
    files, [3, 224, 224] of an image alone."""
    planes = [TF.to_tensor(Image.open(file).convert(mode)) for file, mode in zip(files, ("RGB", "L", "L"))]
    return RandomResizedCrop(224, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)(torch.cat(planes))


def sample(s, source: str) -> tuple:
    """Seconds per sample in one thread, as in a worker of the loader: five samples of each image against one."""
    dataset = build_dataset(s.tree, preload=True, use_cache=source == "the cache")
    images, threads = range(NATIVE_IMAGES), torch.get_num_threads()
    torch.set_num_threads(1)
    ours, plain = in_turns(
        lambda: [dataset[epoch, i] for epoch in range(5) for i in images],
        lambda: [published_sample(dataset.files(i)) for i in images],
    )
    torch.set_num_threads(threads)
    return f"sample from {source}", "one thread, stored foreground", ours / 5 / NATIVE_IMAGES, plain / NATIVE_IMAGES


def direct_hog(img: Tensor) -> list[Tensor]:
    """Baseline: one pass for each channel and cell size. [B, 3, H, W] -> list of [B, cells, 3*NBINS]."""

    def one_pass(x: Tensor, cell: int) -> Tensor:
        gx, gy = sobel(x)  # [B, H, W]
        bins = (torch.atan2(gy, gx) / torch.pi * NBINS).floor().long() % NBINS
        one_hot = x.new_zeros(len(x), NBINS, *x.shape[1:]).scatter_(1, bins[:, None], torch.hypot(gx, gy)[:, None])
        return F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12).flatten(2)

    channels = img.float().unbind(1)
    return [torch.cat([one_pass(x, cell) for x in channels], 1).transpose(1, 2) for cell in CELL_SIZES]


def model_and_batch(s) -> tuple[CXRMIM, dict[str, Tensor]]:
    """A model to train, and a batch from the loader."""
    model = ENCODERS[MODEL](img_size=INPUT_SIZE, gaze_weighted=True).to(s.device)
    dataset = build_dataset(s.tree, preload=True, input_size=INPUT_SIZE)
    loader = DataLoader(dataset, s.batch_size, sampler=[(0, i) for i in range(s.batch_size)], pin_memory=s.gpu)
    return model, next(iter(loader))


@torch.no_grad()
def hog(s) -> tuple:
    """All targets of a batch of gray pictures: 12 direct passes against one."""
    model, batch = model_and_batch(s)
    batch = model.prepare_batch(batch)
    turns = in_turns(lambda: model.hog(batch["gray"]), lambda: direct_hog(batch["img"]))
    return "HOG targets of a batch", f"{s.batch_size} images of {INPUT_SIZE} px", *turns, s.batch_size


def training_step(s, name: str, compiled: str = "", plain: bool = False) -> Callable[[], None]:
    """A step in one of `FORMATS`; `plain`: the same with direct HOG of three channels."""
    model, batch = model_and_batch(s)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), fused=True)
    dtype = getattr(torch, name.replace("TF32", "float32"))
    if plain:
        model.hog.forward = direct_hog
    if compiled:
        model.compile()

    def step() -> None:
        ready = model.prepare_batch(batch)
        if plain:
            ready.pop("gray")  # three channels, three times the work
        with torch.autocast(s.device, dtype, enabled=dtype != torch.float32):
            loss = model(ready, mask=model.draw_mask(ready, 0.75, 0.5), n_visible=model.num_patches // 4)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step(s, name: str) -> tuple:
    """The baseline is in float32, or float16 on a GPU, as published."""
    dtype, _, compiled = name.partition(", ")
    published = "float16" if s.gpu else "float32"
    ours, baseline = training_step(s, dtype, compiled), training_step(s, published, plain=True)
    set_tf32(dtype == "TF32")
    note = f"baseline: {published}; first step {timed(ours):.3g} s"
    turns = in_turns(ours, baseline)
    torch.compiler.reset()
    return f"step: {name}", note, *turns, s.batch_size


def training(s, workers: int) -> tuple:
    """Seconds per image of a run of run_pretrain.py, from its log."""
    output = s.root / f"output-{workers}"
    text = f"--data_path {s.tree} --preload --gaze_weighted --model {MODEL} --pretrained none --device {s.device}"
    text += f" --batch_size {s.batch_size} --num_workers {workers} --epochs 8 --warmup_epochs 1"
    run(run_pretrain, f"{text} --input_size {INPUT_SIZE} --output_dir {output}")
    seconds = pd.read_json(output / "log.txt", lines=True)["time_s"][1:]  # the first warms up the device
    return f"real training, {workers} workers, per image", f"batch {s.batch_size}", seconds / (2 * s.batch_size)


# ---------------------------------------------------------------- gaze prediction and encoders


def prediction(s) -> tuple:
    """From the files of a tree to the files of a tree, against bare forward passes of the gaze predictor."""
    tree, images = s.root / "images", 2 * s.batch_size
    study = make_study(s.root / "films", images, size=(624, 512), shared_images=0)
    prepare_mimic(study.images, None, tree, views=["all"])
    predictor = as_predictor(GazeNet(**PREDICTOR).eval().to(s.device))
    batch = torch.randint(0, 256, (s.batch_size, 1, *[predictor.input_size] * 2), dtype=torch.uint8)
    turns = in_turns(
        lambda: fill_tree(tree, predictor, overwrite=True, batch_size=s.batch_size, workers=available_cpus()),
        lambda: [predictor.maps(batch) for _ in range(2)],
    )
    return "gaze prediction of a tree", "images of 512 x 624 px", *turns, images


def downstream(s, text: str) -> Callable[[], None]:
    """A run of run_downstream.py."""
    flags = f"--dataset rsna --data_path {s.root}/rsna --weights random@{s.encoder} --device {s.device} --bootstrap 200"
    return partial(run, run_downstream, f"{flags} --encode_batch {s.batch_size} --num_workers {8 * s.gpu} {text}")


@torch.no_grad()
def features(s, images: Tensor) -> Tensor:
    """Encode a batch in the number format of run_downstream.py."""
    with torch.autocast(s.device, torch.bfloat16, enabled=s.gpu):
        return s.model(images.to(s.device)).float()


def encoding(s) -> tuple:
    """From image files to features on disk, against forward passes of a batch in memory."""
    output = s.root / "probed"
    make_rsna(
        s.root, s.labelled, size=(192, 160), image_format="jpg", lesion_kinds=["consolidation"], normal_fraction=0.5
    )
    probe = downstream(s, f"--method probe --output_dir {output}")
    s.model = timm.create_model(s.encoder, num_classes=0, img_size=224).eval().to(s.device)
    batch = torch.rand(s.batch_size, 3, 224, 224)
    first, again, plain = in_turns(
        lambda: (shutil.rmtree(output, ignore_errors=True), probe()),
        probe,  # all features are on disk: what is left is start and probe
        lambda: [features(s, batch).cpu() for _ in range(s.labelled // s.batch_size)],
    )
    return "downstream encoding", s.encoder, np.maximum(first - again, 1e-9), plain, s.labelled


def read_views(files) -> Tensor:
    return torch.stack([published_sample([file]) for file in files])


def published_heads(s) -> None:
    """Baseline: train nine heads one after the other. In each epoch of each the training images (70% of all, of these a
    fraction), then the validation images (15%) are read from their files and encoded."""
    files = sorted(s.root.glob("rsna/**/*.jpg"))
    for fraction in 3 * (0.3, 0.6, 1.0):
        head = nn.Linear(s.model.num_features, 1).to(s.device)
        optimizer = torch.optim.Adam(head.parameters())
        train, valid = (
            DataLoader(part, s.batch_size // 2, collate_fn=read_views, num_workers=8 * s.gpu)
            for part in (files[: round(0.7 * fraction * s.labelled)], files[-round(0.15 * s.labelled) :])
        )
        for loader in 3 * [train, valid]:
            for batch in loader:
                loss = F.softplus(head(features(s, batch))).mean()  # all labels 0; the time is the same
                if loader is train:
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()


def heads(s) -> tuple:
    """Linear heads on the images of `encoding` in one view, against the published loop with its encoder."""
    flags = f"--method linear --fractions 0.3 0.6 1 --seeds 43 44 45 --views 1 --epochs 3 --output_dir {s.root}/heads"
    ours = timed(downstream(s, f"{flags} --batch_size {s.batch_size // 2}"))
    plain = timed(partial(published_heads, s))
    return "linear evaluation, 3 fractions x 3 seeds", f"{s.encoder}, {s.labelled} images, 3 epochs", ours, plain


if __name__ == "__main__":
    run_cli(main)
