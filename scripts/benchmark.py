#!/usr/bin/env python3
"""Measure this program against plain code for the same work, in one run on one machine.

Every row holds two measurements that were taken in turns: the *baseline*, written out below as the
published program does it (or the nearest plain way), and ours. The ratio is the median of the ratios of
the turns, its spread their quartiles. Inputs are phantoms of 2544 x 3056 px, made here.

    python scripts/benchmark.py                 # CPU or GPU, whichever is there; some 12 minutes on 2 cores
    python scripts/benchmark.py --json out.json # written after every part: what is measured is kept

A part that fails is told, the others go on, and the exit status is 1. On a GPU what is not done within --minutes
is left out, which is told as well; the order is that of importance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from PIL import Image

from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import prepare
from scripts.benchmarks.downstream import measure_downstream
from scripts.benchmarks.encoding import measure_encoding
from scripts.benchmarks.gaze import measure_gaze_training, measure_prediction
from scripts.benchmarks.loading import measure_loader, measure_samples, measure_shared_memory
from scripts.benchmarks.step import measure_steps
from scripts.benchmarks.targets import measure_hog
from scripts.benchmarks.timing import Parts, Report, Settings
from scripts.benchmarks.training import measure_training
from scripts.benchmarks.variants import VariantSteps, variants
from util.cli import Parser, finite_float
from util.cpus import available_cpus
from util.errors import UserError, run_cli
from util.files import check_file_place
from util.precision import set_tf32
from util.stop import StopSignals


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # fmt: off
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--compile", action="store_true", help="also measure compiled steps (on a GPU always)")
    parser.add_argument("--minutes", type=finite_float,
        help="stop after so long (default: 7.5 on a GPU, never on a CPU)")
    parser.add_argument("--work_dir", help="where inputs are made and removed again (default: /tmp)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)

    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: must be above 0")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.work_dir and not Path(args.work_dir).is_dir():
        raise UserError(f"--work_dir {args.work_dir}: no such directory")
    if args.json:
        check_file_place(args.json, "--json")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use")
    settings = settings_of(args, device)
    set_tf32(False)
    report = Report(machine(device), asdict(settings))
    minutes = args.minutes or (7.5 if device == "cuda" else math.inf)
    parts = Parts(report, Path(args.json) if args.json else None, minutes)
    print(" | ".join(f"{key}: {value}" for key, value in report.machine.items()))
    header = f"{'':44}  {'baseline':>9}  {'ours':>9}  {'':10}  {'ratio (quartiles)':24}  bar"
    print(header, flush=True)
    parts.write()  # so that a place where it can't be is told now
    with StopSignals() as signals, signals.exit_at_signal():  # what was made below work_dir is removed
        with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.work_dir) as name:
            run_parts(parts, report, Path(name), settings)
    report.whole = True
    parts.write()
    for name, value in report.equality.items():
        print(f"{name}: {value:.3g}")
    if report.skipped:
        print(f"not measured for lack of time: {'; '.join(report.skipped)}")
    if report.failures:
        print(f"error: {len(report.failures)} parts failed: {'; '.join(report.failures)}", file=sys.stderr)
    if not report.rows:
        print("error: nothing was measured", file=sys.stderr)
    return 1 if report.failures or not report.rows else 0


def settings_of(args: argparse.Namespace, device: str) -> Settings:
    """Sizes of a run: those of the CPU are `Settings`' own."""
    settings = Settings(device=device)
    if device == "cuda":
        settings = replace(
            settings,
            batch_size=128,
            prediction_batch=32,
            repeats=10,
            sample_repeats=6,
            loader_batches=30,
            workers=(0, 4, 16),
            training_workers=(4, 16),
            copies=64,
            downstream=(240, 15, 8, 192),
        )
    if args.quick:
        settings = Settings(
            image_size=(330, 380),
            n_images=2,
            model="cxrmim_vit_tiny_patch16",
            batch_size=2,
            prediction_batch=2,
            repeats=2,
            sample_repeats=2,
            cache_size=224,
            epochs=2,
            loader_batches=3,
            workers=(0, 1),
            training_workers=(1,),
            device=device,
            downstream=(40, 1, 4, 64),
            input_size=64,
        )
    if args.batch_size:
        settings.batch_size = args.batch_size
    settings.compile, settings.quick = args.compile or device == "cuda" or args.quick, args.quick
    return settings


def run_parts(parts: Parts, report: Report, root: Path, settings: Settings) -> None:
    """All measurements, with their files in `root`."""
    tree = make_inputs(root, settings)
    run = parts.run
    # The first, which also measures how the cache is built that the others read.
    run("samples", lambda: measure_samples(report, tree, settings))
    run("HOG targets", lambda: measure_hog(report, settings))
    run("parts of a step", lambda: measure_steps(report, tree, settings))
    steps = VariantSteps(report, tree, settings)
    compiled = [variant for variant in variants(settings) if variant.compile_mode]
    for variant in variants(settings):
        if variant not in compiled:
            run(f"step: {variant.name}", partial(steps.measure, variant))
    for workers in settings.training_workers:
        output = root / f"output-{workers}"
        run(f"training, {workers} workers", partial(measure_training, report, tree, output, settings, workers))
    run("gaze training", lambda: measure_gaze_training(report, root, settings))
    run("downstream encoding", lambda: measure_encoding(report, root / "encoding", settings))
    run("loader", lambda: measure_loader(report, tree, settings))
    run("shared memory", lambda: measure_shared_memory(report, tree, settings))
    for variant in compiled[:2]:  # compiling takes a minute or more each
        run(f"step: {variant.name}", partial(steps.measure, variant), needs=30)
    run("gaze prediction", lambda: measure_prediction(report, root, settings))
    run("linear evaluation", lambda: measure_downstream(report, root / "downstream", settings))
    for variant in compiled[2:]:
        run(f"step: {variant.name}", partial(steps.measure, variant), needs=30)


def machine(device: str) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    result = {
        "cpu": cpu,
        "cores": available_cpus(),
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
        prepare(raw=study.raw, images=study.images, out=root / "tree", size=0, workers=available_cpus())
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


if __name__ == "__main__":
    run_cli(main)
