"""scripts/benchmark.py: its report is complete and consistent. No times."""

from __future__ import annotations

import json

import pytest
import torch

from scripts import benchmark


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path, threads = tmp_path_factory.mktemp("benchmark") / "out.json", torch.get_num_threads()
    assert benchmark.main(["--quick", "--device", "cpu", "--json", str(path)]) == 0
    torch.set_num_threads(threads)
    report = json.loads(path.read_text())
    assert not report["failures"]
    return report


def test_every_row_is_measured_in_turns(report):
    """Also those that only a GPU is measured with: they must work the first time."""
    rows = {row["name"]: row for row in report["rows"]}
    assert set(rows) == {
        *("sample from native files", "sample from the cache", "HOG targets of a batch"),
        *(f"step: {name}" for name in ("float32", "TF32", "float16", "bfloat16", "bfloat16, compiled")),
        *("real training, 1 workers, per image", "downstream encoding", "downstream encoding: of bare rate"),
        *("linear evaluation, 3 fractions x 3 seeds", "gaze prediction of a tree"),
    }
    compared = [row for row in report["rows"] if row["ratio"]]
    for row in compared:
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high and row["repeats"] in (1, report["settings"]["repeats"])
        assert row["ours"] > 0 and row["baseline"] > 0
    assert len(compared) == 11 and "400 epochs" in rows["step: bfloat16"]["note"]
    assert report["machine"]["torch"] == torch.__version__
