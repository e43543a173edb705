"""What runs on a GPU node needs torch and the usual packages alone, no network and no .venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = ("pydicom", "torchxrayvision", "hypothesis", "cv2", "xdist", "pytest_timeout")
# In place of the finder of installed packages, one that does not see these.
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {HIDDEN} else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
PROGRAMS = ("run_pretrain", "run_gaze", "run_downstream", "scripts.benchmark", "scripts.predict_gaze")
CHECK = f"""
import importlib.util, sys
for name in {HIDDEN}:
    assert importlib.util.find_spec(name) is None, name
for name in {PROGRAMS}:
    importlib.import_module(name).get_args_parser().format_help()
print("all there", flush=True)
import pytest
sys.exit(pytest.main(["-m", "cuda", "--collect-only", "-p", "no:cacheprovider"]))
"""


def test_programs_start_and_cuda_tests_are_collected(tmp_path):
    """In a plain copy of the tree, without .git and .venv, whose interpreter does not see the packages."""
    copy, hide = tmp_path / "cxr mim", tmp_path / "hide"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "output_dir", ".*_cache"))
    hide.mkdir()
    (hide / "sitecustomize.py").write_text(HIDE)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    # pytest loads the plugins of installed packages past the finder.
    env |= {"PYTHONPATH": str(hide), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("all there\n")
    for name in ("test_golden.py::test_gradients", "test_no_step_waits", "bit_equal_on_one_gpu", "test_fine_tuning"):
        assert name in done.stdout
