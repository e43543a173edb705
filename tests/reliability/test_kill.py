"""kill -9 in every part of a save and at random moments: what is left is whole, the run goes on as ever."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from reliability_runs import (
    Run,
    assert_same_run,
    kill_in_save,
    log_lines,
    processes_of,
    run,
    start_ranks,
    wait_until_gone,
)

from util.checkpoint import list_checkpoints, newest_checkpoint, verify_archive
from util.errors import UserError

# (boundary, whether the new file is there afterwards, whether a temporary file is left)
BOUNDARIES = [
    ("before write", False, True),
    ("in write", False, True),
    ("before fsync", False, True),
    ("after fsync", False, True),
    ("before rename", False, True),
    ("after rename", True, False),
    ("after directory fsync", True, False),
    ("before prune", True, False),
    ("after unlink", True, False),
    ("after prune", True, False),
]


@pytest.fixture(scope="module")
def long_flags(flags):
    return lambda out: flags(out, "--epochs", "8", "--batch_size", "6", "--keep", "2")


@pytest.fixture(scope="module")
def long_undisturbed(undisturbed):
    return undisturbed("--epochs", "8", "--batch_size", "6", "--keep", "2")


def test_kill_at_every_boundary_of_a_save(long_flags, long_undisturbed, tmp_path):
    """One run, killed in ten ways one after the other, the saves that it lost done again in between."""
    out = tmp_path / "out"
    done = 0  # epochs with a whole checkpoint
    for boundary, there, temporary in BOUNDARIES:
        # From the third on, there is something to prune.
        name = f"checkpoint-{max(done, 2)}.pth"
        fault = partial(kill_in_save, boundary, name)
        status, output = run(long_flags(out), tmp_path / f"log-{boundary}", fault=fault)
        assert status == -signal.SIGKILL, f"{boundary}:\n{output}"
        assert (out / name).exists() == there, boundary
        assert bool(list(out.glob(".tmp-checkpoint-*"))) == temporary, boundary
        for path in list_checkpoints(out):
            verify_archive(path)
        done = max(done, 2) + there
        assert newest_checkpoint(out).name == f"checkpoint-{done - 1}.pth"
        assert [line["epoch"] for line in log_lines(out)] == list(range(max(done, len(log_lines(out)))))
    status, output = run(long_flags(out), tmp_path / "log")
    assert status == 0, output
    assert_same_run(out, long_undisturbed)


def test_damaged_newest_is_named_and_the_older_one_used(long_flags, long_undisturbed, tmp_path):
    for how in ("truncated", "flipped"):
        out = tmp_path / how
        shutil.copytree(long_undisturbed, out)
        newest, older = list_checkpoints(out)
        whole = newest.read_bytes()
        half = len(whole) // 2
        newest.write_bytes(
            whole[:half] if how == "truncated" else whole[:half] + bytes([whole[half] ^ 4]) + whole[half + 1 :]
        )
        (out / "log.txt").write_text((out / "log.txt").read_text()[:-40])  # and half a line
        status, output = run(long_flags(out), tmp_path / f"log-{how}")
        assert status == 0, output
        assert f"{newest}: {'truncated' if how == 'truncated' else 'damaged'}" in output
        assert f"resumed from {older}" in output
        assert newest.read_bytes() != whole[:half]
        assert_same_run(out, long_undisturbed)
    for path in list_checkpoints(out):
        path.write_bytes(path.read_bytes()[:-1])
    status, output = run(long_flags(out), tmp_path / "log-none")
    assert status == 1 and "no checkpoint in" in output and "Traceback" not in output


def test_resume_of_an_older_one_sets_the_newer_aside(long_flags, long_undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(long_undisturbed, out)
    status, output = run([*long_flags(out), "--resume", str(out / "checkpoint-6.pth")], tmp_path / "log")
    assert status == 0, output
    assert "superseded-checkpoint-7.pth" in output
    verify_archive(out / "superseded-checkpoint-7.pth")
    (out / "superseded-checkpoint-7.pth").unlink()
    assert_same_run(out, long_undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_kills_at_random_moments(flags, undisturbed, tmp_path, ranks):
    """kill -9 of a random rank, from its start-up to its end; 50 kills over as many runs as that takes."""
    more = ("--epochs", "12", "--batch_size", "2", "--num_workers", "2", "--keep", "2")
    reference = undisturbed(*more, ranks=ranks)
    generator = random.Random(ranks)
    kills, runs, resumed_from = 0, 0, []
    out = tmp_path / "out"

    def start(name: str) -> list[Run]:
        log = tmp_path / name
        return [Run(flags(out, *more), log)] if ranks == 1 else start_ranks(flags(out, *more), log, n=ranks)

    def finish(started: list[Run]) -> None:
        assert [one.wait() for one in started] == [0] * ranks, "\n".join(one.output for one in started)
        assert_same_run(out, reference)
        shutil.rmtree(out)

    while kills < 50:
        started = start(f"log{runs}-{kills}")
        victim = generator.choice(started)
        # Long enough for a few epochs however slow the machine is: a moment after a random line.
        line = f"epoch {len(log_lines_or_none(out)) + generator.randint(0, 4)}/"
        until = time.monotonic() + 60
        while line not in started[0].output and victim.process.is_alive() and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.3))
        if not victim.process.is_alive():
            finish(started)
            runs += 1
            continue
        os.kill(victim.pid, signal.SIGKILL)
        kills += 1
        for one in started:  # the other rank must not linger
            one.wait(60)
            wait_until_gone(partial(processes_of, one.pid), 60)
        resumed_from.append(newest_or_none(out))
    finish(start("last"))
    print(
        f"{ranks} rank(s): {kills} kills over {runs + 1} runs, resumed from {len(set(resumed_from))} "
        f"distinct points ({resumed_from.count(None)} times from none), all equal to the undisturbed run"
    )


def log_lines_or_none(out: Path) -> list[dict]:
    return log_lines(out) if (out / "log.txt").exists() and newest_or_none(out) else []


def newest_or_none(out: Path) -> str | None:
    """The newest checkpoint; a damaged one fails the test, since a kill must never leave one."""
    for path in list_checkpoints(out):
        verify_archive(path)
    try:
        newest = newest_checkpoint(out) if out.exists() else None
    except UserError as error:
        raise AssertionError(str(error)) from error
    return newest.name if newest else None
