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
import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torchvision
from PIL import Image

from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import prepare
from scripts.benchmarks.downstream import measure_downstream
from scripts.benchmarks.gaze import measure_gaze_training, measure_prediction
from scripts.benchmarks.loading import measure_loader, measure_samples, measure_shared_memory
from scripts.benchmarks.step import measure_steps
from scripts.benchmarks.targets import measure_hog
from scripts.benchmarks.timing import Report, Settings
from scripts.benchmarks.training import measure_training
from scripts.benchmarks.variants import measure_variants
from util.errors import UserError, run_cli
from util.files import atomic_write


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--batch_size", type=int, help="default: 8 on a CPU, 128 on a GPU")
    parser.add_argument(
        "--compile", action="store_true", help="also measure compiled steps (on a GPU always)"
    )
    parser.add_argument("--work_dir", help="where inputs are made and removed again (default: /tmp)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)

    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: no such directory to write into")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that PyTorch can use")
    settings = Settings(device=device)
    if device == "cuda":
        settings.batch_size, settings.workers, settings.repeats = 128, (0, 4, 16), 20
    if args.quick:
        settings = Settings(
            (330, 380), 2, "cxrmim_vit_tiny_patch16", 2, 2, 2, 224, 2, 3, (0, 1), device
        )  # fmt: skip
        settings.downstream, settings.input_size = (40, 1, 4, 64), 64
    settings.compile, settings.quick = args.compile or device == "cuda" or args.quick, args.quick
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
        measure_variants(report, tree, settings)
        measure_training(report, tree, Path(name) / "output", settings)
        measure_prediction(report, Path(name), settings, args.quick)
        measure_gaze_training(report, Path(name), settings)
        measure_downstream(report, Path(name) / "downstream", settings)
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


if __name__ == "__main__":
    run_cli(main)
