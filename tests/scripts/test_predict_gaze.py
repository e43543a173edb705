"""The command: from a run_gaze.py checkpoint to a tree that pretraining takes."""

from __future__ import annotations

import json

import predict_gaze
import pytest
import torch
from trees import contents

from datasets.prepare.mimic import prepare_mimic
from gaze.model import GazeNet
from util.checkpoint import FORMAT, save_checkpoint
from util.errors import UserError
from util.images import read_gray


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small predictor with random weights in every layer."""
    torch.manual_seed(0)
    model = GazeNet("test_resnet", input_size=64, width=16)
    torch.nn.init.normal_(model.out.weight)
    path = tmp_path_factory.mktemp("gaze") / "best.pth"
    about = {"config": model.config, "seen": [], "encoder_seen": [], "format": FORMAT}
    save_checkpoint({"model": model.state_dict(), **about}, path)
    return path


def run(*arguments) -> int:
    return predict_gaze.main([*map(str, arguments), "--device", "cpu", "--workers", "1", "--batch_size", "4"])


def test_a_tree_is_filled(study, weights, tmp_path, capsys):
    tree = tmp_path / "tree"
    prepare_mimic(study.images, None, tree, views=("all",), size=64)
    assert run("--weights", weights, "--tree", tree) == 0
    assert f"{tree} is ready" in capsys.readouterr().out
    assert len({content for name, content in contents(tree).items() if name.startswith("attention")}) == 12


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
        ("--images b", "pass either"),
        ("--images b --out c --real d", "--real: only with --tree"),
        ("--tree a", "a: no images.json|no images.json in it"),
        ("--tree a --weights none.pth", "none.pth: can't be read"),
        ("--tree a --weights foreign.pth", "foreign.pth: .*not a checkpoint"),
    ],
)
def test_bad_options_are_one_line(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    torch.save({}, "foreign.pth")
    with pytest.raises(UserError, match=message) as caught:
        run("--weights", weights, *flags.split())
    assert "\n" not in str(caught.value)
