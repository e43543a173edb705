"""What preparing and starting on a prepared tree cost: no needless imports, no needless look at a file."""

import os
import subprocess
import sys
from pathlib import Path

from datasets.cache import add_cache
from datasets.reflacx import Reflacx

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


def test_one_look_at_each_file_where_the_record_vouches(tree, tmp_path, monkeypatch):
    add_cache(Reflacx(tree, 32, preload=True), tmp_path)
    prepared = Reflacx(tree, 32, preload=True)
    looks: list[str] = []
    real = os.stat

    def stat(path, *args, **kwargs):
        looks.append(os.fspath(path) if not isinstance(path, int) else "")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    add_cache(prepared, tmp_path)
    files = {str(file) for index in range(len(prepared)) for file in prepared.files(index)}
    assert len(files) == 3 * len(prepared)
    assert sorted(path for path in looks if path in files) == sorted(files)
