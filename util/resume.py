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

# Flags of pretraining that decide what a step sees.
STEP_FLAGS = (
    "batch_size accum_iter seed input_size min_crop_ratio preload use_cache cache_size masking mask_ratio clinical_ratio"
).split()

# With another value of one of these the rest of an epoch is other samples.
CONTENT = "names, order or content of samples"
SAME_EPOCH = ("--accum_iter", "--seed", "effective batch", "samples", CONTENT)


def unchanged_since(state: Mapping[str, Any], args: Mapping[str, Any], setting: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, step) from which on the steps of a run saw what its flags and data (`Training.setting`) say now, where it
    goes on from the checkpoint `state`."""
    old = state["args"]
    same = all(key not in old or _text(old[key]) == _text(args.get(key)) for key in STEP_FLAGS)
    same = same and (state.get("threads") is None) == (setting["threads"] is None)  # CPU and GPU draw different masks
    if same and all(state.get(key) == setting[key] for key in ("world_size", "dataset_size", "samples")):
        return tuple(state.get("unchanged_since", (0, 0)))
    return state["epoch"] + 1, state["step"]


def describe_mismatch(state: Mapping[str, Any], args: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """Compare a checkpoint with the flags `args` and the `Training.setting` of the run that would go on from it.

    Returns a table old/new of what changed, "" if nothing did: the run may go on, no longer as the undisturbed one. Raises
    UserError if it would go on inside an epoch with another effective batch, accumulation, seed or data, since the rest
    of the epoch would then be other samples. The effective batch is the same set of samples for any number of ranks
    (datasets/sampler.py), so 2 ranks with batch b may go on as 1 with 2b: each sample is still seen exactly once.
    """
    old = state["args"]
    rows = [(f"--{key}", old[key], args[key]) for key in old if key in args and key not in HARMLESS_FLAGS]
    batches = [
        flags["batch_size"] * flags["accum_iter"] * world_size
        for flags, world_size in ((old, state["world_size"]), (args, setting["world_size"]))
    ]
    rows += [
        ("processes", state["world_size"], setting["world_size"]),
        ("effective batch", *batches),
        ("samples", state["dataset_size"], setting["dataset_size"]),
        (CONTENT, str(state.get("samples"))[:8], str(setting["samples"])[:8]),
    ]
    if setting["threads"] and state.get("threads"):  # on the CPU they change the last bits of sums
        rows.append(("threads", state["threads"], setting["threads"]))
    rows = [row for row in ((name, _text(was), _text(now)) for name, was, now in rows) if row[1] != row[2]]
    if state["step"] and (wrong := [row for row in rows if row[0] in SAME_EPOCH]):
        changes = ", ".join(f"{name} {was} there and {now} here" for name, was, now in wrong)
        raise UserError(
            f"the checkpoint is in the middle of epoch {state['epoch'] + 2}, and the rest of that epoch would be other "
            f"samples: {changes}; bring back what it was made with ({_order(old, state['world_size'])}, --data_path "
            f"{_text(old.get('data_path', ''))}), or --resume a checkpoint from the end of an epoch"
        )
    if not rows:
        return ""
    rows.insert(0, ("changed", "checkpoint", "now"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _order(args: Mapping[str, Any], world_size: int) -> str:
    flags = " ".join(f"--{key} {args[key]}" for key in ("batch_size", "accum_iter", "seed"))
    return f"{world_size} process(es) with {flags}"


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
