"""Linear probe: AUCs and intervals against plain versions, no subject on both sides, baselines, bad input."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

from datasets.downstream.labels import (
    ANY_FINDING,
    LabelledImages,
    Squares,
    normalize,
    read_csv_labels,
    read_tree_labels,
)
from datasets.downstream.options import add_label_arguments, read_labels
from models_cxrmim import CXRMIM
from scripts.linear_probe import main
from util.errors import UserError
from util.export import read_backbone
from util.loading import SampleLoader
from util.probe import (
    Features,
    backbone_features,
    bootstrap_weights,
    folds,
    format_seed_table,
    format_table,
    held_out_scores,
    interval,
    probe,
    seed_table,
    weighted_auc,
)

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 images of 30 subjects; "Bright" ones are, "Chance" is drawn, "Rare" stands once."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        bright, chance = rng.random() < 0.5, rng.random() < 0.5
        gray = rng.integers(0, 80, (SIDE, SIDE)) + 120 * bright
        Image.fromarray(gray.astype(np.uint8)).save(root / f"{i}.png")
        found = [name for name, there in [("Bright", bright), ("Chance", chance), ("Rare", i == 7)] if there]
        split = "test" if i // 2 % 3 == 0 else "val" if i // 2 % 7 == 1 else "train"
        rows.append(
            {
                "path": f"{i}.png",
                "labels": "|".join(found) or "No Finding",
                "subject_id": i // 2,
                "split": split,
            }
        )
    pd.DataFrame(rows).to_csv(root / "labels.csv", index=False)
    return root


def random_images(n: int = 60, seed: int = 0) -> LabelledImages:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (n, 2)).astype(float)
    return LabelledImages(
        [Path(f"{i}") for i in range(n)], ["a", "b"], labels, (np.arange(n) // 2).astype(str), None
    )


# ---------------------------------------------------------------- AUC and bootstrap


@given(st.integers(2, 40), st.integers(0, 10_000), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_weighted_auc_is_sklearns(n, seed, distinct):
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 2, n), rng.integers(0, distinct, n) / 7
    weights = rng.integers(0, 3, (4, n))
    found = weighted_auc(labels, scores, weights)
    for value, weight in zip(found, weights, strict=True):
        if len(np.unique(labels[weight > 0])) < 2:
            assert np.isnan(value)
        else:
            assert value == pytest.approx(roc_auc_score(np.repeat(labels, weight), np.repeat(scores, weight)))


def test_bootstrap_draws_whole_subjects():
    subjects = np.array(["x", "y", "x", "z", "y"])
    weights = bootstrap_weights(subjects, 200, seed=1)
    assert weights.shape == (201, 5) and (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    assert np.array_equal(weights, bootstrap_weights(subjects, 200, seed=1))


def test_interval_covers_the_truth():
    """For normal scores with AUC Phi(1/sqrt 2) = 0.760, about 95 of 100 intervals contain it."""
    inside = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 120)
        scores = rng.normal(size=120) + labels
        weights = bootstrap_weights(np.arange(120), 300, seed)
        auc, low, high = interval(weighted_auc(labels, scores, weights))
        assert low <= auc <= high
        inside += low <= 0.7602 <= high
    assert 88 <= inside <= 100


# ---------------------------------------------------------------- splits


def test_folds_test_every_image_once_and_never_share_a_subject():
    images = random_images()
    labels = images.labels[:, 0].copy()
    labels[:3] = np.nan
    parts = folds(images, labels, split="kfold", n_folds=5, seed=0)
    assert sorted(np.concatenate([test for _, test in parts])) == list(range(3, 60))
    for train, test in parts:
        assert not set(images.subjects[train]) & set(images.subjects[test])
        assert len(train) + len(test) == 57


def test_column_split_tests_on_test_only(folder):
    images = read_csv_labels(folder / "labels.csv", folder)
    ((train, test),) = folds(images, images.labels[:, 0], split="column", n_folds=5, seed=0)
    assert set(images.splits[test]) == {"test"} and set(images.splits[train]) == {"train", "validate"}


def test_held_out_scores_know_nothing_of_the_tested_subject():
    """Features that name the subject help a leaky split to AUC 1, and a grouped one to chance."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 3)
    label_of = rng.integers(0, 2, 40)
    labels = label_of[subjects].astype(float)
    images = LabelledImages([Path()] * 120, ["a"], labels[:, None], subjects.astype(str), None)
    features = Features("subject", np.eye(40)[subjects])
    parts = folds(images, labels, split="kfold", n_folds=5, seed=0)
    scores = held_out_scores(features, images, labels, parts, seed=0)
    assert roc_auc_score(labels, scores) < 0.7
    leaky = LabelledImages(images.paths, ["a"], images.labels, np.arange(120).astype(str), None)
    parts = folds(leaky, labels, split="kfold", n_folds=5, seed=0)
    assert (
        roc_auc_score(labels, held_out_scores(features, leaky, labels, parts, seed=0)) > 0.85
    )  # how folds are drawn depends on scikit-learn


# ---------------------------------------------------------------- labels


def write_tree(root: Path, entries: list[dict]) -> Path:
    for i, entry in enumerate(entries):
        entry.setdefault("image_path", f"images/{i}.png")
        entry.setdefault("study_id", f"s{i}")
        entry.setdefault("reflacx_id", f"r{i}")
    root.mkdir(exist_ok=True)
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


def test_tree_labels(tmp_path):
    entries = [
        {"image_path": "a.png", "subject_id": 1, "split": "train",
         "labels": {"Edema": 3, "Mass": 2, "Support devices": True, "Other": "text"}},
        {"image_path": "b.png", "subject_id": 2, "split": "test",
         "labels": {"Edema": 0, "Support devices": True}},
        {"image_path": "c.png", "subject_id": 3, "split": "train", "labels": {"Edema": 5, "Mass": 0}},
        {"image_path": "c.png", "subject_id": 3, "split": "train", "labels": {"Edema": 1, "Mass": 1}},
        {"image_path": "c.png", "subject_id": 3, "split": "train", "labels": {"Edema": 0, "Mass": 1}},
    ]  # fmt: skip
    images = read_tree_labels(str(write_tree(tmp_path / "tree", entries)))
    assert images.findings == [ANY_FINDING, "Edema", "Mass", "Support devices"]
    nan = np.nan
    expected = [[1, 1, 0, 1], [0, 0, nan, 1], [0, 0, 0, nan]]
    np.testing.assert_array_equal(images.labels, expected)
    assert list(images.subjects) == ["1", "2", "3"] and list(images.splits) == ["train", "test", "train"]
    lower = read_tree_labels(str(tmp_path / "tree"), min_certainty=1)
    assert lower.labels[2].tolist()[:3] == [1, 1, 1]


def test_csv_labels(folder):
    images = read_csv_labels(folder / "labels.csv", folder)
    assert images.findings == ["Bright", "Chance", "Rare"] and len(images) == 60
    assert images.labels.sum(0)[2] == 1 and set(images.splits) == {"train", "validate", "test"}
    assert len(set(images.subjects)) == 30


def test_squares_are_the_centre_square_and_normalised_as_in_pretraining(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (40, 64), dtype=np.uint8)
    Image.fromarray(gray).save(tmp_path / "x.png")
    (square,) = Squares([tmp_path / "x.png"], 40)
    assert np.array_equal(square[0], gray[:, 12:52])
    images = normalize(square[None], (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert images.shape == (1, 3, 40, 40)
    assert images[0, 2, 3, 4] == pytest.approx((gray[3, 16] / 255 - 0.3) / 0.5, abs=1e-6)


# ---------------------------------------------------------------- features and the whole


def test_features_are_timms_and_are_cached(backbone, folder, tmp_path):
    images = read_csv_labels(folder / "labels.csv", folder)
    read = read_backbone(backbone)
    mean, cls = backbone_features("x", read, images, tmp_path, workers=0)
    model = timm.create_model("vit_base_patch16_224", **read.timm_args, num_classes=0).eval()
    model.load_state_dict(read.state)
    gray = torch.stack([Squares(images.paths, SIDE)[i] for i in (0, 59)])
    with torch.no_grad():
        tokens = model.forward_features(normalize(gray, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    np.testing.assert_allclose(cls.values[[0, 59]], tokens[:, 0], atol=1e-5)
    np.testing.assert_allclose(mean.values[[0, 59]], tokens[:, 1:].mean(1), atol=1e-5)

    (stored,) = tmp_path.iterdir()
    np.savez(stored, cls=cls.values + 1, mean=mean.values)  # to see whether it is read
    assert np.array_equal(backbone_features("x", read, images, tmp_path, workers=0)[1].values, cls.values + 1)
    random = backbone_features("r", read, images, tmp_path, random_seed=0, workers=0)
    assert not np.allclose(random[0].values, mean.values) and len(list(tmp_path.iterdir())) == 2


def test_features_of_a_tap_are_the_encoders(folder, tmp_path):
    torch.manual_seed(0)
    model = CXRMIM(
        img_size=SIDE, embed_dim=64, depth=3, num_heads=1, id_list=(0, 1), scale_list=(1.0, 0.5)
    ).eval()
    torch.save({"model": model.state_dict(), "model_config": model.config}, tmp_path / "c.pth")
    images = read_csv_labels(folder / "labels.csv", folder)
    gray = torch.stack([Squares(images.paths, SIDE)[i] for i in range(4)])
    batch = model.prepare_batch({"img": gray, "attention": torch.zeros(4, SIDE, SIDE)})
    with torch.no_grad():
        latents = model.forward_encoder(batch["img"], torch.zeros(4, model.num_patches))
    for tap, latent in (("0", latents[0]), ("last", latents[1])):
        read = read_backbone(tmp_path / "c.pth", tap=tap)
        mean, cls = backbone_features("x", read, images, tmp_path, workers=0)
        np.testing.assert_allclose(mean.values[:4], latent[:, 1:].mean(1), atol=1e-5)
        np.testing.assert_allclose(cls.values[:4], latent[:, 0], atol=1e-5)


def test_command_finds_what_is_there_and_nothing_else(backbone, folder, tmp_path, capsys):
    data = ["--csv", str(folder / "labels.csv"), "--images", str(folder)]
    options = ["--split", "kfold", "--folds", "3", "--bootstrap", "100", "--num_workers", "0"]
    argv = [str(backbone), *data, *options, "--out", str(tmp_path)]
    assert main(argv) == 0
    table = pd.read_csv(tmp_path / "probe.csv").set_index(["finding", "features"])
    networks = [
        f"{name}, {part}" for name in ("backbone", "random weights") for part in ("mean of patches", "cls")
    ]
    names = [*networks, "pixels, PCA"]
    assert list(table.loc["Bright"].index) == names
    for name in names:
        assert table.loc[("Bright", name), "auc"] > 0.95
        assert table.loc[("Chance", name), "low"] < 0.6
        assert table.loc[("Bright", name), "images"] == 60
    assert set(table.index.get_level_values(0)) == {"Bright", "Chance", "mean"}
    mean = table.loc[[("Bright", names[0]), ("Chance", names[0])], "auc"].mean()
    assert table.loc[("mean", names[0]), "auc"] == pytest.approx(mean, abs=2e-4)
    printed = capsys.readouterr().out
    assert "Rare (1)" in printed and "no ImageNet baseline" in printed and "Chance" in printed
    assert Image.open(tmp_path / "probe.png").size[0] == 1400


def test_probe_is_reproducible():
    images = random_images()
    features = [Features("f", np.random.default_rng(1).normal(size=(60, 8)))]
    options = dict(split="kfold", n_folds=3, bootstrap=50, say=lambda _: None)
    first, second = (probe(features, images, **options) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert format_table(first).splitlines()[0].strip() == "f"


def test_seed_table_pairs_runs_by_seed():
    aucs = {"random_unweighted": [0.6, 0.7, 0.8], "attention_weighted": [0.7, 0.75, 0.95]}
    rows = [
        ["Mass", f"{name}_s{seed}, cls", auc] for name, runs in aucs.items() for seed, auc in enumerate(runs)
    ]
    rows.append(["Mass", "pixels, PCA", 0.5])
    table = seed_table(pd.DataFrame(rows, columns=["finding", "features", "auc"]), "random_unweighted")
    table = table.set_index("setting")
    half = 4.302653 * np.std([0.7, 0.75, 0.95], ddof=1) / np.sqrt(3)  # t quantile of 2 degrees of freedom
    row = table.loc["attention_weighted"]
    assert (row["auc"], row["high"] - row["auc"], row["seeds"]) == pytest.approx((0.8, half, 3))
    assert row["difference"] == pytest.approx(0.1)  # of 0.1, 0.05, 0.15
    assert row["diff_high"] - 0.1 == pytest.approx(4.302653 * 0.05 / np.sqrt(3))
    text = format_seed_table(table.reset_index())
    assert "+0.100 (-0.024 to +0.224)" in text and "0.700 (" in text
    with pytest.raises(UserError, match="--reference other"):
        seed_table(pd.DataFrame(rows, columns=["finding", "features", "auc"]), "other")


def test_bad_input_is_named(backbone, folder, tmp_path):
    good = pd.read_csv(folder / "labels.csv")

    def csv(name: str, table: pd.DataFrame) -> list[str]:
        table.to_csv(tmp_path / name, index=False)
        return ["--csv", str(tmp_path / name), "--images", str(folder)]

    entries = [{"subject_id": 1, "labels": {}}]
    (folder / "text.png").write_text("no image")
    broken = pd.concat([good, good.iloc[:1].assign(path="text.png", subject_id=99)])
    one_class = good.assign(labels="Bright")
    mixed = good.assign(split=["test", "train"] * 30)
    for options, reason in [
        ([], "--data_path, or --csv"),
        ([*csv("good.csv", good), "--data_path", str(folder)], "one folder of images"),
        ([*csv("good.csv", good), "--subject_column", "patient"], "good.csv: column 'patient'"),
        ([*csv("good.csv", good), "--split_column", "fold"], "good.csv: column 'fold'"),
        ([*csv("good.csv", good), "--split", "kfold", "--folds", "1"], "--folds 1"),
        (csv("column.csv", good.drop(columns="labels")), "column.csv: column 'labels'"),
        (csv("missing.csv", good.replace("0.png", "none.png")), "missing.csv: 1 of 60 images.*none.png"),
        (csv("twice.csv", pd.concat([good, good.iloc[:1]])), "twice.csv: 0.png stands in more than one row"),
        (csv("none.csv", good.assign(labels="No Finding")), "none.csv: column 'labels' has no finding"),
        (csv("split.csv", good.assign(split="new")), "split.csv.*'new'"),
        (csv("empty.csv", good.iloc[:0]), "empty.csv: no rows"),
        (csv("mixed.csv", mixed), "subject 0 .*inside and outside of test"),
        (csv("one_class.csv", one_class), r"no finding has 10 images.*\(Bright \(0\)\)"),
        ([*csv("no_split.csv", good.drop(columns="split")), "--split", "column"], "no split column"),
        ([*csv("broken.csv", broken), "--split", "kfold"], "text.png"),
        (["--data_path", str(tmp_path / "nothing")], "nothing is not a directory"),
        (["--data_path", str(write_tree(tmp_path / "bare", [{"x": 1}]))], "bare: entry 0.*no labels"),
        (["--data_path", str(write_tree(tmp_path / "unlabelled", entries))], "no entry has a finding"),
        ([*csv("good.csv", good), "--names", "a", "b"], "--names"),
        ([*csv("good.csv", good), "--device", "cuda:99"], "--device cuda:99"),
        ([*csv("good.csv", good), "--device", "abacus"], "--device abacus"),
        ([*csv("good.csv", good), "--split", "kfold", "--imagenet", str(tmp_path / "no.pth")], "no.pth"),
        (
            [*csv("good.csv", good), "--split", "kfold", "--folds", "31", "--min_positives", "31"],
            "--folds 31",
        ),
    ]:
        with pytest.raises(UserError, match=reason) as caught:
            main(
                [
                    str(backbone),
                    *options,
                    "--out",
                    str(tmp_path / "out"),
                    "--num_workers",
                    "0",
                    "--bootstrap",
                    "10",
                ]
            )
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "probe.csv").exists()


def test_an_unreadable_image_is_one_line_from_a_loader_worker_too(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    loader = SampleLoader(Squares([tmp_path / "text.png"], 32), num_workers=1)
    with pytest.raises(UserError) as caught:
        next(iter(loader))
    assert str(caught.value) == f"{tmp_path / 'text.png'}: not a PNG or JPG image"


def test_paths_of_a_csv_start_from_its_own_folder_or_the_one_named(folder, tmp_path):
    parser = argparse.ArgumentParser()
    add_label_arguments(parser)
    shutil.copy(folder / "labels.csv", tmp_path / "elsewhere.csv")
    for options in (
        ["--csv", str(folder / "labels.csv")],
        ["--csv", str(tmp_path / "elsewhere.csv"), "--data_path", str(folder)],
        ["--csv", str(tmp_path / "elsewhere.csv"), "--images", str(folder)],
    ):
        assert read_labels(parser.parse_args(options)).paths[0] == folder / "0.png"
    assert not list((tmp_path / "out").glob("probe.*"))
