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
JOB = str(os.getpid())  # the port, by which ranks meet, depends on it: tests run in parallel


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


def test_torchrun_passes_sigterm_on_and_waits(flags, undisturbed, tmp_path):
    out = tmp_path / "out"
    argv = flags(out, *ONE_EACH, "--num_workers", "1")
    program = [reliability_runs.__file__, "pause_at", "1", "2", "--", *argv]
    launcher = [sys.executable, str(ROOT / "scripts/launch.py"), "--standalone", "--nproc_per_node", "2"]
    launched = Launched([*launcher, *program], tmp_path / "log")
    launched.until("paused", count=2)
    launched.process.terminate()
    assert launched.wait() == 143, launched.log.read_text()
    assert launched.log.read_text().count("SIGTERM: saving a checkpoint") >= 2
    assert (out / "checkpoint-1-step3.pth").exists(), launched.log.read_text()
    statuses, outputs = run_ranks(flags(out, *ONE_EACH), tmp_path / "last")
    assert statuses == [0, 0], "\n".join(outputs)
    assert_same_run(out, undisturbed(*ONE_EACH, ranks=2))


SRUN = """#!/usr/bin/env bash
# As srun does: a task in a session of its own, and signals passed on to its process group.
while [[ $1 == --* ]]; do shift; done
setsid "$@" &
task=$!
trap 'kill -USR1 -- "-$task"' USR1
trap 'kill -TERM -- "-$task"' TERM
while wait "$task"; status=$?; kill -0 "$task" 2>/dev/null; do :; done
exit "$status"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == requeue ]]; then echo "requeued $2"; else echo localhost; fi
"""
# Stand for Python: one runs a program in run_pretrain.py's place, under the real launcher; one is done at once.
STAND_IN = """#!/usr/bin/env bash
exec {python} "${{@/run_pretrain.py/{program}}}"
"""
SHOW_FLAGS = """#!/usr/bin/env bash
while [[ $1 != run_pretrain.py ]]; do shift; done
echo flags "${@:2}"
"""
TRAIN = """
import os, signal, sys, time
def save(*_):
    time.sleep({save_seconds})
    print("saved", flush=True)
    sys.exit(75)
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, save)
print(" ".join(["flags", *sys.argv[1:]]) + "\\n", end="", flush=True)  # in one piece, of two ranks
time.sleep(60)
"""


def stand_in(folder: Path, program: str) -> str:
    """A path in place of Python's, which runs `program` for run_pretrain.py."""
    path = folder / "program.py"
    path.write_text(program)
    return str(executable(folder / "python", STAND_IN.format(python=sys.executable, program=path)))


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
        SLURM_JOB_ID=JOB,
        SLURM_GPUS_ON_NODE="2",
        PYTHON=python,
        **env,
    )


def given_flags(job: Launched):
    given = next(line for line in job.log.read_text().splitlines() if line.startswith("flags ")).split()[1:]
    return run_pretrain.get_args_parser().parse_args(given)


def test_a_mistake_is_told_without_the_launchers_traceback(tmp_path):
    python = stand_in(tmp_path, r"import os; os.write(2, b'error: --epochs 0\n'); raise SystemExit(1)")
    job = Launched(["bash", str(ROOT / "scripts/pretrain.sh")], tmp_path / "log", GPUS="2", PYTHON=python)
    assert job.wait() == 1
    lines = job.log.read_text().splitlines()
    assert "error: --epochs 0" in lines and len(lines) < 6, lines


def test_slurm_script_saves_before_the_limit_and_requeues(tmp_path):
    job = slurm(
        tmp_path, "--epochs", "7", python=stand_in(tmp_path, TRAIN.format(save_seconds=0)), SLURM_ARRAY_TASK_ID="3"
    )
    job.until("flags", count=2)
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 75  # as the program has it
    text = job.log.read_text()
    assert text.count("saved") == 2 and text.count(f"requeued {JOB}") == 1
    args = given_flags(job)
    assert (args.epochs, args.seed, args.output_dir) == (7, 3, "./output_dir/cxrmim-seed3")


@pytest.mark.parametrize("whole_job", [False, True], ids=["shell", "job"])
def test_slurm_script_waits_for_its_ranks_to_save_at_sigterm(tmp_path, whole_job):
    """As scancel and a preemption send it: to all of the job, or by hand to the script alone."""
    job = slurm(tmp_path, python=stand_in(tmp_path, TRAIN.format(save_seconds=1.5)))
    job.until("flags", count=2)
    for pid in processes_with(job.token) if whole_job else [job.process.pid]:
        os.kill(pid, signal.SIGTERM)
    assert job.process.wait(60) != 0
    text = job.log.read_text()  # of the moment when the script, and with it the job, ends
    assert text.count("saved") == 2 and "requeued" not in text
    job.wait(60)


@pytest.mark.parametrize(
    ("flags", "env", "output_dir", "seed"),
    [
        ([], {"OUTPUT_DIR": "x/", "SLURM_ARRAY_TASK_ID": "2"}, "x-seed2", 2),
        (["--output_dir", "x/", "--seed", "5"], {}, "x/", 5),
        ([], {}, "./output_dir/cxrmim", 0),
    ],
)
def test_slurm_script_gives_each_task_of_an_array_a_run_of_its_own(tmp_path, flags, env, output_dir, seed):
    job = slurm(tmp_path, *flags, "--epochs", "7", python=str(executable(tmp_path / "python", SHOW_FLAGS)), **env)
    assert job.wait(60) == 0
    args = given_flags(job)
    assert (args.output_dir, args.seed, args.epochs) == (output_dir, seed, 7)
    assert "requeued" not in job.log.read_text()  # it is done


@pytest.mark.parametrize("flags", [["--seed", "1"], ["--output_dir=x"]])
def test_slurm_script_refuses_an_array_in_one_place_or_of_one_seed(tmp_path, flags):
    job = slurm(tmp_path, *flags, python="none", SLURM_ARRAY_TASK_ID="3")
    assert job.wait(60) == 1 and job.log.read_text().startswith("error: task N of an array")
