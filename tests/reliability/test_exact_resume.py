"""A run stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import json
import signal
from functools import partial

import pytest
from reliability_runs import assert_same_run, run, run_ranks, signal_at

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGUSR2: 75}


# Where the signal comes, (epoch, step), and the checkpoint that must be there after it.
@pytest.mark.parametrize(
    ("more", "stops"),
    [
        ([], [(0, 0, "0-step1"), (0, 1, "0-step2"), (0, 5, "0"), (1, 3, "1-step4"), (1, 4, "1-step5")]),
        (
            ["--accum_iter", "2", "--clip_grad", "0.5"],
            [(0, 0, "0-step2"), (0, 3, "0-step4"), (1, 4, "1"), (2, 1, "2-step2")],
        ),
        (
            ["--num_workers", "2", "--accum_iter", "3", "--gaze_weighted", "--preload"],
            [(0, 1, "0-step3"), (1, 5, "1"), (2, 0, "2-step3")],
        ),
    ],
    ids=["every-step", "accumulation", "workers"],
)
def test_stopped_and_resumed_is_never_stopped(flags, undisturbed, tmp_path, more, stops):
    out = tmp_path / "out"
    reference = undisturbed(*more, "--num_workers", "0")  # as many or as few workers: the same run
    for i, (epoch, step, name) in enumerate(stops):
        signum = list(STATUS)[i % len(STATUS)]
        fault = partial(signal_at, epoch, step, signum)
        status, output = run(flags(out, *more), tmp_path / f"log{i}", fault=fault)
        assert status == STATUS[signum], output
        assert (out / f"checkpoint-{name}.pth").exists(), output
    status, output = run(flags(out, *more), tmp_path / "last")
    assert status == 0, output
    assert_same_run(out, reference)
    status, output = run(flags(out, *more), tmp_path / "again")  # a finished run has nothing to do
    assert status == 0, output
    assert_same_run(out, reference)
    starts = json.loads((out / "args.json").read_text())
    assert len(starts) == len(stops) + 2
    assert all(start["versions"]["torch"] and start["time"] and "git" in start for start in starts)


def test_two_ranks_stop_at_one_step_though_one_is_signalled(flags, undisturbed, tmp_path):
    out, more = tmp_path / "out", ["--batch_size", "1", "--num_workers", "2"]
    reference = undisturbed("--batch_size", "1", ranks=2)
    # One that comes in the last step finds the run finished.
    for i, (epoch, step, name, status) in enumerate([(0, 1, "0-step2", 75), (1, 5, "1", 75), (2, 5, "2", 0)]):
        faults = {1: partial(signal_at, epoch, step, signal.SIGUSR1)}
        statuses, outputs = run_ranks(flags(out, *more), tmp_path / f"log{i}", faults=faults)
        assert statuses == [status, status], "\n".join(outputs)
        assert (out / f"checkpoint-{name}.pth").exists(), "\n".join(outputs)
    assert_same_run(out, reference)


def test_time_limit(flags, tmp_path):
    out = tmp_path / "out"
    argv = flags(out, "--epochs", "2000", "--save_every", "2000", "--max_minutes", "0.02")
    status, output = run(argv, tmp_path / "log")
    assert status == 75 and "the same command continues" in output
    assert len(list(out.glob("checkpoint-*.pth"))) == 1
