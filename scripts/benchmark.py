#!/usr/bin/env python3
"""Measure this program against plain code for the same work, in one run on one machine.

A row holds two measurements that were taken in turns: the *baseline*, written out in scripts/benchmarks/ as the
published program does it (or the nearest plain way), and ours. The ratio is the median of the ratios of
the turns, its spread their quartiles. Inputs are phantoms of 2544 x 3056 px, made below TMPDIR and removed again.

    python scripts/benchmark.py                 # CPU or GPU, whichever is there
    python scripts/benchmark.py --json out.json # written after every part: what is measured is kept

If a part fails, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from PIL import Image

from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import prepare
from scripts.benchmarks.other_programs import measure_encoding, measure_heads, measure_prediction
from scripts.benchmarks.pretraining import Steps, measure_hog, measure_samples, measure_training
from scripts.benchmarks.timing import Report, Settings
from util.cli import Parser, available_cpus, finite_float
from util.errors import UserError, run_cli
from util.files import check_file_place
from util.precision import set_tf32
from util.stop import StopSignals


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
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size}: must be at least 1")
    if args.json:
        check_file_place(args.json, "--json")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use")
    batch_size = args.batch_size or (2 if args.quick else 128 if gpu else 8)
    repeats = 2 if args.quick else 10 if gpu else 5
    settings = Settings(device, args.quick, args.compile or gpu or args.quick, batch_size, repeats)
    set_tf32(False)
    report = Report(machine(device), asdict(settings), args.json)
    print(" | ".join(f"{key}: {value}" for key, value in report.machine.items()))
    print(f"{'':44} {'baseline':>9} {'ours':>9} {'':10} ratio (quartiles)", flush=True)
    report.write()  # so that a place that can't be written to ends the run now
    deadline = time.monotonic() + 60 * args.minutes
    with StopSignals() as signals, signals.exit_at_signal():  # inputs are removed
        with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
            for part, measure in parts(report, Path(name), settings).items():
                if time.monotonic() < deadline:
                    report.run(part, measure)
                else:
                    report.skipped.append(part)
    report.whole = True
    report.write()
    if report.skipped:
        print(f"not measured, --minutes {args.minutes:g} are over: {'; '.join(report.skipped)}")
    if report.failures:
        print(f"error: {len(report.failures)} parts failed: {'; '.join(report.failures)}", file=sys.stderr)
    return 1 if report.failures or not report.rows else 0


def parts(report: Report, root: Path, settings: Settings) -> dict:
    """All measurements by name, the most important first, with their files in `root`."""
    tree = make_inputs(root, settings)
    steps = Steps(report, tree, settings)
    found = {
        "samples": partial(measure_samples, report, tree, settings),
        "HOG targets": partial(measure_hog, report, tree, settings),
    }
    # Those of a GPU also in a quick run: they must work the first time.
    formats = (
        ("bfloat16", "float16", "TF32", "float32") if settings.on_gpu or settings.quick else ("bfloat16", "float32")
    )
    found |= {f"step: {name}": partial(steps.measure, name, False) for name in formats}
    for workers in (1,) if settings.quick else (4, 16) if settings.on_gpu else (2,):
        output = root / f"output-{workers}"
        found[f"training, {workers} workers"] = partial(measure_training, report, tree, output, settings, workers)
    found["encoding"] = partial(measure_encoding, report, root / "encoding", settings)
    found["gaze prediction"] = partial(measure_prediction, report, root, settings)
    found["linear evaluation"] = partial(measure_heads, report, root / "heads", settings)
    if settings.compile:  # compiling takes a minute or more each
        compiled = formats[:1] if settings.quick else formats
        found |= {f"step: {name}, compiled": partial(steps.measure, name, True) for name in compiled}
    return found


def machine(device: str) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        cpu = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": available_cpus(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, Image)},
    }


def make_inputs(root: Path, settings: Settings) -> Path:
    """A processed tree in native resolution with JPG images, as the published program reads it."""
    n_images = 2 if settings.quick else 8
    study = make_study(root / "raw", n_images=n_images, size=settings.image_size, shared_images=0)
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
