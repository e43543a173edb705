"""The command: from a run_gaze.py checkpoint to a tree that pretraining takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import predict_gaze
import pytest
import torch

from datasets.prepare.mimic import prepare_mimic
from gaze.model import GazeNet
from util.checkpoint import FORMAT, KEYS, save_checkpoint
from util.errors import UserError
from util.images import read_gray

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small predictor with random weights in every layer."""
    torch.manual_seed(0)
    model = GazeNet("test_resnet", input_size=64, width=16)
    torch.nn.init.normal_(model.out.weight)
    path = tmp_path_factory.mktemp("gaze") / "best.pth"
    about = {"config": model.config, "seen": [], "encoder_seen": [], "format": FORMAT}
    state = {key: {} for key in KEYS} | {"model": model.state_dict()} | about
    save_checkpoint(state, path)
    return path


def run(*arguments) -> int:
    return predict_gaze.main([*map(str, arguments), "--device", "cpu", "--workers", "1", "--batch_size", "4"])


def test_shards_of_the_command_give_the_same_bytes(study, weights, tmp_path, capsys):
    trees = whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare_mimic(study.images, None, whole, views=("all",), size=64)
    shutil.copytree(whole, parts)
    assert run("--weights", weights, "--tree", whole) == 0
    assert f"{whole} is ready" in capsys.readouterr().out
    for shard in (["--shard", "1/2"], ["--shard", "0/2"], []):
        assert run("--weights", weights, "--tree", parts, *shard) == 0
    one, other = ({p.relative_to(t): p.read_bytes() for p in t.rglob("*") if p.is_file()} for t in trees)
    assert one == other
    assert len({content for name, content in one.items() if name.parts[0] == "attention"}) == 12


def test_loose_dicom_files(study, weights, tmp_path):
    assert run("--weights", weights, "--images", study.images, "--out", tmp_path / "out") == 0
    entries = json.loads((tmp_path / "out" / "heatmaps.json").read_text())
    assert len(entries) == 12
    heatmap = read_gray(tmp_path / "out" / entries[0]["heatmap"])
    assert heatmap.shape == read_gray(study.images / entries[0]["image"]).shape and heatmap.max() == 255


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "pass either --tree, or --images and --out"),
        ("--tree a --images b --out c", "pass either"),
        ("--images b", "--images and --out belong together"),
        ("--images b --out c --real d", "--real: only with --tree"),
        ("--tree a --dicom_contrast window", "--dicom_contrast: only with --images"),
        ("--tree a --shard 2/2", "--shard 2/2"),
        ("--tree a --shard one", "--shard one"),
        ("--tree a --shard 0/2 --overwrite", "can't start a tree afresh|no images.json"),
        ("--tree a", "a: no images.json|no images.json in it"),
    ],
)
def test_bad_options_are_one_line(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        run("--weights", weights, *flags.split())
    assert "\n" not in str(caught.value)


def test_weights_of_something_else_are_refused(backbone, tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        run("--weights", backbone, "--tree", tmp_path)
    with pytest.raises(UserError, match="No such file"):
        run("--weights", tmp_path / "none.pth", "--tree", tmp_path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ({}, []),
        ({"ID": "0", "MIN": "0", "MAX": "3", "COUNT": "4"}, ["--shard", "0/4"]),
        ({"ID": "8", "MIN": "5", "MAX": "8", "COUNT": "4"}, ["--shard", "3/4"]),
        ({"ID": "8", "MIN": "2", "MAX": "8", "COUNT": "4"}, None),
    ],
)
def test_slurm_script_gives_each_task_its_share(tmp_path, array, expected):
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    env = {f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    done = subprocess.run(
        ["bash", "scripts/slurm_predict_gaze.sh", "my best.pth", "a tree", "--batch_size", "8"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, **env, "PYTHON": str(echo)},
        check=False,
    )
    if expected is None:
        assert done.returncode == 1 and "consecutive" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    script, *flags = done.stdout.splitlines()
    assert script == "scripts/predict_gaze.py"
    assert flags == ["--weights", "my best.pth", "--tree", "a tree", *expected, "--batch_size", "8"]
