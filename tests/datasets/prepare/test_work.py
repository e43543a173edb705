"""What preparing costs: no needless imports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_run_without_work_imports_no_more_than_it_needs():
    program = """
import sys, scripts.prepare_reflacx, scripts.prepare_mimic
print({'torch', 'matplotlib', 'torchvision', 'timm'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stdout + done.stderr
