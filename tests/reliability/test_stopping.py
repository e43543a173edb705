"""Runs stopped as people stop them: into a pipe, with the terminal, in the middle of a cache build, twice."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import reliability_runs
from reliability_runs import (
    Run,
    assert_same_run,
    dead_output,
    full_output,
    loss_at,
    pause_in_build,
    run,
    signal_at,
    together,
)


class Terminal:
    """A shell command as the foreground job of a terminal of its own."""

    def __init__(self, command: str):
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execvp("bash", ["bash", "-c", command])

    def press_ctrl_c(self) -> None:
        os.write(self.descriptor, b"\x03")

    def close(self) -> None:
        """As the window's button does: the kernel sends SIGHUP."""
        os.close(self.descriptor)


def wait_for(path: Path, text: str, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, path.read_text() if path.exists() else "nothing"
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "status"), [("ctrl-c", 130), ("closed", 129)])
def test_stop_of_a_terminals_foreground_job_that_pipes_into_tee(flags, undisturbed, tmp_path, how, status):
    """tee dies at once, and with the window all output does; the run saves all the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    program = [sys.executable, reliability_runs.__file__, "pause_at", "1", "2", "--", *flags(out)]
    command = f"{shlex.join(program)} 2>&1 | tee {log}; echo status ${{PIPESTATUS[0]}} > {tmp_path / 'status'}"
    # The outer shell leads the session: when it dies of its SIGHUP, the kernel hands one to the whole job.
    terminal = Terminal(f"export OMP_NUM_THREADS=1; (trap : INT HUP; {command}); true")
    wait_for(log, "paused")
    terminal.press_ctrl_c() if how == "ctrl-c" else terminal.close()
    wait_for(tmp_path / "status", "\n")
    os.waitpid(terminal.pid, 0)
    assert (tmp_path / "status").read_text() == f"status {status}\n", log.read_text()
    assert (out / "checkpoint-1-step3.pth").exists()
    assert run(flags(out), tmp_path / "last")[0] == 0
    assert_same_run(out, undisturbed())


@pytest.mark.parametrize("output", [dead_output, full_output])
def test_no_output_costs_nothing(flags, undisturbed, tmp_path, output):
    out = tmp_path / "out"
    began = time.monotonic()
    status, _ = run(
        flags(out, "--image_every", "0"),
        tmp_path / "stopped",
        fault=partial(together, output, partial(signal_at, 1, 1, signal.SIGTERM)),
    )
    assert status == 143 and (out / "checkpoint-1-step2.pth").exists()
    assert run(flags(out, "--image_every", "0"), tmp_path / "last", fault=output)[0] == 0
    assert time.monotonic() - began < 60
    shutil.rmtree(out / ".cache", ignore_errors=True)
    assert_same_run(out, undisturbed("--image_every", "0"))


def test_hang_up_is_a_stop_but_under_nohup(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, output = run(flags(out), tmp_path / "log", fault=partial(signal_at, 0, 3, signal.SIGHUP))
    assert status == 129 and "SIGHUP: saving a checkpoint" in output
    assert (out / "checkpoint-0-step4.pth").exists()
    nohup = partial(
        together, partial(signal.signal, signal.SIGHUP, signal.SIG_IGN), partial(signal_at, 1, 1, signal.SIGHUP)
    )
    status, output = run(flags(out), tmp_path / "nohup", fault=nohup)
    assert status == 0, output
    assert_same_run(out, undisturbed())


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGHUP, 129)]
)
def test_a_stop_while_the_cache_is_built_comes_at_once(flags, tree, tmp_path, signum, status):
    copy, out = tmp_path / "tree", tmp_path / "out"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns(".cache"))
    argv = flags(out, "--data_path", str(copy))
    building = Run(argv, tmp_path / "log", fault=pause_in_build)
    building.until("paused")
    os.kill(building.pid, signum)
    began = time.monotonic()
    assert building.wait() == status, building.output
    assert time.monotonic() - began < 5  # 13 files of 1 s each, by as many threads as there are cores
    assert f"{signum.name}: stopping; there is nothing to save yet" in building.output
    assert "Traceback" not in building.output
    assert not list(copy.rglob(".tmp-*")) and not list(out.glob("*.pth"))
    if signum == signal.SIGTERM:
        status, output = run(argv, tmp_path / "last")
        assert status == 0, output


def test_steps_left_out_are_counted_over_all_starts(flags, tmp_path):
    out = tmp_path / "out"
    more = ("--skip_nonfinite", "2")
    for i, (epoch, step) in enumerate([(0, 1), (1, 1)]):
        fault = partial(
            together, partial(loss_at, epoch, step, float("nan")), partial(signal_at, epoch, 3, signal.SIGUSR1)
        )
        status, output = run(flags(out, *more), tmp_path / f"log{i}", fault=fault)
        assert status == 75 and f"left out {i + 1} of at most 2 steps" in output
    status, output = run(flags(out, *more), tmp_path / "third", fault=partial(loss_at, 2, 1, float("nan")))
    assert status == 1 and "error: non-finite loss at epoch 2 step 1" in output
