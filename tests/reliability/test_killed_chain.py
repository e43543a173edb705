"""scripts/reproduce.sh on made-up data, killed and stopped in every step: the same results as undisturbed."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from phantom_chexpert import make_chexpert
from reliability_runs import processes_with, wait_until_gone
from test_launchers import ROOT, Launched

from scripts import make_phantom

SETTINGS = {
    "PREDICTED_GAZE": "yes",
    "DEVICE": "cpu",
    "WORKERS": "1",
    "PRETRAINED": "none",
    "MODEL": "cxrmim_vit_tiny_patch16",
    "EPOCHS": "3",
    "BATCH_SIZE": "4",
    "PREPARE_FLAGS": "--size 64 --workers 1",
    "MIMIC_FLAGS": "--size 64 --workers 1 --views all",
    "PRETRAIN_FLAGS": "--input_size 64 --warmup_epochs 1 --image_every 0 --print_every 1 --save_every 1",
    "GAZE_FLAGS": "--backbone resnet18 --weights none --input_size 64 --epochs 2 --batch_size 4",
    "DOWNSTREAM_FLAGS": "--batch_size 8 --epochs 2 --views 2 --bootstrap 200",
    "COMPARE": "random",
    "FRACTIONS": "0.5 1",
    "SEEDS": "43 44",
    "PICTURES": "0",
    "PYTHONUNBUFFERED": "1",
}
STEPS = (
    "prepare prepare_mimic check rsna-linear-check chexpert-linear-check gaze predict pretrain export "
    "rsna-linear chexpert-linear table pictures"
).split()
# For the user, and the same whenever it is made.
KEPT = ("*.csv", "*.md", "*.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small studies in the four layouts, in a place with a blank, as variables of reproduce.sh."""
    root = tmp_path_factory.mktemp("made up")
    for folder, words in (
        ("", "--n_images 8 --height 96 --width 80"),
        ("more", "--n_images 4 --height 96 --width 80 --seed 1 --shared_images 0"),
        (
            "",
            "--n_images 48 --height 64 --width 56 --seed 2 --layout rsna --lesion_kinds consolidation --normal_fraction 0.5",
        ),
    ):
        make_phantom.main(["--out", str(root / folder), *words.split()])
    make_chexpert(root, 56, size=(64, 56))
    places = {
        "REFLACX": "reflacx",
        "IMAGES": "mimic",
        "MORE_IMAGES": "more/mimic",
        "RSNA": "rsna",
        "CHEXPERT": "chexpert",
    }
    return {name: str(root / place) for name, place in places.items()}


class Chain:
    """Calls of reproduce.sh with one OUT, which is what they print into one log."""

    def __init__(self, data: dict[str, str], out: Path):
        self.data, self.out = data, out
        out.mkdir(parents=True)
        self.calls = 0

    def start(self) -> None:
        self.calls += 1
        self.job = Launched(
            ["bash", str(ROOT / "scripts/reproduce.sh")],
            self.out / f"call-{self.calls}.txt",
            OUT=str(self.out / "out"),
            **SETTINGS,
            **self.data,
        )

    @property
    def text(self) -> str:
        return self.job.log.read_text()

    def running(self) -> tuple[str, int]:
        """The step at work, and how many lines it has printed."""
        lines = self.text.splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("== ") and "done before" not in line]
        return (lines[starts[-1]][3:], len(lines) - starts[-1]) if starts else ("", 0)

    def ended(self) -> bool:
        return self.job.process.poll() is not None

    def reaches(self, name: str, seconds: float | None, lines: int) -> bool:
        """Wait for so long, or for so many lines; whether step `name` is still at work then."""
        began = time.monotonic()
        while self.running()[0] == name and not self.ended():
            if self.running()[1] >= lines if seconds is None else time.monotonic() >= began + seconds:
                return True
            time.sleep(0.005)
        return False

    def kill(self) -> None:
        self.job.process.kill()  # first, so that it has no time to tell of its step's end
        for _ in range(2):  # those that were being started, too
            for pid in processes_with(self.job.token):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def end(self, signum: int) -> int:
        """Power off, or a signal to the script alone; returns its status once nothing is left."""
        if signum == signal.SIGKILL:
            self.kill()
        else:
            self.job.process.send_signal(signum)
        status = self.job.process.wait(120)
        wait_until_gone(lambda: processes_with(self.job.token), 60)
        return status


def watch(chain: Chain) -> dict[str, tuple[float, int]]:
    """Seconds and printed lines of each step of an undisturbed call."""
    chain.start()
    began, found = {}, {}
    while not chain.ended():
        name, lines = chain.running()
        began.setdefault(name, time.monotonic())
        found[name] = (time.monotonic() - began[name], lines)
        time.sleep(0.02)
    assert chain.job.wait(60) == 0, chain.text
    return found


# Power off, by the scheduler, by Ctrl-C, before a job's time is up: signal and status of the script.
STATUSES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75}
# From and up to which share of a step's time; None: at its last line.
MOMENTS = {"beginning": (0.0, 0.15), "middle": (0.15, 0.9), "end": None}


def disturb(chain: Chain, steps: dict[str, tuple[float, int]], chance: random.Random) -> dict[str, list[str]]:
    """End the chain in each step at three moments, call it again each time, and return what was done in each step.

    A step that goes on from a later point may be over before its second or third moment.
    """
    plan = {name: list(MOMENTS) for name in steps}
    done = {name: [] for name in steps}
    others = itertools.cycle([signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1])
    chain.start()
    while not chain.ended():
        name, _ = chain.running()
        if plan.get(name):
            signum = next(others) if done[name] else signal.SIGKILL
            moment, (seconds, lines) = plan[name].pop(0), steps[name]
            if chain.reaches(name, seconds * chance.uniform(*MOMENTS[moment]) if MOMENTS[moment] else None, lines):
                status = chain.end(signum)
                if status == 0:  # the last step was over before the signal came
                    return done
                assert status == STATUSES[signum], chain.text
                done[name].append(f"{signum.name} at its {moment}")
                chain.start()
        time.sleep(0.01)
    assert chain.job.wait(60) == 0, chain.text
    return done


def contents(out: Path) -> dict[str, bytes]:
    """What the chain leaves for its user; of the encoder all numbers, since its file names its checkpoint's digest,
    and a checkpoint holds times."""
    files = {file for pattern in KEPT for file in out.rglob(pattern) if "steps" not in file.parts}
    found = {str(file.relative_to(out)): file.read_bytes() for file in sorted(files)}
    backbone = torch.load(out / "backbone.pth", weights_only=True)["state_dict"]
    return found | {name: tensor.numpy().tobytes() for name, tensor in backbone.items()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_disturbed_in_every_step_the_chain_makes_the_same(data, tmp_path, request):
    chain = Chain(data, tmp_path / "a place")
    request.addfinalizer(lambda: chain.kill())  # of the one at work when a check fails
    steps = watch(chain)
    assert [name for name in steps if name] == STEPS
    expected = contents(chain.out / "out")
    assert {"table.md", "results.png", "pos_embed", "pictures.png", "gaze/metrics.csv"} < set(expected)
    chain.out.rename(tmp_path / "undisturbed")  # so that both are made in the same place
    chain = Chain(data, tmp_path / "a place")
    done = disturb(chain, {name: steps[name] for name in STEPS}, random.Random(17))
    print(f"{chain.calls} calls", *(f"{name}: {', '.join(what)}" for name, what in done.items()), sep="\n")
    assert [name for name in done if not any("SIGKILL" in what for what in done[name])] == []
    found = contents(chain.out / "out")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
