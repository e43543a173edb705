"""Locks: gone with their holder; a file system without them is a warning."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from util.errors import UserError
from util.files import file_lock

ROOT = Path(__file__).parents[2]
HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from util.files import file_lock
with file_lock(sys.argv[2], what="the tree"):
    child = os.fork()
    if child == 0:
        time.sleep(60)
    print(child, flush=True)
    sys.stdin.read()
"""


def test_children_do_not_keep_what_their_parent_gave_back(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            holder.stdin.close()
            holder.wait(20)
            with file_lock(tmp_path / "lock", what="the tree"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_without_locks_there_is_one_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with file_lock(tmp_path / "lock", what="the tree"):
        pass
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 == told.count("\n") and str(tmp_path / "lock") in told


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "lock"):
        with pytest.raises(UserError, match=f"{path}: can't be written"):
            with file_lock(path, what="the tree"):
                pass
