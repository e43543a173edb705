"""A run's directory: checkpoints listed in order, the newest whole one found, pruned with care, set aside."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from made_checkpoints import write

from util.checkpoint import checkpoint_path, is_due, list_checkpoints, newest_checkpoint, prune, set_aside_newer
from util.distributed import Ranks
from util.errors import UserError
from util.output import hold_output

ALONE = Ranks(0, 1, 0, torch.device("cpu"), None)


def test_names_order_and_rule_of_saving(tmp_path):
    assert checkpoint_path("d", 7, 0) == Path("d/checkpoint-7.pth")
    assert checkpoint_path("d", 7, 30) == Path("d/checkpoint-8-step30.pth")
    assert checkpoint_path("d", -1, 5) == Path("d/checkpoint-0-step5.pth")
    places = [(-1, 5), (0, 0), (8, 0), (8, 7), (8, 12), (9, 0), (10, 0), (99, 0)]
    for epoch, step in random.Random(0).sample(places, len(places)):
        checkpoint_path(tmp_path, epoch, step).touch()
    for name in ("checkpoint-x.pth", "checkpoint-3.pth.bak", "my-checkpoint-3.pth", "checkpoint-9-step.pth"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, *place) for place in reversed(places)]
    assert [epoch for epoch in range(12) if is_due(epoch, save_every=5, epochs=12)] == [4, 9, 11]


def test_a_log_dir_is_of_one_run(tmp_path):
    a, b, logs = tmp_path / "a", tmp_path / "b", tmp_path / "logs"

    def refused(*directories: Path) -> str:
        with pytest.raises(UserError) as error, hold_output(*directories, ranks=ALONE):
            pass
        return str(error.value)

    with hold_output(a, logs, ranks=ALONE):
        assert refused(b, logs).startswith(f"--log_dir {logs} is in use by process {os.getpid()}")
    with hold_output(a, ranks=ALONE):  # a has no log_dir of its own any more
        pass
    assert refused(b, logs) == f"--log_dir {logs}: holds the events of the run in {a}; choose another"
    assert refused(b, a) == f"--log_dir {a}: holds the events of the run in {a}; choose another"
    with hold_output(a, logs, ranks=ALONE):
        pass
    a.rename(tmp_path / "moved")
    with hold_output(b, logs, ranks=ALONE):
        pass


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    path = write(tmp_path, 2)
    (tmp_path / "runs/a").mkdir(parents=True)
    for name in (
        ".tmp-checkpoint-3.pth-abc",
        ".tmp-best.pth-a",
        "runs/a/.tmp-checkpoint.pth-a",
        "runs/a/.tmp-best.pth-a",
    ):
        (tmp_path / name).write_bytes(path.read_bytes()[:1000])
    (tmp_path / ".tmp-args.json-abc123").touch()
    assert newest_checkpoint(tmp_path) == path
    with hold_output(tmp_path, ranks=ALONE):
        pass
    left = [".lock", ".run", ".tmp-args.json-abc123", "checkpoint-2.pth", "runs", "runs/a"]
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == left


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_prune_keeps_milestones_and_the_last_two(tmp_path):
    for epoch in range(12):
        write(tmp_path, epoch, size=1)
        prune(tmp_path, save_every=5)
        assert checkpoint_path(tmp_path, epoch, 0).exists()
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (11, 10, 9, 4)]
    write(tmp_path, 11, 4, size=1)
    prune(tmp_path, save_every=5)
    assert names(tmp_path)[:3] == ["checkpoint-12-step4.pth", "checkpoint-11.pth", "checkpoint-9.pth"]
    write(tmp_path, 12, size=1)
    write(tmp_path, 13, size=1)
    deleted = prune(tmp_path, save_every=5)
    assert [path.name for path in deleted] == ["checkpoint-12-step4.pth", "checkpoint-11.pth"]
    prune(tmp_path, save_every=5, keep=3)
    assert names(tmp_path) == ["checkpoint-13.pth", "checkpoint-12.pth", "checkpoint-9.pth"]


def test_prune_never_counts_a_damaged_file_nor_deletes_a_foreign_one(tmp_path):
    for epoch in range(5):
        write(tmp_path, epoch, size=1)
    newest = checkpoint_path(tmp_path, 4, 0)
    damaged = bytearray(newest.read_bytes())
    damaged[100] ^= 1
    newest.write_bytes(damaged)
    torch.save({"model": {}}, tmp_path / "checkpoint-0.pth")
    kept_elsewhere = write(tmp_path, 7, size=1).rename(tmp_path / "elsewhere.pth")
    checkpoint_path(tmp_path, 1, 0).unlink()
    checkpoint_path(tmp_path, 1, 0).symlink_to(kept_elsewhere)
    checkpoint_path(tmp_path, 5, 0).mkdir()  # can't be read
    assert prune(tmp_path, save_every=50, keep=2) == []
    assert [path.name for path in prune(tmp_path, save_every=50, keep=1)] == ["checkpoint-2.pth"]
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (5, 4, 3, 1, 0)]


def test_what_was_kept_for_good_stays_whatever_the_options_are_now(tmp_path):
    for epoch in range(10):
        write(tmp_path, epoch, size=1, save_every=2, keep=None)
        prune(tmp_path, save_every=2)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (9, 8, 7, 5, 3, 1)]
    for epoch in (10, 11):
        write(tmp_path, epoch, size=1, save_every=50, keep=None)
        prune(tmp_path, save_every=50)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (11, 10, 9, 7, 5, 3, 1)]
    for epoch in (12, 13):
        write(tmp_path, epoch, size=1, save_every=2, keep=1)
        prune(tmp_path, save_every=2, keep=1)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (13, 9, 7, 5, 3, 1)]
    # Made to be kept as the last one only: not for good, though its epoch would be now.
    write(tmp_path, 14, size=1, save_every=50, keep=None)
    prune(tmp_path, save_every=50, keep=1)
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (14, 9, 7, 5, 3, 1)]


def test_superseded_files_are_never_overwritten(tmp_path):
    contents = []
    for size in (1, 2, 3):
        contents.append(write(tmp_path, 4, size=size).read_bytes())
        set_aside_newer(tmp_path, epoch=3, step=0)
    kept = [tmp_path / f"superseded-{number}checkpoint-4.pth" for number in ("", "2-", "3-")]
    assert [path.read_bytes() for path in kept] == contents
    assert names(tmp_path) == []
