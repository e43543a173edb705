"""Going on from a checkpoint exactly: what a run's state is, how it is put back, which changes can't go on.

Nothing here knows what is trained. A task calls `describe_mismatch` with the flags that shape its model,
loads its weights from `state["model"]`, and puts the rest back with `restore_optimizer` and `sums_of_rank`;
`run_state` is the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from util.checkpoint import FORMAT
from util.distributed import Ranks
from util.errors import UserError
from util.finite import FiniteWatch

# Flags, of any task, that change neither the numbers nor the order of the samples.
HARMLESS_FLAGS = frozenset(
    "output_dir log_dir device resume auto_resume start_epoch num_workers pin_mem print_every image_every "
    "save_every keep max_minutes skip_nonfinite check_data pretrained world_size local_rank dist_url "
    "cache_dir".split()
)


@dataclass(frozen=True)
class Setting:
    """On what a run's numbers depend beside its flags.

    Attributes:
        world_size: number of processes.
        dataset_size: number of samples.
        samples: digest of the samples' names and order; None where it isn't known.
        threads: of this process's arithmetic on the CPU, which change the last bits of sums; None on a GPU.
    """

    world_size: int
    dataset_size: int
    samples: str | None = None
    threads: int | None = None

    @classmethod
    def of(cls, ranks: Ranks, dataset_size: int, samples: str | None) -> Setting:
        """This process's setting."""
        threads = torch.get_num_threads() if ranks.device.type == "cpu" else None
        return cls(ranks.world_size, dataset_size, samples, threads)

    @classmethod
    def in_checkpoint(cls, state: Mapping[str, Any]) -> Setting:
        """That of the run that wrote a checkpoint; an older program's tells neither samples nor threads."""
        return cls(int(state["world_size"]), state["dataset_size"], state.get("samples"), state.get("threads"))


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
    samples: str | None = None,
    watch: FiniteWatch | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds (`util.checkpoint`). All ranks call this, since each has sums of its own.

    Args:
        model: the bare model, not its wrapper for several ranks.
        epoch: the last finished one, -1 before the first.
        step: micro-steps done in the next.
        args: the command line's options.
        sums: this rank's sums over the epoch so far, of one shape on all ranks.
        dataset_size, samples: number of samples, and the digest of their names and order where it is known.
        watch: counts what was left out so far.
    """
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "watch": {} if watch is None else watch.state_dict(),
        "epoch": epoch,
        "step": step,
        "args": dict(args),
        "meters": {"sums": ranks.gather(sums.tolist())},
        **asdict(Setting.of(ranks, dataset_size, samples)),
        "format": FORMAT,
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: Mapping[str, Any],
    watch: FiniteWatch | None = None,
) -> None:
    """Put back moments, loss scale and the count of what was left out, but not the optimiser's
    hyper-parameters, which this command sets.

    A scale is put back from float16 to float16 only: elsewhere it stays 1 (`util.finite.make_scaler`), and
    under float16 a scale of 1 would stay too low for long.
    """
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    if state["args"]["dtype"] == "float16":
        scaler.load_state_dict(state["scaler"])
    if watch is not None:
        watch.load_state_dict(state.get("watch", {}))


def sums_of_rank(state: Mapping[str, Any], ranks: Ranks) -> Tensor:
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
    samples: str | None = None,
    threads: int | None = None,
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
        world_size, dataset_size, samples, threads: its `Setting`.
    """
    old, before = checkpoint["args"], Setting.in_checkpoint(checkpoint)
    setting = Setting(world_size, dataset_size, samples, threads)
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
    other_samples = None not in (before.samples, setting.samples) and before.samples != setting.samples
    if checkpoint["step"]:
        _require_same_epoch(checkpoint, args, changed, world_size)
        _require_same_samples(checkpoint, before, setting, other_samples)
    rows = [(f"--{key}", _flag_value(was), _flag_value(now)) for key, (was, now) in changed.items()]
    if before.world_size != world_size:
        rows.append(("processes", str(before.world_size), str(world_size)))
    batches = _effective_batch(old, before.world_size), _effective_batch(args, world_size)
    if batches[0] != batches[1]:
        rows.append(("effective batch", *map(str, batches)))
    if before.dataset_size != setting.dataset_size:
        rows.append(("samples", str(before.dataset_size), str(setting.dataset_size)))
    elif other_samples:
        rows.append(("names or order of samples", before.samples[:8], setting.samples[:8]))
    if None not in (before.threads, setting.threads) and before.threads != setting.threads:
        rows.append(("threads", str(before.threads), str(setting.threads)))
    if not rows:
        return ""
    rows.insert(0, ("changed", "checkpoint", "now"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _require_same_samples(
    checkpoint: Mapping[str, Any], before: Setting, setting: Setting, other_samples: bool
) -> None:
    where = f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of {before.dataset_size} samples"
    mend = "bring back those, or --resume a checkpoint from the end of an epoch"
    if before.dataset_size != setting.dataset_size:
        raise UserError(f"{where}, and --data_path has {setting.dataset_size} now: {mend}")
    if other_samples:
        paths = _flag_value(checkpoint["args"].get("data_path", "what it was"))
        raise UserError(
            f"{where}, and --data_path holds others now, or those in another order (--data_path was {paths}): {mend}"
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


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _flag_value(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
