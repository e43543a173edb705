"""kill -9 at random moments of all four methods: the same command ends with the bytes of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
from reliability_runs import Run
from test_run_downstream import command, encoder, rsna  # noqa: F401  (fixtures)

from downstream.main import main

FOLDS = ["--split", "folds", "--folds", "3", "--seeds", "43", "44"]
FILES = ("results.csv", "predictions.csv", "table.md", "results.png", "split.csv")


@pytest.mark.parametrize("method", ["linear", "probe", "finetune", "evaluate"])
def test_random_kills(method, rsna, encoder, tmp_path):  # noqa: F811
    options = ["--method", method, "--epochs", "2", "--fractions", "0.6", "1"]
    options += {"linear": FOLDS, "finetune": ["--seeds", "43", "44", "--recipe", "layer_decay"], "probe": FOLDS}.get(
        method, ["--split", "test"]
    )
    weights = [f"ours={encoder}"]
    if method == "evaluate":
        trained = ["--method", "finetune", "--epochs", "1", "--seeds", "1", "2", "--weights", f"ours={encoder}"]
        assert main(command(rsna, tmp_path / "trained", *trained)) == 0
        weights = [f"m{i}={path}" for i, path in enumerate(sorted(tmp_path.glob("trained/runs/*/best.pth")))]
    argv = lambda out: command(rsna, tmp_path / out, "--encode_batch", "8", "--weights", *weights, *options)  # noqa: E731
    began = time.monotonic()
    assert main(argv("whole")) == 0
    seconds = time.monotonic() - began
    rng = random.Random(method)
    for i in range(3):
        one = Run(argv("killed"), tmp_path / f"log{i}", main=main)
        one.until("images", timeout=120)
        time.sleep(rng.uniform(0, seconds / 2))
        with contextlib.suppress(ProcessLookupError):  # at its end already
            os.killpg(one.pid, signal.SIGKILL)
        assert one.wait() in (0, -signal.SIGKILL)
    assert main(argv("killed")) == 0
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
