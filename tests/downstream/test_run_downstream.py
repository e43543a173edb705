"""From a checkpoint to the tables: linear heads, probes, what goes on where it was, and bad input."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

import downstream.driver
from downstream.evaluate import read_tuned
from downstream.main import main
from util.errors import UserError
from util.subjects import subject_marks


@pytest.fixture(scope="module")
def rsna(tmp_path_factory) -> Path:
    """120 patients in the layout of the RSNA challenge; the opacities are bright squares."""
    root = tmp_path_factory.mktemp("rsna site")
    folder = root / "stage_2_train_images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        gray = rng.normal(80, 10, (64, 56))
        name, boxes = f"p{i:03d}", [(None,) * 4]
        if rng.random() < 0.4:
            top, left = rng.integers(10, 30, 2)
            gray[top : top + 20, left : left + 18] += 110
            boxes = [(left, top, 18, 20)] * 2
        Image.fromarray(gray.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
        rows += [(name, *box, int(box[0] is not None)) for box in boxes]
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    pd.DataFrame(rows, columns=columns).to_csv(root / "stage_2_train_labels.csv", index=False)
    return root


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A small ViT for 224 px with random weights."""
    torch.manual_seed(1)
    model = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=1, num_heads=1, num_classes=0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"state_dict": model.state_dict(), "metadata": {"num_heads": "1"}}, path)
    return path


def command(root: Path, out: Path, *options: object) -> list[str]:
    fixed = ["--dataset", "rsna", "--data_path", root, "--device", "cpu", "--num_workers", "0", "--bootstrap", "200"]
    short = ["--batch_size", "16", "--epochs", "4", "--views", "2", "--output_dir", out]
    return [str(option) for option in [*fixed, *short, *options]]


def check_aucs(out: Path) -> pd.DataFrame:
    """results.csv against scikit-learn on predictions.csv; returns it."""
    results, predictions = (pd.read_csv(out / f"{name}.csv") for name in ("results", "predictions"))
    keys = ["weights", "fraction", "seed", "label"]
    assert not predictions.duplicated([*keys, "id"]).any()
    groups = predictions.groupby(keys)
    found = results[results["label"] != "mean"].set_index(keys)
    assert len(groups) == len(found)
    for key, group in groups:
        models = [own for _, own in group.groupby("fold")] if "fold" in group else [group]
        aucs = [roc_auc_score(own["target"], own["score"]) for own in models]
        assert found.loc[key, "auc"] == pytest.approx(np.mean(aucs), abs=1e-8)
        assert found.loc[key, "n"] == len(group) and found.loc[key, "n_positive"] == group["target"].sum()
    mean = results[results["label"] == "mean"].set_index(keys[:3])["auc"]
    for key, group in results[results["label"] != "mean"].groupby(keys[:3]):
        assert mean[key] == pytest.approx(group["auc"].mean())
    return results


def test_linear_from_weights_to_tables(rsna, encoder, tmp_path, capsys):
    out = tmp_path / "a run"
    weights = ["--weights", f"_our$1={encoder}", "random", "pixels"]
    assert main(command(rsna, out, *weights, "--fractions", "0.5", "1", "--seeds", "43", "44")) == 0
    results = check_aucs(out)
    assert list(dict.fromkeys(results["weights"])) == ["_our$1", "random", "pixels"]
    assert set(results["fraction"]) == {0.5, 1.0} and set(results["seed"]) == {43, 44}
    assert (results["n"] == 18).all()
    printed = capsys.readouterr().out
    assert "_our$1: 84 images encoded, 120 were there already" in printed  # 2 views of 42 and of 84, 36 to judge
    assert "matched   18  cls_token" in printed and "missing    0" in printed
    table = (out / "table.md").read_text()
    assert "| _our$1 | 50% | 2 |" in table
    assert Image.open(out / "results.png").size[0] >= 1200
    split = pd.read_csv(out / "split.csv")
    assert split["split"].value_counts().to_dict() == {"train": 84, "valid": 18, "test": 18}

    # Other fractions and seeds encode nothing again; what was trained is not trained again.
    first = (out / "results.csv").read_text()
    main(command(rsna, out, *weights, "--fractions", "0.5", "--seeds", "43", "50"))
    printed = capsys.readouterr().out
    assert "images encoded" not in printed
    assert "seed 50: best epoch" in printed and "seed 43: best epoch" not in printed
    main(command(rsna, out, *weights, "--fractions", "0.5", "1", "--seeds", "43", "44"))
    assert (out / "results.csv").read_text() == first
    assert "encoded" not in capsys.readouterr().out

    # Another directory shares the features.
    assert main(command(rsna, tmp_path / "b", *weights, "--seeds", "44", "--features_dir", out / "features")) == 0
    assert "images encoded" not in capsys.readouterr().out


def test_probe_in_grouped_folds_tests_every_image_once(rsna, encoder, tmp_path, capsys):
    out = tmp_path / "probe"
    options = ["--method", "probe", "--split", "folds", "--folds", "3", "--seeds", "0", "1"]
    main(command(rsna, out, "--weights", f"ours={encoder}", "pixels", *options))
    results = check_aucs(out)
    assert list(dict.fromkeys(results["weights"])) == ["ours, cls", "ours, mean of patches", "pixels"]
    assert (results["n"] == 120).all() and (results["auc"] > 0.8).all()
    predictions = pd.read_csv(out / "predictions.csv")
    assert set(predictions["fold"]) == {1, 2, 3}
    scores = predictions.groupby("weights")["score"].apply(list)
    assert scores["ours, cls"] != scores["ours, mean of patches"]
    assert "too narrow" in (out / "table.md").read_text() and "too narrow" in capsys.readouterr().out
    assert set(pd.read_csv(out / "split.csv", keep_default_na=False)["split"]) == {""}


def test_dry_run_needs_no_image(rsna, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "stage_2_train_labels.csv").write_text((rsna / "stage_2_train_labels.csv").read_text())
    assert main(command(bare, tmp_path / "out", "--dry_run")) == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()][2] == ["images", "84", "18", "18"]
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == ["split.csv"]


def test_a_disk_that_is_full_when_results_are_written_is_one_line(rsna, tmp_path):
    argv = command(rsna, tmp_path, "--weights", "pixels", "--seeds", "1")
    assert main(argv) == 0
    (tmp_path / "results.png").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # the tables fit, the picture doesn't
    try:
        with pytest.raises(OSError, match=r"File too large: .*results.png"):  # which util.errors prints as one line
            main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.glob(".tmp*")) == []
    # What is there stays that of its own study.
    for other in (["--split", "subject"], ["--labels", "Pneumonia", "--split", "folds"], ["--method", "probe"]):
        for dry_run in ([], ["--dry_run"]):
            with pytest.raises(UserError, match="holds results of .*rsna.*linear.*choose another"):
                main([*argv, *other, *dry_run])
    split = (tmp_path / "split.csv").read_text()
    assert main([*argv, "--dry_run"]) == 0 and (tmp_path / "split.csv").read_text() == split
    assert main(argv) == 0 and (tmp_path / "results.png").exists()


def test_dry_run_tells_what_a_run_would_refuse_hours_later(rsna, tmp_path, capsys):
    argv = command(rsna, tmp_path, "--dry_run", "--batch_size", "8", "--fractions", "1", "0.08")
    with pytest.raises(UserError, match="--batch_size 8: there are only 7 images"):
        main(argv)
    assert main([*argv, "--method", "probe"]) == 0  # which has no batches
    assert main([*argv[:-1], "0.1", "--weights", "random", "pixels"]) == 0
    assert "random: random weights" in capsys.readouterr().out
    for method in ("linear", "evaluate"):
        with pytest.raises(UserError, match="none.pth"):
            main([*argv[:-1], "0.1", "--method", method, "--weights", f"ours={tmp_path}/none.pth"])
    with pytest.raises(UserError, match=r"only \d images"):
        main([*argv, "--split", "folds", "--folds", "3"])
    with pytest.raises(UserError, match="--folds 100: no label has so many images"):
        main([*argv[:-1], "--method", "probe", "--split", "folds", "--folds", "100"])


def test_features_of_other_heads_are_other_features(rsna, tmp_path, capsys):
    """The same weights with another number of attention heads are another encoder."""
    torch.manual_seed(1)
    model = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=1, num_heads=2, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    found = []
    for heads in (1, 2):
        options = ["--weights", tmp_path / "plain.pth", "--num_heads", heads, "--seeds", "43", "--views", "1"]
        assert main(command(rsna, tmp_path / "out", *options, "--split", "subject")) == 0
        found.append(pd.read_csv(tmp_path / "out" / "predictions.csv")["score"])
        assert "0 were there already" in capsys.readouterr().out
    assert (found[0] != found[1]).any()


@pytest.mark.parametrize(
    ("counts", "options", "shown"),
    [
        ((102, 18), [], True),
        ((22_681, 4_003), [], False),
        ((102, 18), ["--skip_missing"], False),
        ((102, 18), ["--split", "subject"], False),
        ((102, 18), ["--labels", "Pneumonia"], False),
        ((102, 18), ["--where", "Target=0", "Target=1"], False),
    ],
)
def test_published_numbers_stand_beside_results_of_all_published_images_only(
    rsna, tmp_path, monkeypatch, counts, options, shown
):
    if "--skip_missing" in options:
        rsna = shutil.copytree(rsna, tmp_path / "copy")
        next((rsna / "stage_2_train_images").iterdir()).unlink()
    monkeypatch.setattr(downstream.driver, "PUBLISHED_IMAGES", {"rsna": counts})
    assert main(command(rsna, tmp_path / "out", "--weights", "pixels", "--seeds", "43", *options)) == 0
    assert ("86.83" in (tmp_path / "out" / "table.md").read_text()) == shown
    assert set(pd.read_csv(tmp_path / "out" / "results.csv")["as_published"]) == {shown}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "arning: 18 of 18 test subjects were in the training or pretraining of encoder"),
        (("--split", "folds", "--folds", "2"), "arning: 120 of 120 test subjects were in"),
    ],
)
def test_test_subjects_that_pretrained_an_encoder_are_counted_in_the_table(rsna, encoder, tmp_path, options, told):
    seen = subject_marks([f"p{i:03d}" for i in range(120)], "rsna")
    content = torch.load(encoder, weights_only=True)
    torch.save(content | {"metadata": {"num_heads": "1", "seen": json.dumps(seen)}}, tmp_path / "encoder.pth")
    short = ["--method", "probe", "--seeds", "43", "44", "--weights", tmp_path / "encoder.pth", "random", *options]
    assert main(command(rsna, tmp_path / "out", *short)) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count(told) == 1 and text.count("test subjects were") == 1


def test_another_study_makes_best_anew(rsna, encoder, tmp_path):
    """It keeps who trained it by the study's name: after a corrected --study the old marks would tell of no overlap."""
    table = pd.DataFrame({"path": [f"p{i:03d}" for i in range(120)], "labels": ["a", "b"] * 60})
    table.to_csv(tmp_path / "table.csv", index=False)
    options = ["--dataset", "csv", "--csv", tmp_path / "table.csv", "--method", "finetune", "--epochs", "1"]
    for study in ("hospital", "mimic"):
        flags = [*options, "--seeds", "1", "--weights", encoder, "--study", study]
        assert main(command(rsna, tmp_path / "out", *flags)) == 0
    marks = subject_marks(table["path"], "mimic")
    newest = max((tmp_path / "out" / "runs").rglob("best.pth"), key=lambda path: path.stat().st_mtime_ns)
    assert len(read_tuned(newest).seen & set(marks)) == 102


def test_a_share_of_one_class_and_features_that_overflow_are_told(rsna, encoder, tmp_path, capsys):
    state = torch.load(encoder)["state_dict"]
    state["norm.bias"][0] = float("inf")
    torch.save({"state_dict": state, "metadata": {"num_heads": "1"}}, tmp_path / "inf.pth")
    with pytest.raises(UserError, match=r"finite"):
        main(command(rsna, tmp_path, "--weights", tmp_path / "inf.pth"))
    options = ["--weights", "pixels", "--fractions", "0.012", "--batch_size", "1", "--seeds", "1"]
    assert main(command(rsna, tmp_path / "out", *options)) == 0
    assert "--fractions 0.012 keeps 1 training images, all of one kind by Pneumonia" in capsys.readouterr().out


def test_bad_input_is_one_line(rsna, encoder, tmp_path):
    out = tmp_path / "out"
    main(command(rsna, tmp_path / "probed", "--weights", "pixels", "--method", "probe"))
    for options, reason in [
        ([], "--weights: name at least one"),
        (["--weights", "a=none.pth"], "none.pth: no such weights file"),
        (["--weights", "imagenet", "--imagenet", tmp_path / "no.pth"], "--weights imagenet: .*no.pth is not there"),
        (["--weights", encoder, "--fractions", "0.1"], "--batch_size 16: there are only 8 images"),
        (["--weights", "pixels", "--fractions", "0"], "--fractions 0: expected more than 0"),
        (["--weights", "pixels", "--min_positives", "10"], "no label has 10 images with it, and as many without, in test"),
        (["--lr", "0"], "--lr 0: must be above 0"),
        (["--weights", "pixels", "--device", "abacus"], "--device abacus"),
        (["--weights", "pixels", "--split", "folds", "--folds", "2"], "--folds 2: must be at least 3"),
        (["--weights", "pixels", "--split", "folds", "--folds", "121"], "--folds 121: there are only 120"),
        (["--weights", "pixels", "--output_dir", tmp_path / "probed"], "holds results of .*probe.*choose another"),
        (["--weights", "pixels", "--output_dir", encoder], "--output_dir .*encoder.pth: .*is no directory"),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            main(command(rsna, out, *options))
        assert "\n" not in str(caught.value)
        assert not (out / "results.csv").exists()
