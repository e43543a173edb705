"""What may change between a checkpoint and the run that goes on from it, and what is printed about it."""

from __future__ import annotations

import pytest
from made_checkpoints import ARGS, make_state

from util.errors import UserError
from util.resume import changes, describe_changes, unchanged_since

SETTING = {"world_size": 1, "samples": "a" * 64, "threads": 2}
SAVED = {"samples": "a" * 64, "threads": 2, "unchanged_since": [2, 0]}


def going_on(step: int, args: dict, **setting) -> tuple[str, tuple[int, int]]:
    """The table that is printed, and from where on the run saw what it sees now."""
    state = make_state(3, step) | SAVED
    changed = changes(state, ARGS | args, SETTING | setting)
    return describe_changes(state, changed), unchanged_since(state, changed)


def test_unchanged_flags_say_nothing():
    for change in ({"output_dir": "b", "num_workers": 0}, {"scale_list": (4.0, 0.5), "new_flag": 1}):
        assert going_on(4, change) == ("", (2, 0))


@pytest.mark.parametrize("step", [0, 4])
def test_changes_are_a_table_and_those_of_samples_are_refused_inside_an_epoch(step):
    for args, setting, row in [
        ({"epochs": 20}, {}, ["--epochs", "10", "20"]),
        ({}, {"threads": 1}, ["CPU", "threads", "2", "1"]),
    ]:
        table, since = going_on(step, args, **setting)
        assert [line.split() for line in table.splitlines()] == [["changed", "checkpoint", "now"], row]
        assert since == (2, 0)
    for args, setting in [({"mask_ratio": 0.5}, {}), ({}, {"threads": None}), ({"batch_size": 2}, {"world_size": 2})]:
        table, since = going_on(step, args, **setting)
        assert table and since == (4, step)
    for args, setting, message in [
        ({}, {"world_size": 2}, "effective batch 8 there and 16 here"),
        ({"batch_size": 8}, {}, "--batch_size 4 there and 8 here, effective batch 8 there and 16 here"),
        ({"seed": 1}, {}, "--seed 0 there and 1 here"),
        ({"batch_size": 8, "accum_iter": 1}, {}, "--accum_iter 2 there and 1 here"),
        ({}, {"samples": "b" * 64}, "names, order or content of samples aaaaaaaa there and bbbbbbbb here"),
    ]:
        if step:  # as `resumed from ...: epoch 5` says it: epochs are counted from 1 in what is printed
            with pytest.raises(UserError, match=f"in the middle of epoch 5, .*: .*{message}"):
                going_on(step, args, **setting)
        else:
            table, since = going_on(step, args, **setting)
            assert message.split()[0] in table and since == (4, 0)
