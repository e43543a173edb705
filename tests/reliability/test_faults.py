"""A number, file, disk or process goes bad: all processes stop and say why, and no checkpoint changes."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reliability_runs import (
    Run,
    assert_same_run,
    differences,
    gradient_at,
    limit_file_size,
    load,
    loss_at,
    processes_of,
    run,
    run_ranks,
    say_hash_at_end,
    signal_at,
    start_ranks,
    wait_until_gone,
)

ONE_EACH = ("--batch_size", "1")


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pth")}


@pytest.fixture
def one_epoch(flags, undisturbed, tmp_path) -> Path:
    """Output directory of an undisturbed run of two ranks that was stopped after its first epoch."""
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(undisturbed(*ONE_EACH, ranks=2) / "checkpoint-0.pth", out)
    return out


@pytest.mark.parametrize(
    "fault", [partial(loss_at, 1, 2, float("nan")), partial(gradient_at, 1, 2, float("inf"))], ids=["loss", "gradient"]
)
def test_nonfinite_number_on_one_rank_stops_all(flags, one_epoch, tmp_path, fault):
    before = contents(one_epoch)
    began = time.monotonic()
    statuses, outputs = run_ranks(flags(one_epoch, *ONE_EACH), tmp_path / "log", faults={1: fault})
    assert statuses == [1, 1] and time.monotonic() - began < 30, "\n".join(outputs)
    told = outputs[0].splitlines()[-1]
    for part in ("error: non-finite ", "epoch 1 step 2", "lr 0.000", "rank 1: losses", ".png (P300"):
        assert part in told
    assert ("nan" in told) == ("loss at" in told)
    assert contents(one_epoch) == before
    assert "Traceback" not in "".join(outputs)


def test_skipped_steps_leave_the_weights_alone_on_all_ranks(flags, one_epoch, tmp_path):
    statuses, outputs = run_ranks(
        flags(one_epoch, *ONE_EACH, "--skip_nonfinite", "1"),
        tmp_path / "log",
        faults={0: say_hash_at_end, 1: skipping_fault},
    )
    assert statuses == [0, 0], "\n".join(outputs)
    assert outputs[0].count("warning: left out 1 of at most 1 steps") == 1
    digests = {re.search("weights (.*)", output)[1] for output in outputs}
    assert len(digests) == 1  # ranks are equal, bit for bit
    assert "NaN" not in (one_epoch / "log.txt").read_text()


def skipping_fault() -> None:
    loss_at(1, 2, float("inf"))
    say_hash_at_end()


def test_full_disk_stops_all_ranks_and_leaves_the_old_files(flags, undisturbed, one_epoch, tmp_path):
    before = contents(one_epoch)
    faults = {0: partial(limit_file_size, 300_000, 1, 0)}
    statuses, outputs = run_ranks(flags(one_epoch, *ONE_EACH), tmp_path / "log", faults=faults)
    assert statuses == [1, 1], "\n".join(outputs)
    told = r"error: .*checkpoint-1\.pth: can't write the checkpoint, which needs \d{7} bytes: File too large"
    assert re.search(told, outputs[0])
    assert contents(one_epoch) == before and not list(one_epoch.glob(".tmp-*"))
    statuses, outputs = run_ranks(flags(one_epoch, *ONE_EACH), tmp_path / "again")
    assert statuses == [0, 0]
    reference = undisturbed(*ONE_EACH, ranks=2)
    for name in ("checkpoint-1.pth", "checkpoint-2.pth"):
        assert differences(load(one_epoch / name), load(reference / name)) == []


def test_undecodable_file_stops_all_ranks_and_is_named(flags, tree, tmp_path):
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns(".cache"))
    bad = broken / "files/5.png"
    bad.write_bytes(bad.read_bytes()[:-200])
    argv = flags(tmp_path / "out", *ONE_EACH, "--no_cache", "--num_workers", "1", "--data_path", str(broken))
    ranks = start_ranks(argv, tmp_path / "log")
    assert all(rank.wait(60) != 0 for rank in ranks)
    assert re.search(r"^error: .*files/5\.png", "".join(rank.output for rank in ranks), re.MULTILINE)
    for rank in ranks:
        wait_until_gone(partial(processes_of, rank.pid), 10)
    assert not list((tmp_path / "out").glob("*.pth"))


def test_a_dead_worker_ends_the_run(flags, tmp_path):
    one = Run(flags(tmp_path / "out", "--num_workers", "2", "--epochs", "1000"), tmp_path / "log")
    one.until("epoch 1/1000")
    worker = next(pid for pid in processes_of(one.pid) if pid != one.pid)
    os.kill(worker, signal.SIGKILL)
    # In words that depend on what it was doing: "DataLoader worker (pid ...) is killed", or an end of file.
    assert one.wait(60) == 1 and "Traceback" in one.output
    wait_until_gone(partial(processes_of, one.pid), 10)


def test_a_dead_rank_ends_the_others_and_the_next_start_goes_on(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    faults = {1: partial(signal_at, 1, 3, signal.SIGKILL)}
    ranks = start_ranks(flags(out, *ONE_EACH, "--num_workers", "1"), tmp_path / "log", faults=faults)
    assert ranks[1].wait() == -signal.SIGKILL
    assert ranks[0].wait(60) != 0
    for rank in ranks:
        wait_until_gone(partial(processes_of, rank.pid), 10)
    statuses, outputs = run_ranks(flags(out, *ONE_EACH), tmp_path / "again")
    assert statuses == [0, 0], "\n".join(outputs)
    assert_same_run(out, undisturbed(*ONE_EACH, ranks=2))


def test_another_model_or_batch_can_not_go_on_and_changed_options_are_told(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed(), out)
    status, output = run(flags(out, "--hog_nbins", "7"), tmp_path / "model")
    assert status == 1 and "of another model (hog_nbins 9 there, 7 here)" in output
    status, output = run(flags(out, "--epochs", "4", "--mask_ratio", "0.5"), tmp_path / "options")
    assert status == 0
    for row in (r"changed +checkpoint +now", r"--epochs +3 +4", r"--mask_ratio +0.75 +0.5"):
        assert re.search(row, output)


def test_check_data_lists_faults_and_counts_them(flags, tree, tmp_path):
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken, ignore=shutil.ignore_patterns(".cache"))
    for i in (0, 1):
        (broken / f"files/{i}.png").unlink()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(broken / "attention/6/P300R000006.png")
    argv = flags(tmp_path / "out", "--data_path", str(broken), "--check_data")
    status, output = run(argv, tmp_path / "log")
    assert status == 1
    lines = output.splitlines()
    for i in (0, 1):
        assert any(line.startswith("error:") and f"files/{i}.png" in line for line in lines)
    assert any(line.startswith("warning:") and "attention/6/P300R000006.png" in line for line in lines)
    assert lines[-1].endswith("2 errors, 1 warnings")
