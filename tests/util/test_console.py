"""Output that nobody reads."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
from util import errors
errors.PATIENCE_SECONDS = 0.2
errors.make_output_unfailing()
for _ in range(300):
    print("x" * 997)
    errors.write_now("y" * 100)
"""


def test_a_terminal_that_nobody_reads_costs_text_and_no_time():
    """It counts as ready with room for one byte, and an ordinary write of a line would wait there for ever."""
    terminal, other_end = pty.openpty()
    try:
        command = [sys.executable, "-c", PROGRAM]
        program = subprocess.run(command, cwd=ROOT, stdout=other_end, stderr=other_end, timeout=20, check=False)
        assert program.returncode == 0
        assert os.read(terminal, 100) == b"x" * 100
    finally:
        os.close(terminal)
        os.close(other_end)
