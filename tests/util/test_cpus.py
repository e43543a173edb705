"""util/cli.py: as many processors as the process may use."""

import os

import pytest

from util.cli import available_cpus


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("9900000 100000", 99)]
)
def test_the_quota_of_a_container_counts(tmp_path, text, most):
    quota = tmp_path / "cpu.max"
    quota.write_text(text + "\n")
    allowed = len(os.sched_getaffinity(0))
    assert available_cpus(quota) == (allowed if most is None else min(allowed, most))
