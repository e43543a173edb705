"""Going on from a checkpoint exactly: what a run's state is, how it is put back, which changes can't go on.

Nothing here knows what is trained. A task calls `describe_mismatch` with the flags that shape its model,
loads its weights from `state["model"]`, and puts the rest back with `restore_optimizer` and `own_sums`;
`run_state` is the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint import FORMAT
from util.distributed import Ranks
from util.errors import UserError

# Flags, of any task, that change neither the numbers nor the order of the samples.
HARMLESS_FLAGS = frozenset(
    "output_dir log_dir device resume auto_resume start_epoch num_workers pin_mem print_every image_every "
    "save_every keep max_minutes skip_nonfinite check_data pretrained world_size local_rank dist_url "
    "use_cache cache_dir cache_size".split()
)


def run_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    epoch: int,
    step: int,
    args: Mapping[str, Any],
    sums: Tensor,
    ranks: Ranks,
    dataset_size: int,
) -> dict[str, Any]:
    """What a checkpoint holds (`util.checkpoint`). All ranks call this, since each has sums of its own.

    Args:
        model: the bare model, not its wrapper for several ranks.
        epoch: the last finished one, -1 before the first.
        step: micro-steps done in the next.
        args: the command line's options.
        sums: this rank's sums over the epoch so far, of one shape on all ranks.
        dataset_size: samples of the whole data set.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": epoch,
        "step": step,
        "args": dict(args),
        "meters": {"sums": ranks.gather(sums.tolist())},
        "world_size": ranks.world_size,
        "dataset_size": dataset_size,
        "format": FORMAT,
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, state: Mapping[str, Any]
) -> None:
    """Put back the moments and the loss scale, but not the hyper-parameters, which this command sets.

    A scale is put back from float16 to float16 only: elsewhere it stays 1 (`util.finite.make_scaler`), and
    under float16 a scale of 1 would stay too low for long.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    if state["args"]["dtype"] == "float16":
        scaler.load_state_dict(state["scaler"])


def own_sums(state: Mapping[str, Any], ranks: Ranks) -> Tensor:
    """This rank's sums over the unfinished epoch, float64; another number of ranks goes on from their mean."""
    sums = torch.tensor(state["meters"]["sums"], dtype=torch.float64)  # [ranks, ...]
    return sums[ranks.rank] if len(sums) == ranks.world_size else sums.mean(0)


def describe_mismatch(
    checkpoint: Mapping[str, Any],
    args: Mapping[str, Any],
    *,
    shape_flags: Collection[str],
    world_size: int,
    dataset_size: int,
) -> str:
    """Compare a checkpoint with the flags of the run that would go on from it.

    Returns a table old/new of the changed hyper-parameters, empty where nothing changed: the run may go
    on, no longer as the undisturbed one. Raises UserError, with the flags to use, where it can't go on:
    another architecture; or, inside an epoch, another global batch, accumulation, seed or data, since the
    rest of the epoch would then be other samples. The global batch of a step is the same set of samples for
    any number of ranks (METHOD.md section 6; datasets/sampler.py), so 2 ranks with batch b may go on as
    1 with 2b: each sample is still seen exactly once.

    Args:
        args: the flags of the run that would go on.
        shape_flags: those of the task that shape the weights: with another value the checkpoint does not fit.
        world_size: its processes.
        dataset_size: samples of its data.
    """
    old, old_world = checkpoint["args"], int(checkpoint["world_size"])
    changed = {
        key: (old[key], args[key])
        for key in old
        if key in args and key not in HARMLESS_FLAGS and _comparable(old[key]) != _comparable(args[key])
    }
    if misfits := [key for key in shape_flags if key in changed]:
        differs = ", ".join(f"--{key} is {_flag_value(changed[key][1])}" for key in misfits)
        flags = " ".join(f"--{key} {_flag_value(changed[key][0])}" for key in misfits)
        raise UserError(
            f"the checkpoint is of another model: {differs}; to go on pass {flags}, or choose "
            "another --output_dir to start anew"
        )
    if checkpoint["step"]:
        _require_same_epoch(checkpoint, args, changed, world_size)
        if checkpoint["dataset_size"] != dataset_size:
            raise UserError(
                f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of "
                f"{checkpoint['dataset_size']} samples, and --data_path has {dataset_size} now: "
                "bring back those, or --resume a checkpoint from the end of an epoch"
            )
    rows = [(f"--{key}", _flag_value(before), _flag_value(after)) for key, (before, after) in changed.items()]
    if old_world != world_size:
        rows.append(("processes", str(old_world), str(world_size)))
    before, after = _effective_batch(old, old_world), _effective_batch(args, world_size)
    if before != after:
        rows.append(("effective batch", str(before), str(after)))
    if checkpoint["dataset_size"] != dataset_size:
        rows.append(("samples", str(checkpoint["dataset_size"]), str(dataset_size)))
    if not rows:
        return ""
    rows.insert(0, ("changed", "checkpoint", "now"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _require_same_epoch(
    checkpoint: Mapping[str, Any],
    args: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    world_size: int,
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


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _flag_value(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
