"""Two jobs in one place: one trains, the other is told who does."""

from __future__ import annotations

import os
import re
import signal
import socket
from functools import partial

from reliability_runs import Run, assert_same_run, impatient, pause_at, run, run_ranks


def test_a_second_run_in_one_output_dir_is_told_who_holds_it(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    first = Run(flags(out), tmp_path / "first", fault=partial(pause_at, 1, 2))
    first.until("paused")
    (out / ".tmp-checkpoint-1.pth-half").touch()  # as if the first were in the middle of a save
    before = sorted(path.name for path in out.iterdir())
    told = rf"error: --output_dir {out} is in use by process {first.pid} on {re.escape(socket.gethostname())} since "
    status, output = run(flags(out), tmp_path / "second", fault=impatient)
    assert status == 1 and re.search(told, output) and "Traceback" not in output
    statuses, outputs = run_ranks(flags(out), tmp_path / "ranks", faults={0: impatient})  # of which rank 0 alone looks
    assert statuses == [1, 1] and re.search(told, outputs[0]) and "Traceback" not in "".join(outputs)
    assert sorted(path.name for path in out.iterdir()) == before
    (out / ".tmp-checkpoint-1.pth-half").unlink()
    os.kill(first.pid, signal.SIGUSR1)
    assert first.wait() == 75, first.output
    assert run(flags(out), tmp_path / "last")[0] == 0
    assert_same_run(out, undisturbed())


def test_a_killed_run_leaves_no_lock(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    first = Run(flags(out, "--num_workers", "2"), tmp_path / "first", fault=partial(pause_at, 1, 2))
    first.until("paused")
    os.kill(first.pid, signal.SIGKILL)  # its data workers end a moment later
    status, output = run(flags(out), tmp_path / "second")
    assert status == 0, output
    assert_same_run(out, undisturbed())
