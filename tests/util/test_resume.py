"""What may change between a checkpoint and the run that goes on from it, and what is printed about it."""

from __future__ import annotations

import pytest
from made_checkpoints import ARGS, make_state

from util import resume
from util.errors import UserError

SETTING = {"world_size": 1, "dataset_size": 100, "samples": None, "threads": None}


def describe_mismatch(state: dict, args: dict, **setting) -> str:
    return resume.describe_mismatch(state, args, {**SETTING, **setting})


def test_unchanged_flags_say_nothing():
    for change in ({"output_dir": "b", "num_workers": 0}, {"scale_list": (4.0, 0.5), "new_flag": 1}):
        assert describe_mismatch(make_state(3, 4), {**ARGS, **change}) == ""


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
    assert describe_mismatch(make_state(3, 4), {**ARGS, "mask_ratio": 0.5}) != ""


@pytest.mark.parametrize(
    ("change", "setting", "message"),
    [
        ({}, {"world_size": 2}, "effective batch 8 there and 16 here"),
        ({"batch_size": 8}, {}, "effective batch 8 there and 16 here"),
        ({"seed": 1}, {}, "--seed 0 there and 1 here"),
        ({"batch_size": 8, "accum_iter": 1}, {}, "--accum_iter 2 there and 1 here"),
        ({}, {"dataset_size": 101}, "samples 100 there and 101 here"),
        ({}, {"samples": "b" * 64}, "names, order or content of samples aaaaaaaa there and bbbbbbbb here"),
    ],
)
def test_inside_an_epoch_the_samples_left_must_be_the_same(change, setting, message):
    """As `resumed from ...: epoch 5` says it: epochs are counted from 1 in what is printed."""
    state = {**make_state(3, 4, data_path=["A", "B"]), "samples": "a" * 64}
    setting = {"samples": "a" * 64, **setting}
    with pytest.raises(UserError, match=f"in the middle of epoch 5, .*: {message}") as error:
        describe_mismatch(state, {**ARGS, **change}, **setting)
    assert "1 process(es) with --batch_size 4 --accum_iter 2 --seed 0, --data_path A B" in str(error.value)
    assert message.split()[0] in describe_mismatch({**state, "step": 0}, {**ARGS, **change}, **setting)
    assert "processes" in describe_mismatch(state, {**ARGS, "batch_size": 2}, samples="a" * 64, world_size=2)


def test_another_number_of_threads_is_in_the_table():
    state = {**make_state(3), "threads": 2}
    assert describe_mismatch(state, ARGS, threads=1).splitlines()[1].split() == ["threads", "2", "1"]
    for now in (2, None):  # on a GPU they change nothing
        assert describe_mismatch(state, ARGS, threads=now) == ""
