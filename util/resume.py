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


def unchanged_since(state: Mapping[str, Any], args: Mapping[str, Any], setting: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, step) from which on the steps of a run saw what its flags and data (`Training.setting`) say now, where it
    goes on from the checkpoint `state`."""
    old = state["args"]
    same = all(key not in old or _flag_value(old[key]) == _flag_value(args.get(key)) for key in STEP_FLAGS)
    same = same and (state.get("threads") is None) == (setting["threads"] is None)  # CPU and GPU draw different masks
    if same and all(state.get(key) == setting[key] for key in ("world_size", "dataset_size", "samples")):
        return tuple(state.get("unchanged_since", (0, 0)))
    return state["epoch"] + 1, state["step"]


def describe_mismatch(
    checkpoint: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    world_size: int,
    dataset_size: int,
    samples: str | None = None,
    threads: int | None = None,
) -> str:
    """Compare a checkpoint with the flags of the run that would go on from it.

    Returns a table old/new of the changed hyper-parameters, empty where nothing changed: the run may go
    on, no longer as the undisturbed one. Raises UserError, with the flags to use, where it would go on inside an
    epoch with another global batch, accumulation, seed or data, since the rest of the epoch would then be other
    samples. The global batch of a step is the same set of samples for any number of ranks (datasets/sampler.py), so
    2 ranks with batch b may go on as 1 with 2b: each sample is still seen exactly once.

    Args:
        args: the flags of the run that would go on.
        world_size, dataset_size: numbers of its processes and samples.
        samples: digest of the samples' names and order.
        threads: of its arithmetic on the CPU, which change the last bits of sums; None on a GPU.
    """
    old = checkpoint["args"]
    changed = {
        key: (old[key], args[key])
        for key in old
        if key in args and key not in HARMLESS_FLAGS and _flag_value(old[key]) != _flag_value(args[key])
    }
    digests = checkpoint.get("samples"), samples
    if checkpoint["step"]:
        _require_same_epoch(checkpoint, args, changed, world_size)
        _require_same_samples(checkpoint, dataset_size, other=digests[0] != digests[1])
    old_world = checkpoint["world_size"]
    rows = [(f"--{key}", was, now) for key, (was, now) in changed.items()]
    rows += [
        ("processes", old_world, world_size),
        ("effective batch", _effective_batch(old, old_world), _effective_batch(args, world_size)),
        ("samples", checkpoint["dataset_size"], dataset_size),
    ]
    if digests[0] != digests[1]:
        rows.append(("names, order or content of samples", *(str(digest)[:8] for digest in digests)))
    if threads is not None:
        rows.append(("threads", checkpoint.get("threads") or threads, threads))
    cells = [(name, _flag_value(was), _flag_value(now)) for name, was, now in rows if was != now]
    if not cells:
        return ""
    cells.insert(0, ("changed", "checkpoint", "now"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def _require_same_samples(checkpoint: Mapping[str, Any], dataset_size: int, *, other: bool) -> None:
    before = checkpoint["dataset_size"]
    where = f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of {before} samples"
    mend = "bring back those, or --resume a checkpoint from the end of an epoch"
    if before != dataset_size:
        raise UserError(f"{where}, and --data_path has {dataset_size} now: {mend}")
    if other:
        paths = _flag_value(checkpoint["args"].get("data_path", "what it was"))
        raise UserError(
            f"{where}, and --data_path holds other images or heatmaps now, in another order, or cached otherwise "
            f"(--data_path was {paths}): {mend}"
        )


def _require_same_epoch(
    checkpoint: Mapping[str, Any], args: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]], world_size: int
) -> None:
    old, old_world = checkpoint["args"], int(checkpoint["world_size"])
    global_batch = old["batch_size"] * old_world
    same = (
        global_batch == args["batch_size"] * world_size
        and old["accum_iter"] == args["accum_iter"]
        and "seed" not in changed
    )
    if same:
        return
    flags = f"--accum_iter {old['accum_iter']} --seed {old['seed']}"
    if global_batch % world_size == 0:
        flags = f"--batch_size {global_batch // world_size} {flags}"
        hint = f"with {world_size} process(es) pass {flags}"
    else:
        hint = f"start {old_world} processes and pass --batch_size {old['batch_size']} {flags}"
    raise UserError(
        f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of a run with {old_world} "
        f"process(es), {_order_flags(old)}; with {world_size} process(es), {_order_flags(args)} the rest of "
        f"that epoch would be other samples: {hint}, or --resume a checkpoint from the end of an epoch"
    )


def _order_flags(args: Mapping[str, Any]) -> str:
    return " ".join(f"--{key} {args[key]}" for key in ("batch_size", "accum_iter", "seed"))


def _effective_batch(args: Mapping[str, Any], world_size: int) -> int:
    return args["batch_size"] * args["accum_iter"] * world_size


def _flag_value(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
