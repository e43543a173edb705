"""Checks of command-line options that several programs share."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from util.errors import UserError


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one, unless its help contains it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help, action.default
        if "(default" in text or default in (None, "", [], argparse.SUPPRESS) or isinstance(default, bool):
            return text
        shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{text} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """The parser of every program: no abbreviations, and no bytes that are not UTF-8, which indexes and events can't
    hold."""

    def __init__(self, prog: str | None = None, **kwargs):
        super().__init__(prog, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        for word in sys.argv[1:] if args is None else args:
            if any("\udc80" <= letter <= "\udcff" for letter in word):
                self.error(f"{word!r} is not UTF-8; rename it, or use a link to it")
        return super().parse_known_args(args, namespace)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a program that trains under torchrun, or its older names, as `util.distributed.start` takes them."""
    # fmt: off
    add = parser.add_argument_group("devices and processes (set by the launcher)").add_argument
    add("--device", default="cuda", help="cuda or cpu")
    add("--world_size", type=int, default=1, help="number of processes")
    add("--local_rank", "--local-rank", type=int, default=-1, help="index of the process on its node")
    add("--dist_url", default="env://", help="where the processes meet")
    # fmt: on


def finite_float(text: str) -> float:
    """The `type` of every number with a fraction: nan and inf pass comparisons that no use of them survives."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def seed_number(text: str) -> int:
    """The `type` of every seed: what all generators take, NumPy's, scikit-learn's and torch's."""
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not in 0 to {2**32 - 1}")
    return seed


def check_least(args: argparse.Namespace, least: float, *names: str) -> None:
    """Raises `UserError`, by the flag's name, for the first of these options that is given and below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UserError(f"--{name} {value}: must be at least {least:g}")


def check_device(device: str) -> str:
    """The device's name if it is there: cpu, or cuda or cuda:N. Raises `UserError`."""
    import torch  # the preparations share this file, and start without it

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # the latter by a torch without CUDA
        raise UserError(
            f"--device {device}: no such device here; use cpu, or cuda or cuda:N of those there are"
        ) from None
    return device


QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, as seen from inside: microseconds of CPU time, in so many


def available_cpus(quota: Path = QUOTA) -> int:
    """CPUs that this process may use: a job on a shared node, or a container, has fewer than the node
    (`os.cpu_count`)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, period = quota.read_text().split() if quota.is_file() else ("max", "")
    return cpus if limit == "max" else min(cpus, math.ceil(int(limit) / int(period)))
