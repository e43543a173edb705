"""What scripts/reproduce.sh runs, with the variables that are set there: step after step, each once."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.steps import Steps, located, running
from util.cli import Parser
from util.errors import UserError, run_cli

LABELLED = ("RSNA", "NIH", "CHEXPERT", "SIIM", "COVIDX")
DATA = ("REFLACX", "IMAGES", "MORE_IMAGES", *LABELLED)
PATHS = (*DATA, "OUT", "PRETRAINED")
IMAGENET = "preTrain/vit_base_p16_224_timm.pth"
EXPECTED = {
    "yes|no": ("yes or no", "ACCEPT_DAMAGED", "PREDICTED_GAZE", "QUIET"),
    "cpu|cuda": ("cuda or cpu (CUDA_VISIBLE_DEVICES chooses among GPUs)", "DEVICE"),
    "[1-9][0-9]*": ("a number from 1", "EPOCHS", "BATCH_SIZE"),
    "[0-9]+": ("a number from 0", "WORKERS"),
    "auto|[1-9][0-9]*": ("auto or a number from 1", "GPUS"),
}


def get_args_parser() -> argparse.ArgumentParser:
    return Parser(description=__doc__)


def main(argv: list[str] | None = None) -> int:
    get_args_parser().parse_args(argv)
    given = dict(os.environ)
    check(given)
    with running(given["OUT"], given["QUIET"] == "yes") as step:
        chain(given, step)
    return 0


def check(given: dict[str, str]) -> None:
    """Refuse what can't work, now and not after hours; paths become those seen from the repository."""
    if not given["REFLACX"] or not given["IMAGES"]:
        raise UserError(
            "set REFLACX (e.g. reflacx-xray-localization/1.0.0) and IMAGES (MIMIC-CXR-JPG or MIMIC-CXR), and what you "
            f"have of {', '.join(LABELLED)}, to the directories of the data; the top of scripts/reproduce.sh says more"
        )
    for name in PATHS:
        if given[name] not in ("", "none"):
            given[name] = located(given[name])
            if not os.path.exists(given[name]) and name != "OUT" and given[name] != IMAGENET:
                raise UserError(f"{name}={given[name]}: no such {'directory' if name in DATA else 'file'}")
    for pattern, (what, *names) in EXPECTED.items():
        for name in names:
            if not re.fullmatch(pattern, given[name]):
                raise UserError(f"{name}={given[name]}: expected {what}")
    if "--epochs" in given["PRETRAIN_FLAGS"]:
        raise UserError(f"PRETRAIN_FLAGS={given['PRETRAIN_FLAGS']}: set EPOCHS for --epochs")
    if given["PREDICTED_GAZE"] == "yes" and "--split" in given["PREPARE_FLAGS"]:
        raise UserError(
            f"PREPARE_FLAGS={given['PREPARE_FLAGS']}: PREDICTED_GAZE=yes needs all parts, leave out --split"
        )
    if given["DEVICE"] == "cuda":
        ask = [given["PYTHON"], "-c", "import torch; print(torch.cuda.device_count())"]
        there = int(subprocess.check_output(ask))
        given["GPUS"] = given["GPUS"].replace("auto", str(there))
        if not 0 < int(given["GPUS"]) <= there:
            raise UserError(f"GPUS={given['GPUS']}: torch sees {there} here; DEVICE=cpu runs on the CPU")
    given["GPUS"] = given["GPUS"].replace("auto", "1")
    if given["DEVICE"] == "cuda" or given["GPUS"] != "1":  # many processes; a single one on the CPU takes all cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if int(given["BATCH_SIZE"]) % int(given["GPUS"]):
        raise UserError(
            f"BATCH_SIZE={given['BATCH_SIZE']}: {given['GPUS']} GPUs can't share it; set GPUS, or another BATCH_SIZE"
        )


def chain(given: dict[str, str], step: Steps) -> None:
    """All steps."""
    v = SimpleNamespace(**{name: shlex.quote(text) if name in PATHS else text for name, text in given.items()})
    out, batch, gpus = v.OUT, int(v.BATCH_SIZE), int(v.GPUS)
    read, filled, backbone = f"{out}/data/reflacx", f"{out}/data/mimic", f"{out}/backbone.pth"
    busy = f"--device {v.DEVICE} --num_workers {v.WORKERS}"
    judged = [
        (name.lower(), method, getattr(v, name)) for name in LABELLED if given[name] for method in v.METHODS.split()
    ]
    if not judged:
        print(f"note: none of {', '.join(LABELLED)} is set, or no METHODS: there will be no table", flush=True)
    predicts = v.PREDICTED_GAZE == "yes"

    # A tree that was made from something else is replaced; one that is half made goes on.
    anew = "--overwrite" + " --accept_damaged" * (v.ACCEPT_DAMAGED == "yes")
    source = f"--raw {v.REFLACX} --images {v.IMAGES} --out {read}"
    step("prepare", f"scripts/prepare_reflacx.py {source} {v.PREPARE_FLAGS}", how=anew)
    if predicts:
        source = f"--images {v.MORE_IMAGES} --out {filled}"
        step("prepare_mimic", f"scripts/prepare_mimic.py {source} {v.MIMIC_FLAGS}", how=anew)
    if not os.path.exists(IMAGENET) and {v.PRETRAINED, *(v.COMPARE.split() if judged else ())} & {IMAGENET, "imagenet"}:
        step("weights", f"scripts/fetch_weights.py --out {IMAGENET}")

    # The flags of what comes later, too, and the tables of the labelled images, and the encoders to compare with.
    options = f"--preload --gaze_weighted --warmup_epochs 10 --blr 3e-3 --model {v.MODEL} --epochs {v.EPOCHS}"
    check = f"run_pretrain.py --check_data --data_path {read} {options} {v.PRETRAIN_FLAGS}"
    step("check", check, reads=f"prepare batches of {batch}", how=f"--batch_size {batch}")

    def judge(name: str, method: str, data: str, folder: str, weights: str, suffix: str = "", **options) -> None:
        command = f"run_downstream.py --dataset {name} --method {method} --data_path {data}"
        command += f" --output_dir {out}/{folder}/{name}-{method} --fractions {v.FRACTIONS} --seeds {v.SEEDS}"
        command += " --weights " * bool(weights) + weights
        step(f"{name}-{method}{suffix}", f"{command} {v.DOWNSTREAM_FLAGS}", **options)

    for what in judged:
        judge(*what, "checks", v.COMPARE, "-check", how=f"--device {v.DEVICE} --dry_run")

    trees, tree_made = read, "prepare"
    if predicts:
        command = f"run_gaze.py --data_path {read} --output_dir {out}/gaze {v.GAZE_FLAGS}"
        step("gaze", command, reads="prepare", place=f"{given['OUT']}/gaze", how=busy)
        command = f"scripts/predict_gaze.py --weights {out}/gaze/best.pth --tree {filled} --real {read}"
        step("predict", command, reads="prepare gaze prepare_mimic", how=f"--device {v.DEVICE} --overwrite")
        # A tree of all images holds REFLACX's images too, with their real gaze.
        trees, tree_made = filled if v.MORE_IMAGES == v.IMAGES else f"{read} {filled}", "predict"

    command = f"run_pretrain.py --data_path {trees} --pretrained {v.PRETRAINED} --output_dir {out}/pretrain"
    step(
        "pretrain",
        f"{command} {options} {v.PRETRAIN_FLAGS}",
        reads=f"{tree_made} batches of {batch}",
        place=f"{given['OUT']}/pretrain",
        launcher=f"scripts/launch.py --standalone --nproc_per_node {gpus}" if gpus > 1 else "",
        how=f"--batch_size {batch // gpus} {busy}",
    )
    checkpoint = f"{out}/pretrain/checkpoint-{int(v.EPOCHS) - 1}.pth"
    step("export", f"scripts/export_backbone.py {checkpoint} {backbone}", reads="pretrain")
    for what in judged:
        judge(*what, "downstream", f"ours={backbone} {v.COMPARE}", reads="export", how=busy)
    if judged:
        names = [f"{name}-{method}" for name, method, _ in judged]
        results = " ".join(f"{out}/downstream/{name}/results.csv" for name in names)
        step("table", f"scripts/summarize_results.py {results} --out {out}", reads=" ".join(names))
        print(Path(given["OUT"], "table.md").read_text())
    what = f"--data_path {read} --index {v.PICTURES} --device cpu --out {out}/pictures.png"
    step("pictures", f"scripts/visualize.py {checkpoint} {what}", reads="pretrain")


if __name__ == "__main__":
    run_cli(main)
