"""Which changes since a checkpoint a run can't go on with, and which it should know of.

Nothing here knows what is trained; `util.training` puts the rest of a checkpoint back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from util.errors import UserError

# Flags, of any task, that change neither the numbers nor the order of the samples.
HARMLESS_FLAGS = frozenset(
    "output_dir log_dir device resume auto_resume start_epoch num_workers pin_mem print_every image_every "
    "save_every keep max_minutes skip_nonfinite check_data pretrained world_size local_rank dist_url "
    "cache_dir".split()
)

CONTENT = "number, names, order or content of samples"
# With another value of one of these the rest of an epoch is other samples.
SAME_EPOCH = {"--accum_iter", "--seed", "effective batch", CONTENT}
# What decides what a step of pretraining sees.
STEP_CHANGES = {"processes", CONTENT} | set(
    "--batch_size --accum_iter --seed --input_size --min_crop_ratio --preload --use_cache --cache_size --masking "
    "--mask_ratio --clinical_ratio".split()
)


def changes(
    state: Mapping[str, Any], args: Mapping[str, Any], setting: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """What differs between a checkpoint and the flags `args` and `Training.setting` of the run that would go on from it:
    name -> text of old and new.

    The effective batch is the same set of samples for any number of ranks (datasets/sampler.py), so 2 ranks with batch b
    may go on as 1 with 2b: each sample is still seen exactly once.
    """
    old = state["args"]
    both = {f"--{key}": (old[key], args[key]) for key in old if key in args and key not in HARMLESS_FLAGS}
    both["processes"] = state["world_size"], setting["world_size"]
    both["effective batch"] = tuple(
        flags["batch_size"] * flags["accum_iter"] * processes
        for flags, processes in zip((old, args), both["processes"], strict=True)
    )
    both[CONTENT] = str(state.get("samples"))[:8], str(setting["samples"])[:8]
    both["CPU threads"] = state.get("threads"), setting["threads"]  # they change the last bits of sums; None: on a GPU
    texts = {name: (as_text(was), as_text(now)) for name, (was, now) in both.items()}
    return {name: (was, now) for name, (was, now) in texts.items() if was != now}


def unchanged_since(state: Mapping[str, Any], changed: Mapping[str, tuple[str, str]]) -> tuple[int, int]:
    """(epoch, step) from which on the steps of a run saw what its flags and data say now, where it goes on from the
    checkpoint `state` with these `changes`."""
    if STEP_CHANGES & changed.keys() or "None" in changed.get("CPU threads", ()):  # CPU and GPU draw different masks
        return state["epoch"] + 1, state["step"]
    return tuple(state.get("unchanged_since", (0, 0)))


def describe_changes(state: Mapping[str, Any], changed: Mapping[str, tuple[str, str]]) -> str:
    """A table of `changes`, "" if there are none: the run may go on, no longer as the undisturbed one.

    Raises UserError if it would go on inside an epoch with another effective batch, accumulation, seed or data, since the
    rest of the epoch would then be other samples.
    """
    if state["step"] and SAME_EPOCH & changed.keys():
        told = ", ".join(f"{name} {was} there and {now} here" for name, (was, now) in changed.items())
        raise UserError(
            f"the checkpoint is in the middle of epoch {state['epoch'] + 2}, and the rest of that epoch would be other "
            f"samples: {told}; bring back what it was made with, or --resume a checkpoint from the end of an epoch"
        )
    if not changed:
        return ""
    rows = [("changed", "checkpoint", "now"), *((name, was, now) for name, (was, now) in changed.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_text(value: Any) -> str:
    """An option's value as it is printed and compared: a list and a tuple of the same values are equal."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
