"""How many processors there are for this process."""

from __future__ import annotations

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, as seen from inside: microseconds of CPU time, in so many


def available_cpus(quota: Path = QUOTA) -> int:
    """CPUs that this process may use: a job on a shared node, or a container, has fewer than the node
    (`os.cpu_count`)."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit, period = quota.read_text().split() if quota.is_file() else ("max", "")
    return cpus if limit == "max" else min(cpus, math.ceil(int(limit) / int(period)))
