"""The same promises under torchrun, and the Slurm script with stand-ins for Slurm's own commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import reliability_runs
from reliability_runs import assert_same_run, processes_with, run_ranks, wait_until_gone

import run_pretrain

ROOT = Path(run_pretrain.__file__).parent
ONE_EACH = ("--batch_size", "1")


class Launched:
    """A launcher and all that descends from it, known by a token in their environment."""

    def __init__(self, command: list[str], log: Path, **env: str):
        self.log, self.token = log, f"RELIABILITY_TOKEN={uuid.uuid4()}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "RELIABILITY_TOKEN": self.token.partition("=")[2], **env}
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )

    def until(self, text: str, count: int = 1, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while self.log.read_text().count(text) < count:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def wait(self, timeout: float = 60) -> int:
        """Exit status, once no process is left."""
        status = self.process.wait(timeout)
        wait_until_gone(lambda: processes_with(self.token), timeout)
        return status


def torchrun(fault: list[str], argv: list[str], log: Path, *options: str) -> Launched:
    return Launched(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            *options,
            reliability_runs.__file__,
            *fault,
            "--",
            *argv,
        ],
        log,
    )


def test_torchrun_restarts_after_a_killed_rank_and_passes_sigterm_on(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    argv = flags(out, *ONE_EACH, "--num_workers", "1")
    fault = ["kill_once_then_pause", "1", "0", "2"]
    launched = torchrun(fault, argv, tmp_path / "log", "--max-restarts", "1")
    launched.until("paused", count=2)
    assert (out / "checkpoint-1.pth").exists()
    launched.process.terminate()
    assert launched.wait() != 0
    assert launched.log.read_text().count("SIGTERM: saving a checkpoint") >= 2
    assert (out / "checkpoint-2-step4.pth").exists(), launched.log.read_text()
    statuses, outputs = run_ranks(flags(out, *ONE_EACH), tmp_path / "last")
    assert statuses == [0, 0], "\n".join(outputs)
    assert_same_run(out, undisturbed(*ONE_EACH, ranks=2))


@pytest.mark.slow
def test_ranks_of_a_killed_torchrun_save_and_end(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    launched = torchrun(["pause_at", "1", "2"], flags(out, *ONE_EACH, "--num_workers", "1"), tmp_path / "log")
    launched.until("paused", count=2)
    launched.process.kill()
    assert launched.wait() == -signal.SIGKILL
    assert (out / "checkpoint-1-step4.pth").exists(), launched.log.read_text()
    statuses, outputs = run_ranks(flags(out, *ONE_EACH), tmp_path / "last")
    assert statuses == [0, 0], "\n".join(outputs)
    assert_same_run(out, undisturbed(*ONE_EACH, ranks=2))


SRUN = """#!/usr/bin/env bash
# As srun does: a task in a session of its own, and signals passed on to its process group.
while [[ $1 == --* ]]; do shift; done
setsid "$@" &
task=$!
trap 'kill -USR1 -- "-$task"' USR1
while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "requeued $2"; else echo localhost; fi
"""
# Stands for `python -m torch.distributed.run ...`: dies of USR1 as torchrun does, its ranks save and exit.
LAUNCHER = """#!{python}
import signal, subprocess, sys
rank = '''
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
print("training", flush=True)
time.sleep({seconds})
'''
print("flags", *sys.argv[sys.argv.index("run_pretrain.py") + 1:], flush=True)
ranks = [subprocess.Popen([sys.executable, "-c", rank], start_new_session=True) for _ in range(2)]
sys.exit(1 if any([rank.wait() for rank in ranks]) else 0)
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def slurm(tmp_path: Path, *flags: str, python: str, **env: str) -> Launched:
    executable(tmp_path / "bin/srun", SRUN)
    executable(tmp_path / "bin/scontrol", SCONTROL)
    return Launched(
        ["bash", str(ROOT / "scripts/slurm_pretrain.sh"), *flags],
        tmp_path / "slurm.log",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        SLURM_JOB_ID="77",
        PYTHON=python,
        **env,
    )


def test_slurm_script_saves_before_the_limit_and_requeues(tmp_path):
    stand_in = executable(tmp_path / "python", LAUNCHER.format(python=sys.executable, seconds=60))
    job = slurm(tmp_path, "--epochs", "7", python=str(stand_in), SLURM_ARRAY_TASK_ID="3")
    job.until("training", count=2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 1
    text = job.log.read_text()
    assert text.count("saved") == 2 and text.count("requeued 77") == 1
    given = next(line for line in text.splitlines() if line.startswith("flags ")).split()[1:]
    args = run_pretrain.get_args_parser().parse_args(given)
    assert (args.epochs, args.seed, args.output_dir) == (7, 3, "./output_dir/cxrmim-seed3")


def test_slurm_script_does_not_requeue_what_is_done(tmp_path):
    stand_in = executable(tmp_path / "python", LAUNCHER.format(python=sys.executable, seconds=0))
    job = slurm(tmp_path, python=str(stand_in))
    assert job.wait(20) == 0
    assert "requeued" not in job.log.read_text()


@pytest.mark.slow
def test_slurm_script_with_the_real_program(tree, tmp_path):
    flags = (
        "--model cxrmim_vit_tiny_patch16 --pretrained none --device cpu --input_size 64 --batch_size 2 "
        f"--epochs 900 --data_path {tree} --output_dir {tmp_path / 'out'}"
    ).split()
    job = slurm(tmp_path, *flags, python=sys.executable, SLURM_GPUS_ON_NODE="2")
    job.until("epoch 2/900")
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait() == 1
    assert "requeued 77" in job.log.read_text()
    assert len(list((tmp_path / "out").glob("checkpoint-*.pth"))) == 1
