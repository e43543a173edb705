"""A run stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import signal
from functools import partial

import pytest
from reliability_runs import Run, assert_same_run, run, run_ranks, signal_at

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGUSR2: 75}


# Where the signal comes, (epoch, step), and the checkpoint that must be there after it.
@pytest.mark.parametrize(("more", "stops"), [
    ([], [(0, 0, "0-step1"), (0, 1, "0-step2"), (0, 5, "0"), (1, 3, "1-step4"), (1, 4, "1-step5")]),
    (["--accum_iter", "2", "--clip_grad", "0.5"],
     [(0, 0, "0-step2"), (0, 3, "0-step4"), (1, 4, "1"), (2, 1, "2-step2")]),
    (["--num_workers", "2", "--accum_iter", "3", "--gaze_weighted", "--preload"],
     [(0, 1, "0-step3"), (1, 5, "1"), (2, 0, "2-step3")]),
], ids=["every-step", "accumulation", "workers"])
def test_stopped_and_resumed_is_never_stopped(flags, undisturbed, tmp_path, more, stops):
    out = tmp_path / "out"
    reference_flags = [flag for flag in more if flag not in ("--num_workers", "2")] if "--num_workers" in more else more
    reference = undisturbed(*reference_flags)
    for i, (epoch, step, name) in enumerate(stops):
        signum = list(STATUS)[i % len(STATUS)]
        status, output = run(flags(out, *more), tmp_path / f"log{i}", fault=partial(signal_at, epoch, step, signum))
        assert status == STATUS[signum], output
        assert (out / f"checkpoint-{name}.pth").exists(), output
    status, output = run(flags(out, *more), tmp_path / "last")
    assert status == 0, output
    assert_same_run(out, reference)
    status, output = run(flags(out, *more), tmp_path / "again")  # a finished run has nothing to do
    assert status == 0, output
    assert_same_run(out, reference)


def test_two_ranks_stop_at_one_step_though_one_is_signalled(flags, undisturbed, tmp_path):
    out, more = tmp_path / "out", ["--batch_size", "1", "--num_workers", "2"]
    reference = undisturbed("--batch_size", "1", ranks=2)
    for i, (epoch, step, names) in enumerate([(0, 1, ("0-step3",)), (1, 4, ("1",)), (2, 5, ("2",))]):
        faults = {1: partial(signal_at, epoch, step, signal.SIGUSR1)}
        statuses, outputs = run_ranks(flags(out, *more), tmp_path / f"log{i}", faults=faults)
        assert statuses == ([0, 0] if (epoch, step) == (2, 5) else [75, 75]), "\n".join(outputs)
        assert [path.name for path in out.glob("checkpoint-*.pth") if path.name == f"checkpoint-{names[0]}.pth"]
    assert_same_run(out, reference)


def test_time_limit_and_second_signal(flags, tmp_path):
    out = tmp_path / "out"
    limited = Run(flags(out, "--epochs", "2000", "--save_every", "2000", "--max_minutes", "0.02"), tmp_path / "limited")
    patient = Run(flags(tmp_path / "other", "--epochs", "2000"), tmp_path / "patient")
    assert limited.wait() == 75
    assert len(list(out.glob("checkpoint-*.pth"))) == 1
    patient.until("epoch 1/2000")
    patient.process.terminate()
    assert patient.wait() == 143
    assert "SIGTERM: saving a checkpoint" in patient.output
