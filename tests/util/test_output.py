"""A run's directory: checkpoints listed in order, the newest whole one found, pruned with care, set aside."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from made_checkpoints import write

from util.checkpoint import announce_resume, checkpoint_path, list_checkpoints, newest_checkpoint, prune
from util.distributed import Ranks
from util.errors import UserError
from util.output import RunLog, hold_output

ALONE = Ranks(0, 1, torch.device("cpu"), None)


def test_names_order_and_rule_of_saving(tmp_path):
    places = [(-1, 5), (0, 0), (8, 0), (8, 7), (8, 12), (9, 0), (10, 0), (99, 0)]
    for epoch, step in random.Random(0).sample(places, len(places)):
        checkpoint_path(tmp_path, epoch, step).touch()
    for name in ("checkpoint-x.pth", "checkpoint-3.pth.bak", "my-checkpoint-3.pth", "checkpoint-9-step.pth"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, *place) for place in reversed(places)]


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    path = write(tmp_path, 2)
    (tmp_path / "runs/a").mkdir(parents=True)
    for name in (".tmp-checkpoint-3.pth-abc", "runs/a/.tmp-best.pth-a"):
        (tmp_path / name).write_bytes(path.read_bytes()[:1000])
    for name in (".tmp-args.json-abc123", "tmp-of-mine"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path) == path
    with hold_output(tmp_path, ranks=ALONE):
        pass
    left = [".lock", "checkpoint-2.pth", "runs", "runs/a", "tmp-of-mine"]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == left


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_prune_keeps_the_ends_of_epochs_and_the_last_two(tmp_path):
    for epoch, step in ((4, 0), (6, 3), (8, 2)):
        write(tmp_path, epoch, step, size=1)
        prune(tmp_path, keep=None)
    assert names(tmp_path) == ["checkpoint-9-step2.pth", "checkpoint-7-step3.pth", "checkpoint-4.pth"]
    for epoch in (9, 14):
        write(tmp_path, epoch, size=1)
        prune(tmp_path, keep=None)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (14, 9, 4)]
    write(tmp_path, 14, 1, size=1)
    prune(tmp_path, keep=3)
    assert names(tmp_path) == ["checkpoint-15-step1.pth", "checkpoint-14.pth", "checkpoint-9.pth"]


def test_prune_never_counts_a_damaged_file(tmp_path):
    newest = [write(tmp_path, epoch, size=1) for epoch in range(4)][-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    prune(tmp_path, keep=2)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (3, 2, 1)]


def test_a_run_that_goes_back_overwrites_nothing(tmp_path):
    contents = []
    for size in (1, 2, 3):
        contents.append(write(tmp_path, 4, size=size).read_bytes())
        announce_resume("x.pth", {"epoch": 3, "step": 0}, tmp_path, ALONE, named=True)
    kept = [tmp_path / f"{'superseded-' * number}checkpoint-4.pth" for number in (1, 2, 3)]
    assert [path.read_bytes() for path in kept] == contents
    assert names(tmp_path) == []


def test_a_log_dir_is_of_one_run(tmp_path):
    a, b, logs = tmp_path / "a", tmp_path / "b", tmp_path / "logs"
    for log_dir in (logs, logs, None):
        RunLog(a, log_dir, 0).close()
    for log_dir in (logs, a):
        with pytest.raises(UserError, match=f"--log_dir {log_dir}: holds the events of the run in {a}; choose another"):
            RunLog(b, log_dir, 0)
    RunLog(b, None, 0).close()
