"""How many processors there are for this process."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """CPUs that this process may use: a job on a shared node has fewer than the node (`os.cpu_count`)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
