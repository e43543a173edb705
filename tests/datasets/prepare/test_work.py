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
    programs = {
        "import datasets.prepare.readings, datasets.prepare.mimic": "set()",
        "import datasets.prepare.mimic_maps, datasets.prepare.reading_maps": "{'torch', 'torchvision'}",
    }
    for imports, allowed in programs.items():
        check = f"{imports}; import sys; found = {heavy} & set(sys.modules) - {allowed}; sys.exit(str(found) if found else 0)"
        done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


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
