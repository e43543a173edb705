"""Records that can't be written: one line at the start, a warning later, and the run is saved all the same."""

from __future__ import annotations

import errno
import json
import os
from functools import partial
from pathlib import Path

import pytest
from reliability_runs import at_step, differences, load, log_lines, obey_permissions, run, run_ranks


def fail_log_writes(epoch: int, step: int, until: int | None = None) -> None:
    """From a step on, to another epoch's if there is one, log.txt and TensorBoard's events meet a full disk."""
    from tensorboard.compat.tensorflow_stub.io import gfile

    import util.output

    full = []
    at_step(epoch, step, partial(full.append, True))
    if until is not None:
        at_step(until, 0, full.clear)
    real_open = open

    def unless_full(original):
        def write(self, *args, **kwargs):
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(self, *args, **kwargs)

        return write

    def open_file(path, mode="r", *args, **kwargs):
        # A real full device behind the name: the kernel itself refuses the bytes.
        return real_open("/dev/full" if full and mode == "ab" else path, mode, *args, **kwargs)

    for name in ("write", "append"):
        setattr(gfile.LocalFileSystem, name, unless_full(getattr(gfile.LocalFileSystem, name)))
    util.output.open = open_file


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_runs_full_under_the_logs_is_a_warning(flags, undisturbed, tmp_path, ranks):
    out, more = tmp_path / "out", ("--batch_size", str(2 // ranks))
    fault = partial(fail_log_writes, 0, 3)
    if ranks == 1:
        status, output = run(flags(out, *more), tmp_path / "log", fault=fault)
    else:
        (status, _), (output, _) = run_ranks(flags(out, *more), tmp_path / "log", faults={0: fault})
    assert status == 0, output
    told = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(told) == 3, output
    assert f"{out}: can't be written: No space left on device; training goes on, points are missing" in told[0]
    assert f"{out / 'log.txt'}: can't be written: No space left on device" in told[1]
    assert told[2].endswith("lacks the lines of the epochs 0, 1, 2")
    assert "Traceback" not in output
    reference = undisturbed(*more, ranks=ranks) / "checkpoint-2.pth"
    assert differences(load(out / "checkpoint-2.pth"), load(reference)) == []


def test_log_lines_wait_for_room(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    status, output = run(flags(out), tmp_path / "log", fault=partial(fail_log_writes, 0, 3, 2))
    assert status == 0 and "lacks the lines" not in output, output
    assert log_lines(out) == log_lines(undisturbed())


def test_a_log_dir_that_runs_full_for_real_does_not_end_training(flags, tmp_path):
    """Every file that grows beyond 20 kB is refused by the kernel; checkpoints go where that is not so."""
    out = tmp_path / "out"
    argv = flags(out, "--log_dir", str(tmp_path / "logs"), "--epochs", "30", "--save_every", "30", "--print_every", "1")
    status, output = run(argv, tmp_path / "log", fault=small_events)
    assert status == 0 and (out / "checkpoint-29.pth").exists(), output
    assert f"warning: {tmp_path / 'logs'}: can't be written: File too large" in output
    assert len(log_lines(out)) == 30 and "Traceback" not in output


def small_events() -> None:
    import resource
    import signal

    from tensorboard.compat.tensorflow_stub.io import gfile

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    real = gfile.LocalFileSystem.append

    def append(self, *args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))
        try:
            return real(self, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    gfile.LocalFileSystem.append = append


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("args.json", "{ broken", "args.json: can't be read as the list of a run's starts"),
        ("args.json", '{"epochs": 3}', "args.json: can't be read as the list of a run's starts (not a list)"),
        ("args.json", "\udcff", "args.json: can't be read as the list of a run's starts"),
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
        (out / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    status, output = run(flags(out), tmp_path / "log")
    assert status == 1 and "Traceback" not in output, output
    assert output.splitlines()[-1].startswith("error: ") and told in output.splitlines()[-1]
    if text is not None:
        assert (out / name).read_bytes() == text.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("flag", ["output_dir", "log_dir"])
def test_a_directory_without_leave_to_write_is_one_line(flags, tmp_path, flag):
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    argv = flags(tmp_path / "out", f"--{flag}", str(place))
    status, output = run(argv, tmp_path / "log", fault=obey_permissions)
    assert status == 1 and "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert last.startswith("error: ") and str(place) in last and "Permission denied" in last


def test_half_a_log_line_in_no_encoding_is_dropped_with_a_warning(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.txt").write_bytes(b'{"epoch": 0, "train_loss\xff')
    status, output = run(flags(out), tmp_path / "log")
    assert status == 0 and "dropped the unreadable line" in output
    assert log_lines(out) == log_lines(undisturbed())
    json.loads(Path(out / "args.json").read_text())
