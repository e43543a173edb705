"""Locks: one holder at a time, told by name to the second; gone with their holder, however it ends."""

from __future__ import annotations

import contextlib
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
    if sys.argv[3] == "fork" and os.fork() == 0:
        time.sleep(float(sys.argv[4]))
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start_holder(tmp_path):
    """Starts a process that holds tmp_path / "lock" until its standard input ends."""
    started = []

    def start(*more: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path / "lock"), *(more or ("alone",))]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_children_do_not_keep_what_their_parent_gave_back(tmp_path, start_holder):
    holder = start_holder("fork", "60")
    holder.stdin.close()
    holder.wait(20)
    with file_lock(tmp_path / "lock", what="the tree"):
        pass


def test_waiting_takes_its_turn(tmp_path, start_holder, capsys):
    holder = start_holder()
    code = HOLDER.replace('what="the tree"', 'what="the tree", wait=True')
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path / "lock"), "alone"]
    waiting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert waiting.stderr.readline().startswith(
        b"waiting for another process: the tree is in use by process %d on " % holder.pid
    )
    holder.communicate()
    assert waiting.communicate() == (b"held\n", b"")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("wait", [False, True])
def test_without_locks_there_is_one_warning(tmp_path, monkeypatch, capsys, number, wait):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with file_lock(tmp_path / "lock", what="the tree", wait=wait):
        pass
    told = capsys.readouterr().err
    assert told.count("warning: ") == 1 == told.count("\n") and str(tmp_path / "lock") in told


def test_a_place_that_can_not_be_written_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "lock"):
        with pytest.raises(UserError, match=f"{path}: can't be written"):
            with file_lock(path, what="the tree"):
                pass
