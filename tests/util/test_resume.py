"""What may change between a checkpoint and the run that goes on from it, and what is told of it."""

from __future__ import annotations

import pytest
from made_checkpoints import ARGS, make_state

from util import resume
from util.errors import UserError


def describe_mismatch(
    state: dict,
    args: dict,
    *,
    world_size: int,
    dataset_size: int = 100,
    samples: str | None = None,
    threads: int | None = None,
) -> str:
    return resume.describe_mismatch(
        state, args, world_size=world_size, dataset_size=dataset_size, samples=samples, threads=threads
    )


def test_unchanged_flags_say_nothing():
    for change in ({"output_dir": "b", "num_workers": 0}, {"scale_list": (4.0, 0.5), "new_flag": 1}):
        assert describe_mismatch(make_state(3, 4), {**ARGS, **change}, world_size=1) == ""


def test_changed_hyperparameters_make_a_table():
    now = {**ARGS, "blr": 2e-3, "batch_size": 8, "epochs": 20}
    table = describe_mismatch(make_state(3), now, world_size=2)
    assert [line.split() for line in table.splitlines()] == [
        ["changed", "checkpoint", "now"],
        ["--batch_size", "4", "8"],
        ["--epochs", "10", "20"],
        ["--blr", "0.001", "0.002"],
        ["processes", "1", "2"],
        ["effective", "batch", "8", "32"],
    ]
    assert describe_mismatch(make_state(3, 4), {**ARGS, "mask_ratio": 0.5}, world_size=1) != ""


def test_inside_an_epoch_the_samples_left_must_be_the_same():
    state = make_state(3, 4)
    assert "processes" in describe_mismatch(state, {**ARGS, "batch_size": 2}, world_size=2)
    with pytest.raises(UserError, match="middle of epoch 4 .*with 2 process.* pass --batch_size 2 --acc"):
        describe_mismatch(state, ARGS, world_size=2)
    with pytest.raises(UserError, match="start 1 processes and pass --batch_size 4"):
        describe_mismatch(state, ARGS, world_size=3)
    for change in ({"seed": 1}, {"accum_iter": 1}, {"batch_size": 8}):
        with pytest.raises(UserError, match="with 1 process.* pass --batch_size 4 --accum_iter 2 --seed 0"):
            describe_mismatch(state, {**ARGS, **change}, world_size=1)
        assert describe_mismatch({**state, "step": 0}, {**ARGS, **change}, world_size=1) != ""
    with pytest.raises(UserError, match="of 100 samples, and --data_path has 101 now"):
        describe_mismatch(state, ARGS, world_size=1, dataset_size=101)
    assert "samples" in describe_mismatch({**state, "step": 0}, ARGS, world_size=1, dataset_size=101)


def test_other_samples_can_not_go_on_inside_an_epoch():
    state = {**make_state(3, 4, data_path=["A", "B"]), "samples": "a" * 64}
    assert describe_mismatch(state, ARGS, world_size=1, samples="a" * 64) == ""
    with pytest.raises(UserError, match=r"middle of epoch 4 .* other images or heatmaps now.* \(--data_path was A B\)"):
        describe_mismatch(state, ARGS, world_size=1, samples="b" * 64)
    table = describe_mismatch({**state, "step": 0}, ARGS, world_size=1, samples="b" * 64)
    assert table.splitlines()[1].split()[-3:] == ["samples", "aaaaaaaa", "bbbbbbbb"]


def test_another_number_of_threads_is_told():
    state = {**make_state(3), "threads": 2}
    table = describe_mismatch(state, ARGS, world_size=1, threads=1)
    assert table.splitlines()[1].split() == ["threads", "2", "1"]
    for now in (2, None):  # on a GPU they change nothing
        assert describe_mismatch(state, ARGS, world_size=1, threads=now) == ""
    assert describe_mismatch(make_state(3), ARGS, world_size=1, threads=1) == ""
