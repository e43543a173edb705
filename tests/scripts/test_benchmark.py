"""scripts/benchmark.py: its report is complete and consistent, on tiny sizes. No times."""

from __future__ import annotations

import json
from functools import cache, partial

import pytest
import torch

from models_cxrmim import ENCODERS
from scripts import benchmark
from util.hog import HOGPyramid


@pytest.mark.usefixtures("narrow")
def test_every_row_is_measured_in_turns(tmp_path, monkeypatch):
    """Also those that only a GPU is measured with: they must work the first time."""
    sizes = {"batch_size": 4, "workers": [0], "labelled": 16, "encoder": "test_vit"}
    monkeypatch.setitem(benchmark.SIZES, "cpu", sizes)
    steps = ["TF32", "float16", "bfloat16, compiled"]
    monkeypatch.setitem(benchmark.STEPS, "cpu", steps)
    tiny = {"NATIVE_SIZE": (320, 280), "INPUT_SIZE": 64, "MODEL": "cxrmim_vit_tiny_patch16", "REPEATS": 1}
    for name, value in (tiny | {"PREDICTOR": {"backbone": "test_resnet", "input_size": 64}}).items():
        monkeypatch.setattr(benchmark, name, value)
    small = partial(ENCODERS[benchmark.MODEL], depth=2, id_list=(0, 0, 1, 1))
    monkeypatch.setattr(benchmark, "ENCODERS", {benchmark.MODEL: small})
    # Each call of a program once: a second one goes the same way.
    monkeypatch.setattr(benchmark, "run", cache(benchmark.run))
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compiled.append(model))  # takes its time
    path = tmp_path / "out.json"
    assert benchmark.main(["--device", "cpu", "--json", str(path)]) == 0 and len(compiled) == 1
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {
        *("sample from native files", "sample from the cache", "HOG targets of a batch"),
        *(f"step: {name}" for name in steps),
        *("real training, 0 workers, per image", "downstream encoding"),
        *("linear evaluation, 3 fractions x 3 seeds", "gaze prediction of a tree"),
    }
    compared = [row for row in report["rows"] if "ratio" in row]
    for row in compared:
        assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and row["repeats"] == 1
        assert row["ours"] > 0 and row["baseline"] > 0 and row["images_per_s"] > 0
    assert len(compared) == 9


def test_plain_hog_finds_the_same():
    img = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for plain, ours in zip(benchmark.direct_hog(img), HOGPyramid(9, (4, 8, 16, 32))(img), strict=True):
        assert plain.numpy() == pytest.approx(ours.numpy(), abs=1e-5)
