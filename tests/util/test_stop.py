"""Requests to stop: noted once, agreed between ranks at one step, and left alone by data workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from util.stop import GO_ON, StopSignals

ROOT = Path(__file__).parents[2]


def wait_for_request(stay: bool, max_minutes: float | None, ready) -> None:
    signals = StopSignals(max_minutes)
    ready.set()
    while signals.request == GO_ON or stay:
        time.sleep(0.01)
    sys.exit(signals.request)


def start_waiting(*, stay: bool = False, max_minutes: float | None = None) -> multiprocessing.Process:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=wait_for_request, args=(stay, max_minutes, ready))
    process.start()
    assert ready.wait(10)
    return process


def exit_code(process: multiprocessing.Process) -> int | None:
    process.join(10)
    return process.exitcode


def test_first_signal_asks_and_the_second_stops_at_once(capfd):
    statuses = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 75, signal.SIGUSR2: 75}
    polite = {signum: start_waiting() for signum in statuses}
    stubborn = {signum: start_waiting(stay=True) for signum in statuses}
    for processes in (polite, stubborn):
        for signum, process in processes.items():
            os.kill(process.pid, signum)
            os.kill(process.pid, signum)  # the copy that a launcher passes on, at once
    assert {signum: exit_code(process) for signum, process in polite.items()} == statuses
    told = capfd.readouterr().err
    assert all(told.count(f"{signum.name}: saving a checkpoint") == 2 for signum in statuses)
    time.sleep(0.6)
    for signum, process in stubborn.items():
        assert process.is_alive()
        os.kill(process.pid, signum)
        assert exit_code(process) == -signum


def test_a_rank_that_waits_for_the_others_can_be_stopped(tmp_path):
    """It waits in C++, where Python runs no handler: there a signal ends it by default."""
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    code = (
        "from util import distributed; from util.stop import StopSignals\n"
        "with StopSignals() as signals:\n"
        " with signals.default_handlers():\n"
        "  print('waiting', flush=True); distributed.start('cpu', dist_url=f'file://{sys.argv[1]}')\n"
    )
    command = [sys.executable, "-c", f"import sys\n{code}", str(tmp_path / "meet")]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.5)
        process.terminate()
        try:
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


LOADER = """
import os, signal, time
import torch
import multiprocessing
from util.loading import SampleLoader
multiprocessing.set_start_method("forkserver")  # the default of Python 3.14
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, index):
        time.sleep(0.02)
        return os.getpid()
batches = iter(SampleLoader(Slow(), batch_size=4, num_workers=2))
# Of this process alone: its workers have started.
for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(signum, lambda *_: None)
print(len({int(next(batches)[0]) for _ in range(2)}), "workers")
for _ in range(@BATCHES@):
    next(batches)
    print("batch")
raise RuntimeError("the traceback keeps the loader, so its workers are not told that it ends")
"""


def start_loader(n_batches: int) -> subprocess.Popen:
    command = [sys.executable, "-u", "-c", LOADER.replace("@BATCHES@", str(n_batches))]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "2 workers\n"
    return process


def test_workers_ignore_signals_to_the_group_and_end_with_their_parent():
    """Workers have their parent's standard output open, which ends with the last of them."""
    killed = start_loader(10**6)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.killpg(killed.pid, signum)
    failing = start_loader(20)  # takes its time, in which the other would end
    assert killed.poll() is None
    killed.kill()
    killed.communicate(timeout=3)  # torch's own watchdog takes five seconds or more
    assert "RuntimeError: the traceback keeps" in failing.communicate(timeout=20)[1] and failing.returncode == 1
