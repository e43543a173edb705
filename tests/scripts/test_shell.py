"""The shell scripts: checked by shellcheck, and run with stand-ins where they can break."""

from __future__ import annotations

import os
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


def test_a_planted_fault_is_found(tmp_path):
    planted = stand_in(tmp_path / "planted.sh", "for file in $(ls $1); do rm $file; done")
    assert run(SHELLCHECK, planted).returncode == 1


@pytest.mark.parametrize("name", ["test.sh", "pretrain.sh"])
def test_a_relative_python_is_seen_from_where_the_script_is_called(tmp_path, name):
    stand_in(tmp_path / "own/python", 'echo "own python in $PWD: $*"')
    for python in ("own/python", str(tmp_path / "own/python")):
        result = run("bash", ROOT / "scripts" / name, "--flag", cwd=tmp_path, PYTHON=python)
        assert result.returncode == 0 and f"own python in {ROOT}:" in result.stdout, result.stderr


@pytest.mark.parametrize("name", ["test.sh", "pretrain.sh"])
def test_a_signal_to_a_wrapper_reaches_the_program(tmp_path, name):
    """The wrapper is the program by then: the same process."""
    stand_in(tmp_path / "python", 'echo "pid $$"')
    process = subprocess.Popen(
        ["bash", ROOT / "scripts" / name], env={**os.environ, "PYTHON": str(tmp_path / "python")},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.communicate(timeout=60)[0] == f"pid {process.pid}\n"


def test_a_half_made_environment_is_made_anew(tmp_path):
    """Interrupted before pip was in it, as Ctrl-C in the first minute leaves it."""
    for name in ("scripts/venv.sh", "requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("requirements.txt", "tests/requirements.txt"):
        (tmp_path / name).write_text("")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=tmp_path, check=True)
    result = run(
        "bash", "-euc", 'source scripts/venv.sh; "$PYTHON" -m pip --version', cwd=tmp_path, PYTHON=""
    )
    assert result.returncode == 0 and str(tmp_path) in result.stdout, result.stderr
    (tmp_path / ".venv/mark").touch()  # whole now: left alone
    assert run("bash", "-euc", "source scripts/venv.sh", cwd=tmp_path, PYTHON="").returncode == 0
    assert (tmp_path / ".venv/mark").exists()


def test_ablation_into_a_place_with_blanks_and_signs(tmp_path):
    """All programs stand-ins that note what they were given: the last ones get every file by its name."""
    python = stand_in(
        tmp_path / "python",
        """for word; do printf '<%s>' "$word"; done >> "$NOTES"; echo >> "$NOTES"
case $1 in scripts/make_phantom.py) mkdir -p "$3" ;; scripts/export_backbone.py) touch "$3" ;; esac""",
    )
    out, notes = tmp_path / "an out & 100%", tmp_path / "notes"
    result = run(
        "bash", ROOT / "scripts/ablate.sh", out, PYTHON=str(python), NOTES=str(notes), SEEDS="0 1", JOBS="1",
        LESION_KINDS="nodule mass",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = notes.read_text().splitlines()
    probe = next(line for line in lines if line.startswith("<run_downstream.py>"))
    assert probe.count(f"={out}/runs/") == 12
    assert f"<block_weighted_s1={out}/runs/block_weighted_s1/backbone.pth><random><pixels>" in probe
    plot = next(line for line in lines if line.startswith("<scripts/plot_log.py>"))
    assert plot.count(f"<{out}/runs/") == 12
    assert any("<--lesion_kinds><nodule><mass><--lesion_size>" in line for line in lines)
    assert sum("<--gaze_weighted>" in line for line in lines) == 6
    assert not any("<>" in line for line in lines)
