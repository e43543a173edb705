"""From a checkpoint to the tables: linear heads, probes, what goes on where it was, and bad input."""

from __future__ import annotations

import json
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
from datasets.phantom.label_study import make_rsna
from downstream.evaluate import read_tuned
from downstream.main import main
from util.errors import UserError
from util.subjects import subject_marks


@pytest.fixture(scope="session")
def rsna(tmp_path_factory) -> Path:
    """120 patients in the layout of the RSNA challenge."""
    options = {"image_format": "jpg", "normal_fraction": 0.6, "lesion_kinds": ["consolidation"]}
    return make_rsna(tmp_path_factory.mktemp("rsna site"), 120, size=(64, 56), **options).raw


def patients(rsna: Path) -> list[str]:
    return list(pd.read_csv(rsna / "stage_2_train_labels.csv")["patientId"].unique())


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A small ViT for 224 px with random weights, and with more heads than its width suggests."""
    torch.manual_seed(1)
    model = timm.create_model("vit_base_patch16_224", embed_dim=64, depth=1, num_heads=2, num_classes=0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save({"state_dict": model.state_dict(), "metadata": {"num_heads": "2"}}, path)
    return path


def command(root: Path, out: Path, *options: object) -> list[str]:
    fixed = "--dataset rsna --device cpu --num_workers 0 --bootstrap 200 --batch_size 16 --epochs 4 --views 2".split()
    return [*fixed, "--data_path", str(root), "--output_dir", str(out), *map(str, options)]


def check_aucs(out: Path) -> pd.DataFrame:
    """results.csv against scikit-learn on predictions.csv; returns it."""
    results, predictions = (pd.read_csv(out / f"{name}.csv") for name in ("results", "predictions"))
    keys = ["weights", "fraction", "seed", "label"]
    assert not predictions.duplicated([*keys, "id"]).any()
    found = results[results["label"] != "mean"].set_index(keys)
    groups = predictions.groupby(keys)
    assert len(groups) == len(found)
    for key, group in groups:
        models = [own for _, own in group.groupby("fold")] if "fold" in group else [group]
        aucs = [roc_auc_score(own["target"], own["score"]) for own in models]
        assert found.loc[key, "auc"] == pytest.approx(np.mean(aucs), abs=1e-8)
        assert found.loc[key, "n"] == len(group) and found.loc[key, "n_positive"] == group["target"].sum()
    means = results[results["label"] == "mean"].set_index(keys[:3])["auc"]
    pd.testing.assert_series_equal(means, found.groupby(keys[:3], sort=False)["auc"].mean())
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
    assert printed.count("_our$1: 120 images encoded") == 1  # 2 views of 42, 36 to judge
    assert printed.count("_our$1: 84 images encoded") == 1  # 2 views of 42 more
    assert "matched   18  cls_token" in printed and "missing    0" in printed
    assert "| _our$1 | 50% | 2 |" in (out / "table.md").read_text()
    assert Image.open(out / "results.png").size[0] >= 1200
    split = pd.read_csv(out / "split.csv")
    assert split["split"].value_counts().to_dict() == {"train": 84, "valid": 18, "test": 18}

    # Other fractions and seeds encode nothing again; what was trained is not trained again.
    first = (out / "results.csv").read_text()
    main(command(rsna, out, *weights, "--fractions", "0.5", "--seeds", "43", "50"))
    printed = capsys.readouterr().out
    assert "seed 50: best epoch" in printed and "seed 43: best epoch" not in printed
    main(command(rsna, out, *weights, "--fractions", "0.5", "1", "--seeds", "43", "44"))
    assert (out / "results.csv").read_text() == first
    main(command(rsna, tmp_path / "b", *weights, "--seeds", "44", "--features_dir", out / "features"))
    assert "images encoded" not in printed + capsys.readouterr().out


def test_probe_in_grouped_folds_tests_every_image_once(rsna, encoder, tmp_path, capsys):
    options = ["--method", "probe", "--split", "folds", "--folds", "3", "--seeds", "0", "1"]
    main(command(rsna, tmp_path, "--weights", f"ours={encoder}", "pixels", *options))
    results = check_aucs(tmp_path)
    assert list(dict.fromkeys(results["weights"])) == ["ours, cls", "ours, mean of patches", "pixels"]
    assert (results["n"] == 120).all() and (results["auc"] > 0.7).all()
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert set(predictions["fold"]) == {1, 2, 3}
    scores = predictions.groupby("weights")["score"].apply(list)
    assert scores["ours, cls"] != scores["ours, mean of patches"]
    assert "too narrow" in (tmp_path / "table.md").read_text() and "too narrow" in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "split.csv", keep_default_na=False)["split"]) == {""}


def test_a_study_that_is_there_stays_as_it_is(rsna, tmp_path):
    argv = command(rsna, tmp_path, "--weights", "pixels", "--seeds", "1")
    assert main(argv) == 0
    (tmp_path / "results.png").unlink()
    split = (tmp_path / "split.csv").read_text()
    for other in (["--split", "subject"], ["--labels", "Pneumonia", "--split", "folds"], ["--method", "probe"]):
        with pytest.raises(UserError, match="holds results of .*rsna.*linear.*choose another"):
            main([*argv, *other, "--dry_run"])
    assert main([*argv, "--dry_run"]) == 0 and (tmp_path / "split.csv").read_text() == split
    assert main(argv) == 0 and (tmp_path / "results.png").exists()


def test_dry_run_tells_what_a_run_would_refuse_hours_later(rsna, tmp_path, capsys):
    bare, out = tmp_path / "bare", tmp_path / "out"  # without images
    bare.mkdir()
    shutil.copy(rsna / "stage_2_train_labels.csv", bare)
    argv = command(bare, out, "--dry_run", "--batch_size", "8", "--fractions")
    for options, reason in [
        (["1", "0.08"], "--batch_size 8: there are only 7 images"),
        (["0.1", "--weights", "ours=none.pth", "--method", "evaluate"], "none.pth"),
        (["1", "--method", "probe", "--split", "folds", "--folds", "100"], "--folds 100: no label has so many images"),
    ]:
        with pytest.raises(UserError, match=reason):
            main([*argv, *options])
    capsys.readouterr()
    assert main([*argv, "1", "0.08", "--method", "probe"]) == 0  # which has no batches
    assert main([*argv, "0.1", "--weights", "random", "pixels"]) == 0
    printed = capsys.readouterr().out
    assert ["images", "84", "18", "18"] in [line.split() for line in printed.splitlines()]
    assert "random: random weights" in printed
    assert sorted(path.name for path in out.glob("[!.]*")) == ["split.csv"]


def test_features_of_other_heads_are_other_features(rsna, encoder, tmp_path, capsys):
    """The same weights with another number of attention heads are another encoder."""
    torch.save(torch.load(encoder)["state_dict"], tmp_path / "plain.pth")
    options = ["--weights", tmp_path / "plain.pth", "--seeds", "43", "--views", "1", "--num_heads"]
    for heads in (1, 2):
        assert main(command(rsna, tmp_path / "out", *options, heads)) == 0
        assert "plain: 120 images encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "options", "shown"),
    [
        ((102, 18), [], True),
        ((22_681, 4_003), [], False),
        ((102, 18), ["--skip_missing"], False),
        ((102, 18), ["--split", "subject"], False),
        ((102, 18), ["--labels", "Pneumonia"], False),
        ((102, 18), ["--fractions", "0.5"], False),
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


@pytest.mark.parametrize(("folds", "n"), [([], 18), (["--split", "folds", "--folds", "2"], 120)])
def test_test_subjects_that_pretrained_an_encoder_are_counted_in_the_table(rsna, encoder, tmp_path, folds, n):
    seen = json.dumps(subject_marks(patients(rsna), "rsna"))
    content = torch.load(encoder, weights_only=True) | {"metadata": {"num_heads": "2", "seen": seen}}
    torch.save(content, tmp_path / "encoder.pth")
    short = ["--method", "probe", "--seeds", "43", "44", "--weights", tmp_path / "encoder.pth", "random", *folds]
    assert main(command(rsna, tmp_path / "out", *short)) == 0
    text = (tmp_path / "out" / "table.md").read_text()
    assert f"warning: {n} of {n} test subjects were in the training or pretraining of encoder" in text
    assert text.count("test subjects were") == 1


def test_another_study_makes_best_anew(rsna, encoder, tmp_path):
    """It keeps who trained it by the study's name: after a corrected --study the old marks would tell of no overlap."""
    names = patients(rsna)
    pd.DataFrame({"path": names, "labels": ["a", "b"] * 60}).to_csv(tmp_path / "table.csv", index=False)
    options = ["--dataset", "csv", "--csv", tmp_path / "table.csv", "--method", "finetune", "--epochs", "1"]
    options += ["--seeds", "1", "--weights", encoder, "--study"]
    for study in ("hospital", "mimic"):
        assert main(command(rsna, tmp_path / "out", *options, study)) == 0
    newest = max((tmp_path / "out" / "runs").rglob("best.pth"), key=lambda path: path.stat().st_mtime_ns)
    assert len(read_tuned(newest).seen & set(subject_marks(names, "mimic"))) == 102


def test_bad_input_is_one_line(rsna, encoder, tmp_path):
    pixels, content = ["--weights", "pixels"], torch.load(encoder)
    content["state_dict"]["norm.bias"][0] = 3e38
    torch.save(content, tmp_path / "inf.pth")
    cases = [
        ([], "--weights: name at least one"),
        (["--weights", "a=none.pth"], "none.pth: no such weights file"),
        (["--weights", "imagenet", "--imagenet", tmp_path / "no.pth"], "--weights imagenet: .*no.pth is not there"),
        (["--weights", tmp_path / "inf.pth"], "inf: features are not finite; pass --dtype float32"),
        ([*pixels, "--method", "finetune"], "--weights pixels: only timm's encoders are fine-tuned"),
        (["--weights", encoder, "--method", "finetune", "--lr", "1e30"], "lower --lr or use --dtype float32"),
        ([*pixels, "--fractions", "0"], "--fractions 0: expected more than 0"),
        ([*pixels, "--min_positives", "10"], "no label has 10 images with it, and as many without, in test"),
        ([*pixels, "--lr", "0"], "--lr 0: must be above 0"),
        ([*pixels, "--device", "abacus"], "--device abacus"),
        ([*pixels, "--split", "folds", "--folds", "2"], "--folds 2: must be at least 3"),
        ([*pixels, "--split", "folds", "--folds", "121"], "--folds 121: there are only 120"),
        ([*pixels, "--output_dir", encoder], "--output_dir .*encoder.pth: .*is not a directory"),
    ]
    for number, (options, reason) in enumerate(cases):
        with pytest.raises(UserError, match=reason) as caught:
            main(command(rsna, tmp_path / str(number), *options))
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("results.csv"))
