"""Training and judging a gaze predictor, for real on small trees."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from gaze_trees import edit_index, make_gaze_tree

import gaze.main
from gaze import metrics as saliency
from gaze.data import PARTS, GazeStudy, read_fixations, resize_whole
from gaze.model import load_gaze_net
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.images import read_gray, write_gray
from util.subjects import subject_marks

SMALL = "--backbone test_resnet --input_size 64 --device cpu --batch_size 4 --num_workers 0"


@pytest.fixture(scope="module", autouse=True)
def few_examples():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gaze.judge, "EXAMPLES", 2)
        yield


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_gaze_tree(tmp_path_factory.mktemp("gaze"), 36)


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """A finished run of 8 epochs: 24 training images are 6 steps."""
    out = tmp_path_factory.mktemp("trained")
    assert train(tree, out, "--epochs 8 --lr 5e-3") == 0
    return out


@pytest.fixture
def unjudged(monkeypatch):
    monkeypatch.setattr(gaze.main, "judge", lambda *_: None)


def train(tree, out, flags="") -> int:
    return gaze.main.main([*SMALL.split(), "--data_path", str(tree), "--output_dir", str(out), *flags.split()])


def log_of(out):
    lines = [json.loads(line) for line in (Path(out) / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time_s"} for line in lines]


def same_weights(one, other) -> bool:
    return all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])


def test_learns_what_departs_from_the_centre_prior(trained):
    table = pd.read_csv(trained / "metrics.csv").set_index(["predictor", "metric"])
    for metric in saliency.TITLES:
        gain = table.loc[("model - centre prior", metric)]
        assert gain["high"] < 0 if metric == "kld" else gain["low"] > 0, (metric, gain)
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()


def test_the_tables_are_those_of_the_model_and_the_readings(trained, tree):
    """One image read twice, by hand: the model, and the other reader's map, against the second reading."""
    image = next(image for image in GazeStudy([tree]).parts["test"] if len(image.entries) == 2)
    plane, (other, target) = image.read(224)
    predicted = load_gaze_net(trained / "best.pth")(resize_whole(plane, 64)[None]).detach().double().exp()
    density = saliency.resize_density(predicted, (224, 224))[0]
    pixels = saliency.fixation_pixels(*read_fixations(tree / "fixations.csv")[image.readings[1]].T, (224, 224))
    rows = pd.read_csv(trained / "readings.csv").set_index(["predictor", "reading"])
    own, others = (rows.loc[name, image.readings[1]] for name in ("model", "other readers"))
    assert own["cc"] == pytest.approx(float(saliency.cc(density, target)), abs=1e-6)
    assert own["nss"] == pytest.approx(float(saliency.nss(density, pixels)), abs=1e-5)
    assert others["kld"] == pytest.approx(float(saliency.kld(saliency.density_of_levels(other), target)))
    table = pd.read_csv(trained / "metrics.csv").set_index(["predictor", "metric"])
    by_image = rows.loc["model"].groupby("image")["cc"].mean()
    assert table.loc[("model", "cc"), "value"] == pytest.approx(by_image.mean())
    assert table.loc[("model", "cc"), "n"] == len(by_image) == 6


def test_outputs_of_a_run(trained):
    assert (trained / "metrics.png").exists() and (trained / "examples.png").exists()
    best, state = min(log_of(trained), key=lambda record: record["val_kld"]), load_checkpoint(trained / "best.pth")
    assert (state["epoch"], state["val_kld"]) == (best["epoch"], best["val_kld"])
    assert {path.name for path in trained.glob("checkpoint-*")} == {"checkpoint-6.pth", "checkpoint-7.pth"}


def test_paused_after_every_step_is_bit_equal(tree, tmp_path):
    flags = "--epochs 2 --lr 5e-3 --batch_size 12"
    assert train(tree, tmp_path / "whole", flags) == 0
    statuses = []
    while not statuses or statuses[-1] == 75:
        statuses.append(train(tree, tmp_path / "parts", f"{flags} --max_minutes 0"))
    assert statuses == [75] * 3 + [0]
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    for name in ("best.pth", "checkpoint-1.pth"):
        assert same_weights(*(load_checkpoint(tmp_path / run / name) for run in ("whole", "parts")))
    for name in ("metrics.csv", "readings.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.usefixtures("unjudged")
def test_the_best_model_is_that_of_the_checkpoint_that_is_gone_on_with(trained, tree, tmp_path):
    """Whatever best.pth was there before, and though later epochs have overwritten it."""
    assert train(tree, tmp_path, "--epochs 2 --lr 5e-3") == 0
    expected = load_checkpoint(first := tmp_path / "checkpoint-0.pth")["best"]
    shutil.copy(trained / "best.pth", tmp_path)
    assert train(tree, tmp_path, f"--epochs 1 --lr 5e-3 --resume {first}") == 0
    found = load_checkpoint(tmp_path / "best.pth")
    assert found["epoch"] == expected["epoch"] == 0 and same_weights(found, expected)


@pytest.mark.usefixtures("unjudged")
def test_other_heatmaps_are_not_gone_on_with(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / "tree")
    assert train(tree, tmp_path / "out", "--epochs 1") == 0
    image = GazeStudy([tree]).parts["validate"][0]
    changed = image.tree.files(image.entries[0]).attention
    write_gray(changed, np.roll(read_gray(changed), 9))
    with pytest.raises(UserError, match="checkpoint-0.pth: of a run with other images or heatmaps"):
        train(tree, tmp_path / "out", "--epochs 2")


@pytest.mark.usefixtures("unjudged")
def test_stops_early_and_stays_stopped(tree, tmp_path, capsys, monkeypatch):
    scores = iter((2.0, 1.0, 1.5, 1.0, math.nan))
    monkeypatch.setattr(gaze.main, "validate", lambda *_: {"val_kld": next(scores), "val_cc": 0.0})
    for _ in range(2):
        assert train(tree, tmp_path, "--epochs 9 --patience 2") == 0
        assert [record["val_kld"] for record in log_of(tmp_path)] == [2, 1, 1.5, 1]
        assert "stopped after epoch 4; best: epoch 2" in capsys.readouterr().out


def test_numbers_that_are_not_finite_end_the_run_with_nothing_of_them_saved(tree, tmp_path, monkeypatch):
    """So the running statistics of batch norm, which take such a step's images, are kept nowhere."""
    monkeypatch.setattr(saliency, "log_kld", lambda log_p, target: math.nan * log_p.sum((1, 2)))
    with pytest.raises(UserError, match="non-finite loss at epoch 0 step 0.*: lower --lr or use --dtype float32"):
        train(tree, tmp_path, "--epochs 1")
    assert not [*tmp_path.glob("*.pth")]
    monkeypatch.undo()
    monkeypatch.setattr(gaze.main, "validate", lambda *_: {"val_kld": math.nan, "val_cc": math.nan})
    with pytest.raises(UserError, match="no epoch had a finite validation KLD"):
        train(tree, tmp_path, "--epochs 1")
    assert not (tmp_path / "best.pth").exists()


def test_tree_without_fixations_has_map_metrics_only(trained, tmp_path, capsys):
    tree = make_gaze_tree(tmp_path / "tree")
    (tree / "fixations.csv").unlink()
    assert train(tree, tmp_path / "judged", f"--judge {trained / 'best.pth'}") == 0
    assert "4 of 4 test readings have no fixations in their tree's fixations.csv" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "judged/metrics.csv")["metric"]) == set(saliency.MAP_METRICS)


def test_a_model_is_not_judged_on_those_who_trained_it(trained, tmp_path):
    other = make_gaze_tree(tmp_path / "tree", 12)
    parts = [*reversed(PARTS), "train"]
    edit_index(other, lambda _, entry: {"split": parts[int(entry["subject_id"]) % 4]})
    assert train(other, tmp_path / "judged", f"--judge {trained / 'best.pth'}") == 0
    assert len(set(pd.read_csv(tmp_path / "judged" / "readings.csv")["image"])) < 3  # of 3


def test_subjects_that_pretrained_the_encoder_are_told(tree, backbone, tmp_path, capsys):
    content, seen = torch.load(backbone, weights_only=True), subject_marks(map(str, range(10000, 10036)), "mimic")
    torch.save(content | {"metadata": {"num_heads": "1", "seen": json.dumps(seen)}}, tmp_path / "encoder.pth")
    for _ in ("new", "resumed"):
        assert train(tree, tmp_path / "out", f"--epochs 1 --weights {tmp_path / 'encoder.pth'}") == 0
        told = "warning: 6 of 6 test subjects were in the training or pretraining of the encoder"
        assert told in capsys.readouterr().out


def test_bad_options_are_one_line(tree, trained, backbone, tmp_path):
    torch.save({"model": {}}, foreign := tmp_path / "foreign.pth")
    for out, flags, message in (
        (tmp_path, "--batch_size 0", "--batch_size 0"),
        (tmp_path, "--batch_size 99", "--batch_size 99"),
        (tmp_path, "--backbone nothing", "--backbone nothing: timm can't"),
        (tmp_path, "--input_size 100", "--input_size 100: must be divisible by 32"),
        (tmp_path, "--judge nothing.pth", "nothing.pth: can't be read"),
        (tmp_path, f"--judge {foreign}", "foreign.pth: .*not a checkpoint of this program"),
        (tmp_path, f"--resume {trained / 'best.pth'}", "best.pth: holds weights alone"),
        (trained, "--backbone test_convnext", "of a run with other --backbone"),
        (trained, f"--weights {backbone}", "of a run with other --weights"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            train(tree, out, f"{flags} --epochs 9")
        assert "\n" not in str(caught.value)


def test_shuffled_auc_takes_other_subjects_fixations_alone(trained, tmp_path):
    other = make_gaze_tree(tmp_path / "other")
    edit_index(other, lambda _, entry: {"subject_id": "1"} if entry["split"] == "test" else {})
    assert train(other, tmp_path / "judged", f"--judge {trained / 'best.pth'}") == 0
    rows = pd.read_csv(tmp_path / "judged/readings.csv")
    assert len(set(rows["image"])) > 1 and rows["auc_shuffled"].isna().all() and rows["auc_judd"].notna().all()
