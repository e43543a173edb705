"""scripts/benchmark.py: its report is complete and consistent, fast ways equal slow ones. No times."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from scripts import benchmark
from scripts.benchmarks.timing import Parts, Report
from util.errors import UserError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark")
    threads = torch.get_num_threads()
    output = str(path / "out.json")
    assert benchmark.main(["--quick", "--device", "cpu", "--json", output, "--work_dir", str(path)]) == 0
    torch.set_num_threads(threads)
    assert [file.name for file in path.iterdir()] == ["out.json"]  # inputs are removed
    report = json.loads((path / "out.json").read_text())
    assert report["seconds"] and report["whole"] and not report["failures"] and not report["skipped"]
    return report


def test_every_bar_of_the_table_is_judged(report):
    bars = {row["name"]: row["bar"] for row in report["rows"] if row["bar"]}
    assert (
        bars.items()
        >= {
            "sample from native files": ">= 4",
            "sample from the cache": ">= 200",
            "HOG targets of a batch": ">= 10",
            "step: whole": ">= 1.4",
            "data wait in a real training, 1 workers": "< 0.03",
            "gap between two epochs, 1 workers": "< 0.2",
            "gaze prediction of a tree": ">= 0.8",
            "linear evaluation, 3 fractions x 3 seeds": ">= 10",
        }.items()
    )
    for row in report["rows"]:
        assert (row["met"] is None) == (row["bar"] is None)
        if row["bar"]:
            relation, limit = row["bar"].split()
            value = row["ratio"] if relation == ">=" else row["ours"]
            assert row["met"] == (value >= float(limit) if relation == ">=" else value < float(limit))


def test_every_variant_of_a_step_is_measured(report):
    """Also those that only a GPU is measured with: they must work the first time."""
    names = {row["name"] for row in report["rows"]}
    for dtype in ("float32", "TF32", "float16", "bfloat16"):
        assert {f"step: {dtype}{what}" for what in ("", ", arithmetic", ", operations", ", peak memory")} <= names
    assert {"step: bfloat16, compiled", "step: bfloat16, CUDA graphs"} <= names
    assert all("400 epochs" in row["note"] for row in report["rows"] if row["name"] == "step: bfloat16")
    assert {"step: bfloat16, compiled, start", "real training, 1 workers, per image"} <= names
    operations = {row["name"]: row["ours"] for row in report["rows"] if row["unit"] == "launches"}
    rows = {row["name"]: row for row in report["rows"]}
    assert "images/s" in rows["gaze training"]["note"] and rows["downstream encoding"]["unit"] == "images/s"
    assert operations["step: float32, operations"] < operations["step: bfloat16, operations"] < 700
    assert rows["step: bfloat16, operations"]["baseline"] > 1000


def test_ratios_are_those_of_the_turns(report):
    compared = [row for row in report["rows"] if row["ratio_quartiles"]]
    assert len(compared) >= 8
    for row in compared:
        low, high = row["ratio_quartiles"]
        assert 0 < low <= row["ratio"] <= high and row["repeats"] == report["settings"]["repeats"]
        assert row["ours"] > 0 and row["baseline"] > 0
    assert report["machine"]["cpu"] and report["machine"]["torch"] == torch.__version__


def test_fast_ways_equal_slow_ones(report):
    equality = report["equality"]
    assert equality["HOG, largest difference from 12 direct passes"] <= 1e-5
    assert equality["loss with our and with direct HOG, relative difference"] <= 1e-5
    # 8-bit resizing clamps and rounds after each of its two passes, float resizing never.
    assert equality["native vs float tensors, same crop, largest difference, gray levels of 255"] <= 3
    assert equality["cached vs native foreground, mean difference, share of pixels"] < 0.02
    assert 0 < equality["cached vs native attention, mean difference, gray levels of 255"] < 2


def test_a_part_that_fails_or_lasts_too_long_costs_its_own_rows_alone(tmp_path, capsys):
    path = tmp_path / "out.json"
    report = Report({}, {})
    parts = Parts(report, path, minutes=0.3 / 60)

    def fails():
        report.value("half", "s", 1.0)
        raise RuntimeError("no such kernel")

    def lasts_long():
        while True:
            try:
                time.sleep(10)
            except Exception:  # as a library that tries things out
                continue

    parts.run("first", fails)
    parts.run("second", lambda: report.value("second", "s", 1.0))
    parts.run("third", lasts_long)
    parts.run("fourth", fails)
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == ["half", "second"]
    assert written["failures"] == {"first": "RuntimeError: no such kernel"}
    assert written["skipped"] == ["third", "fourth"]
    out = capsys.readouterr().out
    assert "first: FAILED" in out and "third: broken off" in out and "fourth: not begun" in out


def test_a_failed_part_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def fails():
        raise ValueError("wrong")

    monkeypatch.setattr(benchmark, "run_parts", lambda parts, *others: parts.run("it", fails))
    assert benchmark.main(["--device", "cpu", "--work_dir", str(tmp_path)]) == 1
    assert "error: 1 parts failed: it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", ["--minutes 0", "--minutes -1", "--batch_size 0", "--work_dir none", "--json .", "--json none/a"], ids=str
)
def test_what_can_not_work_is_told_before_anything_is_measured(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "run_parts", lambda *others: pytest.fail("begun"))
    with pytest.raises(UserError, match=flags.split()[0]):
        benchmark.main(["--quick", "--device", "cpu", *flags.split()])
    assert not list(tmp_path.iterdir())


def test_a_run_that_measured_nothing_or_was_ended_says_so(tmp_path, monkeypatch, capsys):
    argv = ["--device", "cpu", "--work_dir", str(tmp_path), "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(benchmark, "run_parts", lambda parts, *others: None)
    assert benchmark.main(argv) == 1 and "error: nothing was measured" in capsys.readouterr().err

    def ended(parts, report, root, settings):
        (root / "input").touch()
        parts.run("it", lambda: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(benchmark, "run_parts", ended)
    with pytest.raises(SystemExit) as end:
        benchmark.main(argv)
    assert end.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert not json.loads((tmp_path / "out.json").read_text())["whole"]


def test_settings_of_a_gpu_measure_what_was_asked():
    args = benchmark.get_args_parser().parse_args(["--device", "cuda"])
    settings = benchmark.settings_of(args, "cuda")
    assert settings.batch_size == 128 and settings.training_workers == (4, 16) and settings.compile
    assert settings.copies * settings.n_images >= 4 * settings.batch_size  # steps in an epoch
    names = [variant.name for variant in benchmark.variants(settings)]
    assert len(names) == len(set(names)) == 12
    cpu = benchmark.settings_of(args, "cpu")
    assert cpu.batch_size == 8 and not cpu.compile


def test_missing_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda"):
        benchmark.main(["--device", "cuda"])
