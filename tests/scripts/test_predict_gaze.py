"""The command: from a run_gaze.py checkpoint to a tree that pretraining takes."""

from __future__ import annotations

import predict_gaze
import pytest
import torch

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


def test_a_tree_and_loose_files(study, weights, tmp_path, capsys):
    tree, out = tmp_path / "tree", tmp_path / "out"
    prepare_mimic(study.images, None, tree, views=("all",), size=64)
    assert run("--weights", weights, "--tree", tree) == 0
    assert run("--weights", weights, "--images", study.images, "--out", out) == 0
    assert f"{tree} is ready" in capsys.readouterr().out
    for folder, shape in ((tree / "attention", (75, 64)), (out, (224, 192))):
        maps = [read_gray(path) for path in folder.rglob("*.png")]
        assert len({levels.tobytes() for levels in maps}) == 12
        assert all(levels.shape == shape and levels.max() == 255 for levels in maps)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "pass either --tree, which may have --real, or --images and --out"),
        ("--images b", "pass either"),
        ("--tree a --weights foreign.pth", "foreign.pth: .*not a checkpoint"),
    ],
)
def test_bad_options_are_one_line(weights, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    torch.save({}, "foreign.pth")
    with pytest.raises(UserError, match=message) as caught:
        run("--weights", weights, *flags.split())
    assert "\n" not in str(caught.value)
