"""The shell scripts: checked by shellcheck, and run with stand-ins where they can break."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
SHELLCHECK = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")


def run(*command, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=100, check=False
    )


def stand_in(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    assert SHELLCHECK, "pip install -r tests/requirements.txt"
    result = run(SHELLCHECK, "--external-sources", f"scripts/{script.name}")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("gpus", ["", "1", "2"])
def test_one_gpu_needs_no_launcher(tmp_path, gpus):
    """So that a mistake is one line, and the exit status is the program's."""
    python = stand_in(tmp_path / "python", 'echo "$*"')
    words = run("bash", ROOT / "scripts/pretrain.sh", "--seed", "3", PYTHON=str(python), GPUS=gpus).stdout
    launched = words.startswith("scripts/launch.py --standalone --nproc_per_node 2 run_pretrain.py --data_path")
    assert launched if gpus == "2" else words.startswith("run_pretrain.py --data_path")
    assert words.endswith(" --seed 3\n")


@pytest.mark.parametrize("name", ["slurm_pretrain.sh", "reproduce.sh"])
def test_a_job_of_slurm_finds_the_repository(tmp_path, name):
    """sbatch runs a copy; in a shell of salloc the script lies where it is, wherever that was started. And CDPATH, by
    which cd goes elsewhere, is no matter."""
    (tmp_path / "scripts").mkdir()
    python = stand_in(tmp_path / "python", 'echo "in $PWD: $*"; [ "$1" = -c ] || exit 3')
    stand_in(tmp_path / "bin/srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    stand_in(tmp_path / "bin/scontrol", "echo localhost")
    spool = tmp_path / "slurm_script"
    shutil.copy(ROOT / "scripts" / name, spool)
    here = str(tmp_path)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CDPATH": here, "PYTHON": str(python)}
    env |= {"DEVICE": "cpu", "REFLACX": here, "IMAGES": here, "OUT": f"{here}/out"}
    for script, cwd in ((spool, ROOT), (ROOT / "scripts" / name, tmp_path), (Path("scripts") / name, ROOT)):
        result = run("bash", script, cwd=cwd, SLURM_SUBMIT_DIR=str(cwd), **env)
        assert result.returncode == 3 and f"in {ROOT}:" in result.stdout, result.stderr
    result = run("bash", spool, cwd=tmp_path, SLURM_SUBMIT_DIR=here, **env)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path} is not the repository; call sbatch in its root\n"


def test_the_demo_takes_nothing_that_the_environment_has_for_a_real_run():
    told = re.findall(r'"\$\{([A-Z_]+):?=', (ROOT / "scripts/reproduce.sh").read_text())
    demo = (ROOT / "scripts/demo.sh").read_text()
    assert len(told) >= 25
    assert [n for n in told if not re.search(rf"\b{n}=|^unset .*\b{n}\b", demo, re.MULTILINE)] == []


PROGRAMS = {
    "PREPARE": ("scripts.prepare_reflacx", "--raw a --images b --out c"),
    "MIMIC": ("scripts.prepare_mimic", "--images b --out c"),
    "PRETRAIN": ("run_pretrain", "--data_path a"),
    "GAZE": ("run_gaze", "--data_path a"),
    "DOWNSTREAM": ("run_downstream", "--dataset rsna --data_path a --weights random"),
}


def test_the_demos_flags_are_understood_by_their_programs():
    flags = dict(re.findall(r'\b([A-Z]+)_FLAGS="(.*?)"', (ROOT / "scripts/demo.sh").read_text()))
    assert flags.keys() == PROGRAMS.keys()
    for name, (program, needed) in PROGRAMS.items():
        importlib.import_module(program).get_args_parser().parse_args(f"{needed} {flags[name]}".split())


def test_a_python_without_the_requirements_is_one_line(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    result = run("bash", ROOT / "scripts/test.sh", cwd=tmp_path, PYTHON="bare/bin/python")
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: PYTHON=") and "bare/bin/python has no torch and no timm" in result.stderr
