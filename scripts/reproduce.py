"""What scripts/reproduce.sh runs, with the variables that are set there: step after step, each once."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli import Parser
from util.errors import UserError, run_cli
from util.files import atomic_write, file_lock
from util.stop import REQUESTS, exit_status

ROOT = Path(__file__).resolve().parents[1]
DATA = ("REFLACX", "IMAGES", "MORE_IMAGES", "RSNA", "NIH", "CHEXPERT", "SIIM", "COVIDX")
LABELLED = DATA[3:]
FLAGS = ("PREPARE_FLAGS", "MIMIC_FLAGS", "PRETRAIN_FLAGS", "GAZE_FLAGS", "DOWNSTREAM_FLAGS")
IMAGENET = "preTrain/vit_base_p16_224_timm.pth"
EXPECTED = {
    "yes|no": ("yes or no", "ACCEPT_DAMAGED", "PREDICTED_GAZE", "QUIET"),
    "cpu|cuda": ("cuda or cpu (CUDA_VISIBLE_DEVICES chooses among GPUs)", "DEVICE"),
    "[1-9][0-9]{0,8}": ("a number from 1", "EPOCHS", "BATCH_SIZE"),
    "[0-9]{1,4}": ("a number from 0", "WORKERS"),
    "auto|[1-9][0-9]{0,3}": ("auto or a number from 1", "GPUS"),
    "[0-9 ]*": ("numbers", "PICTURES"),
}


def get_args_parser() -> argparse.ArgumentParser:
    return Parser(description=__doc__)


def main(argv: list[str] | None = None) -> int:
    get_args_parser().parse_args(argv)
    given = dict(os.environ)
    check(given, Path(given["CALLED_FROM"]))
    out = given["OUT"]
    try:
        Path(out, "steps").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"OUT={out}: can't be written: {error.strerror}") from None
    # Steps have the lock too: one that outlives a killed runner is not disturbed.
    with file_lock(Path(out, ".lock"), what=f"OUT={out}", mend="wait for it, or choose another OUT") as lock:
        chain(given, Runner(out, given["PYTHON"], given["QUIET"] == "yes", lock))
    for signum in REQUESTS:  # Python gives up its handlers before it has ended
        signal.signal(signum, signal.SIG_IGN)
    print(f"everything is in {out}")
    return 0


def check(given: dict[str, str], called_from: Path) -> None:
    """Refuse what can't work, now and not after hours; paths become those seen from the repository."""

    def located(path: str) -> str:
        real = Path(os.path.realpath(called_from / path))
        return str(real.relative_to(ROOT) if real.is_relative_to(ROOT) else real)

    if not given["REFLACX"] or not given["IMAGES"]:
        raise UserError(
            "set REFLACX (e.g. reflacx-xray-localization/1.0.0) and IMAGES (MIMIC-CXR-JPG or MIMIC-CXR), and what you "
            f"have of {', '.join(LABELLED)}, to the directories of the data; the top of scripts/reproduce.sh says more"
        )
    for name in filter(given.get, DATA):
        given[name] = located(given[name])
        if not os.path.isdir(given[name]):
            raise UserError(f"{name}={given[name]}: no such directory")
    if given["PRETRAINED"] not in ("none", IMAGENET):
        given["PRETRAINED"] = located(given["PRETRAINED"])
        if not os.path.isfile(given["PRETRAINED"]):
            raise UserError(f"PRETRAINED={given['PRETRAINED']}: no such file")
    if given["OUT"] != "output_dir/reproduce":
        given["OUT"] = located(given["OUT"])
    if given["PREDICTED_GAZE"] == "yes" and "--split" in given["PREPARE_FLAGS"]:
        raise UserError(
            f"PREPARE_FLAGS={given['PREPARE_FLAGS']}: PREDICTED_GAZE=yes trains a gaze predictor, which needs all "
            "parts; leave out --split"
        )
    for pattern, (what, *names) in EXPECTED.items():
        for name in names:
            if not re.fullmatch(pattern, given[name]):
                raise UserError(f"{name}={given[name]}: expected {what}")
    # Programs run in the repository, which is not where such a path is meant.
    for name in FLAGS if called_from.resolve() != ROOT else ():
        for word in given[name].split():
            path = re.sub("^--[^=]*=", "", word)
            if re.match("[^-/][^:]*/", path) or (called_from / path).is_file():
                raise UserError(f"{name}: {word}: give the absolute path")
    if "--epochs" in given["PRETRAIN_FLAGS"]:
        raise UserError(f"PRETRAIN_FLAGS={given['PRETRAIN_FLAGS']}: set EPOCHS for --epochs")
    if not any(map(given.get, LABELLED)):
        print(f"note: none of {', '.join(LABELLED)} is set: there will be no table", flush=True)
    elif not given["METHODS"].split():
        raise UserError("METHODS is empty; set it to some of linear, probe, finetune")
    words = (word.partition("=") for word in given["COMPARE"].split())
    given["COMPARE"] = "\0".join(f"{name}={located(path)}" if sign else name for name, sign, path in words)
    if given["DEVICE"] == "cuda":
        ask = [given["PYTHON"], "-c", "import torch; print(torch.cuda.device_count())"]
        count = int(subprocess.run(ask, stdout=subprocess.PIPE, check=True).stdout)
        if not count:
            raise UserError("DEVICE=cuda: torch sees no GPU here; DEVICE=cpu runs on the CPU")
        if given["GPUS"] == "auto":
            given["GPUS"] = str(count)
        if int(given["GPUS"]) > count:
            raise UserError(f"GPUS={given['GPUS']}: torch sees {count} here")
    if given["GPUS"] == "auto":
        given["GPUS"] = "1"
    if given["DEVICE"] == "cuda" or given["GPUS"] != "1":  # many processes; a single one on the CPU takes all cores
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if int(given["BATCH_SIZE"]) % int(given["GPUS"]):
        raise UserError(
            f"BATCH_SIZE={given['BATCH_SIZE']}: {given['GPUS']} GPUs can't share it; set GPUS, or another BATCH_SIZE"
        )


class Runner:
    """Runs commands once each, and ends in an orderly way at a signal.

    OUT/steps/NAME has three lines: the command, what it reads, and "begun", "begun afresh" or "done" and when. OUT is
    not named in it, so that it can be moved. `lock` is a descriptor that commands inherit.
    """

    def __init__(self, out: str, python: str, quiet: bool, lock: int):
        self.out, self.python, self.quiet, self.lock = out, python, quiet, lock
        self.child: subprocess.Popen | None = None
        self.asked: signal.Signals | None = None
        for signum in REQUESTS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(signum, self._note)

    def _note(self, signum: int, frame) -> None:
        """A signal goes on to the step at work, as TERM (torchrun dies of USR1), which saves what it has."""
        self.asked = signal.Signals(signum)
        if self.child is not None:
            self.child.terminate()

    def _stop_if_asked(self, where: str) -> None:
        if self.asked is None:
            return
        print(f"stopped by {self.asked.name} {where}; the same command goes on from here", file=sys.stderr, flush=True)
        job = os.environ.get("SLURM_JOB_ID")
        if self.asked == signal.SIGUSR1 and job and subprocess.run(["scontrol", "requeue", job]).returncode:
            print(f"error: job {job} is not back in the queue; submit it again", file=sys.stderr)
        raise SystemExit(exit_status(REQUESTS[self.asked]))

    def step(
        self,
        name: str,
        program: str,
        *words: str,
        reads: str = "the data",
        how: Sequence[str] = (),
        launcher: Sequence[str] = (),
        place: str = "",
        afresh: str = "",
    ) -> str:
        """Run a command unless it is done; returns what stands for what it made, to the steps that read that.

        Args:
            reads: what stands for what it reads, and what else decides what comes out.
            how: flags that say where and how it runs, not what comes out; `launcher` likewise, before the program.
            place: a directory in which the program goes on; it is moved away where something else was begun there.
            afresh: the flag by which the program replaces what it made from something else.
        """
        self._stop_if_asked(f"before step '{name}'")
        mark = Path(self.out, "steps", name)
        what = shlex.join(word.replace(self.out, "OUT") for word in (program, *words)) + f"\nfrom {reads}\n"
        before = mark.read_text() if mark.exists() else None
        state = before.removeprefix(what).strip() if before is not None and before.startswith(what) else ""
        if state.startswith("done"):
            print(f"== {name}: done before", flush=True)
            return digest(before)
        print(f"== {name}", flush=True)
        if not state:
            state = "begun afresh" if afresh and before is not None else "begun"
            if place and os.path.exists(place) and not (afresh and before is not None):
                moved = f"{place}-before-{datetime.now():%Y%m%d-%H%M%S.%f}"
                os.rename(place, moved)
                print(f"made from something else before: moved to {moved}", flush=True)
            write(mark, f"{what}{state}\n")
        # Flags of the user come behind `how`, and win.
        flag = [afresh] if state == "begun afresh" else []
        status = self._run(name, [self.python, *launcher, program, *filter(None, how), *flag, *words])
        if status == 0:
            write(mark, f"{what}done {time.time()}\n")
        elif self.asked is None:
            print(
                f"error: step '{name}' ended with status {status} (see above); the same command goes on from here",
                file=sys.stderr,
                flush=True,
            )
            raise SystemExit(status)
        self._stop_if_asked(f"in step '{name}'")
        return digest(mark.read_text())

    def _run(self, name: str, command: list[str]) -> int:
        """The command's status, after a signal too, which its end is waited for."""
        began, log = time.monotonic(), Path(self.out, "steps", f"{name}.txt")
        if not self.quiet:
            print(shlex.join(command), flush=True)
        with open(log if self.quiet else os.devnull, "a") as file:
            output = {"stdout": file, "stderr": subprocess.STDOUT} if self.quiet else {}
            # A session of its own, so that Ctrl-C comes here only.
            self.child = subprocess.Popen(command, start_new_session=True, pass_fds=[self.lock], **output)
            if self.asked is not None:
                self.child.terminate()
            status = self.child.wait()
        self.child = None
        if self.quiet and status:
            print(log.read_text()[-3000:], file=sys.stderr)
        elif self.quiet:
            print(f"   {time.monotonic() - began:.0f} s; what it said is in {log}", flush=True)
        return status if status >= 0 else 128 - status


def write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def chain(given: dict[str, str], runner: Runner) -> None:
    """All steps."""
    step, out, batch, gpus = runner.step, given["OUT"], int(given["BATCH_SIZE"]), int(given["GPUS"])
    flags = {name: given[name].split() for name in FLAGS}
    device = ["--device", given["DEVICE"]]
    busy = [*device, "--num_workers", given["WORKERS"]]
    accept = ["--accept_damaged"] if given["ACCEPT_DAMAGED"] == "yes" else []
    compare = given["COMPARE"].split("\0") if given["COMPARE"] else []
    judged = [
        (f"{name.lower()}-{method}", name.lower(), method, given[name])
        for name in filter(given.get, LABELLED)
        for method in given["METHODS"].split()
    ]
    predicts = given["PREDICTED_GAZE"] == "yes"
    read, filled = f"{out}/data/reflacx", f"{out}/data/mimic"

    def judge(step_name: str, dataset: str, method: str, data: str, folder: str, *words: str, **options) -> str:
        words = ("--fractions", *given["FRACTIONS"].split(), "--seeds", *given["SEEDS"].split(), *words)
        where = ("--dataset", dataset, "--method", method, "--data_path", data, "--output_dir", folder)
        return step(step_name, "run_downstream.py", *where, *words, *flags["DOWNSTREAM_FLAGS"], **options)

    source = ("--raw", given["REFLACX"], "--images", given["IMAGES"], "--out", read)
    anew = {"how": accept, "afresh": "--overwrite"}
    prepared = step("prepare", "scripts/prepare_reflacx.py", *source, *flags["PREPARE_FLAGS"], **anew)
    if predicts:
        source = ("--images", given["MORE_IMAGES"], "--out", filled, *flags["MIMIC_FLAGS"])
        images = step("prepare_mimic", "scripts/prepare_mimic.py", *source, **anew)
    needed = {given["PRETRAINED"], *(compare if judged else ())}
    if not os.path.exists(IMAGENET) and needed & {IMAGENET, "imagenet"}:
        step("weights", "scripts/fetch_weights.py", "--out", IMAGENET)
    options = f"--preload --gaze_weighted --warmup_epochs 10 --blr 3e-3 --model {given['MODEL']} --epochs".split()
    options += [given["EPOCHS"], *flags["PRETRAIN_FLAGS"]]

    # The flags of what comes later, too, and the tables of the labelled images, and the encoders to compare with.
    batches = f", batches of {batch}"
    how = ["--batch_size", str(batch)]
    check_data = ("--check_data", "--data_path", read, *options)
    step("check", "run_pretrain.py", *check_data, reads=prepared + batches, how=how)
    weights = ["--weights", *compare] if compare else []
    for name, *what in judged:
        judge(f"{name}-check", *what, f"{out}/checks/{name}", "--dry_run", *weights, how=device)

    trees = [read]
    if predicts:
        words = ("--data_path", read, "--output_dir", f"{out}/gaze", *flags["GAZE_FLAGS"])
        predictor = step("gaze", "run_gaze.py", *words, reads=prepared, place=f"{out}/gaze", how=busy)
        words = ("--weights", f"{out}/gaze/best.pth", "--tree", filled, "--real", read)
        made = f"{prepared} {predictor} {images}"
        prepared = step("predict", "scripts/predict_gaze.py", *words, reads=made, how=device, afresh="--overwrite")
        # A tree of all images holds REFLACX's images too, with their real gaze.
        trees = [filled] if given["MORE_IMAGES"] == given["IMAGES"] else [read, filled]

    launcher = f"scripts/launch.py --standalone --nproc_per_node {gpus}".split() if gpus > 1 else []
    words = ("--data_path", *trees, "--pretrained", given["PRETRAINED"], "--output_dir", f"{out}/pretrain", *options)
    how = ["--batch_size", str(batch // gpus), *busy]
    pretrained = step(
        "pretrain",
        "run_pretrain.py",
        *words,
        reads=prepared + batches,
        place=f"{out}/pretrain",
        launcher=launcher,
        how=how,
    )
    checkpoint, backbone = f"{out}/pretrain/checkpoint-{int(given['EPOCHS']) - 1}.pth", f"{out}/backbone.pth"
    exported = step("export", "scripts/export_backbone.py", checkpoint, backbone, reads=pretrained)

    folders = [f"{out}/downstream/{name}" for name, *_ in judged]
    weights = ["--weights", f"ours={backbone}", *compare]
    made = [
        judge(name, *what, folder, *weights, reads=exported, how=busy)
        for (name, *what), folder in zip(judged, folders, strict=True)
    ]
    if judged:
        results = [f"{folder}/results.csv" for folder in folders]
        step("table", "scripts/summarize_results.py", *results, "--out", out, reads=" ".join(made))
        print(Path(out, "table.md").read_text())
    pictures = ["--index", *given["PICTURES"].split()] if given["PICTURES"].split() else []
    words = ("--data_path", read, *pictures, "--device", "cpu", "--out", f"{out}/pictures.png")
    step("pictures", "scripts/visualize.py", checkpoint, *words, reads=pretrained)


if __name__ == "__main__":
    run_cli(main)
