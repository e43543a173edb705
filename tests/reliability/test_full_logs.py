"""Records that can't be written: one line at the start, a warning later, and the run is saved all the same."""

from __future__ import annotations

import contextlib
import errno
import os
from functools import partial
from pathlib import Path

import pytest
from reliability_runs import at_step, differences, load, log_lines, run


def fail_log_writes(epoch: int, step: int, until: int | None = None) -> None:
    """From a step on, to another epoch's if there is one, log.txt and TensorBoard's events meet a full disk."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    import util.output

    full = []
    at_step(epoch, step, partial(full.append, True))
    if until is not None:
        at_step(until, 0, full.clear)
    real_write = util.output.atomic_write

    def unless_full(original):
        def write(self, *args, **kwargs):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(self, *args, **kwargs)

        return write

    @contextlib.contextmanager
    def atomic_write(path, *args):
        if full and Path(path).name == "log.txt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with real_write(path, *args) as file:
            yield file

    for name in ("write", "append"):
        setattr(gfile.LocalFileSystem, name, unless_full(getattr(gfile.LocalFileSystem, name)))
    util.output.atomic_write = atomic_write


def test_a_disk_that_runs_full_under_the_logs_is_a_warning(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, output = run(flags(out), tmp_path / "log", fault=partial(fail_log_writes, 0, 3))
    assert status == 0, output
    told = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert f"{out}: can't be written: No space left on device; training continues, points are missing" in told[0]
    assert all(f"{out / 'log.txt'}: can't be written: No space left on device" in line for line in told[1:])
    assert "Traceback" not in output
    reference = undisturbed() / "checkpoint-2.pth"
    assert differences(load(out / "checkpoint-2.pth"), load(reference)) == []


def test_log_lines_wait_for_room(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, output = run(flags(out), tmp_path / "log", fault=partial(fail_log_writes, 0, 3, 2))
    assert status == 0, output
    assert log_lines(out) == log_lines(undisturbed())


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("args.json", "{ broken", "args.json: can't be read as the list"),
        ("log.txt", None, "log.txt: can't be written: Is a directory"),
        (".lock", None, ".lock: can't be written: Is a directory"),
    ],
)
def test_what_can_not_be_read_or_written_at_the_start_is_one_line(flags, tmp_path, name, text, told):
    out = tmp_path / "out"
    out.mkdir()
    if text is None:
        (out / name).mkdir()
    else:
        (out / name).write_text(text)
    status, output = run(flags(out), tmp_path / "log")
    assert status == 1 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: ") and told in output.splitlines()[-1]
    if text is not None:
        assert (out / name).read_text() == text
