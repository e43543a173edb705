"""What preparing and starting on a prepared tree cost: no needless imports, no needless look at a file."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_run_without_work_and_the_makers_import_no_more_than_they_need():
    heavy = "{'torch', 'matplotlib', 'torchvision', 'timm'}"
    program = f"""
import sys, scripts.prepare_reflacx, scripts.prepare_mimic
print({heavy} & set(sys.modules))
import datasets.prepare.pixels, datasets.prepare.readings
print({heavy} & set(sys.modules) - {{'torch', 'torchvision'}})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split("\n") == ["set()", "set()", ""], done.stdout + done.stderr
