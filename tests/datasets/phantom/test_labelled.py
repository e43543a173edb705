"""Made-up RSNA, ChestX-ray14 and CheXpert: read back by the data sets' own readers, with true labels."""

from __future__ import annotations

import hashlib
from pathlib import Path

import make_phantom
import numpy as np
import pandas as pd
import pytest
from phantom_chexpert import make_chexpert
from PIL import Image

from datasets.phantom.labelled import Chests, kinds_of
from datasets.phantom.nih import FINDINGS, make_nih
from datasets.phantom.rsna import make_rsna
from downstream.data import read_dataset
from downstream.data.images import Reading
from downstream.data.labelled import TEST, TRAIN, VALID

CHESTS = Chests(n_images=48, size=(64, 52))
MAKERS = {"rsna": make_rsna, "nih": make_nih, "chexpert": make_chexpert}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom")
    return {name: make(root, CHESTS) for name, make in MAKERS.items()}


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(
        b"".join(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in files)
    ).hexdigest()


@pytest.mark.parametrize("name", MAKERS)
def test_the_reader_finds_every_image_and_the_same_seed_gives_the_same_bytes(name, studies, tmp_path):
    images = read_dataset(name, studies[name].raw)
    sizes = {Reading().read(file).shape for file in images.files}
    assert sizes == {(64, 52)}
    assert {TRAIN, VALID, TEST} == set(images.parts)
    again = MAKERS[name](tmp_path, CHESTS)
    assert digest(again.raw) == digest(studies[name].raw)
    assert "Made-up" in (again.raw / "MADE_UP.txt").read_text()


def test_rsna_boxes_are_where_the_consolidations_are(studies):
    study = studies["rsna"]
    images = read_dataset("rsna", study.raw)
    truth = {image.subject_id: image for image in study.truth}
    table = pd.read_csv(study.raw / "stage_2_train_labels.csv")
    assert len(images) == 48 and table["patientId"].duplicated().any()
    for name, label in zip(images.ids, images.labels[:, 0], strict=True):
        assert label == ("consolidation" in kinds_of(truth[name]))
        boxes = table[table["patientId"] == name].dropna()
        assert len(boxes) in ((1, 2) if label else (0,))
        if label:
            left, top = boxes[["x", "y"]].min()
            expected = next(
                box
                for lesion, box in zip(truth[name].lesions, truth[name].boxes, strict=True)
                if lesion.kind == "consolidation"
            )
            bottom = (boxes["y"] + boxes["height"]).max()
            assert (left, top, bottom) == pytest.approx((expected[0], expected[1], expected[3]), abs=0.3)


def test_chestxray14_labels_lists_folders_and_rgba(studies):
    study = studies["nih"]
    images = read_dataset("nih", study.raw)
    truth = {image.path.name: image for image in study.truth}
    for name, labels in zip(images.ids, images.labels, strict=True):
        present = {label for label, value in zip(images.label_names, labels, strict=True) if value}
        kinds = kinds_of(truth[name])
        assert {FINDINGS[kind][0] for kind in kinds} <= present
        assert present <= {label for kind in kinds for label in FINDINGS[kind]}
    folders = {file.relative_to(study.raw).parts[0] for file in images.files}
    assert folders == {"images_001", "images_002"}
    assert {Image.open(file).mode for file in images.files} == {"L", "RGBA"}
    assert len(set(images.subjects)) < len(images)
    assert (images.labels.sum(0) > 0).sum() >= 12


def test_chexpert_has_uncertain_empty_and_lateral_rows(studies):
    study = studies["chexpert"]
    train, valid = (pd.read_csv(study.raw / f"{part}.csv") for part in ("train", "valid"))
    cells = train.iloc[:, 5:].to_numpy()
    assert (cells == -1).any() and np.isnan(cells).any()
    assert set(np.unique(valid.iloc[:, 5:])) <= {0, 1}
    assert set(train["Frontal/Lateral"]) == {"Frontal", "Lateral"}
    images = read_dataset("chexpert", study.raw)
    assert len(images) == sum((table["Frontal/Lateral"] == "Frontal").sum() for table in (train, valid))
    truth = {str(image.path.relative_to(study.raw)): image for image in study.truth}
    column = images.label_names.index("Cardiomegaly")
    for name, labels in zip(images.ids, images.labels, strict=True):
        if labels[column]:  # an uncertain one counts as absent
            assert "cardiomegaly" in kinds_of(truth[name])


def test_command_line_writes_each_layout(tmp_path, capsys):
    for name in ("rsna", "nih"):
        options = ["--layout", name, "--n_images", "8", "--width", "40", "--height", "48"]
        assert make_phantom.main(["--out", str(tmp_path), *options]) == 0
        assert f"8 images in {tmp_path / name}" in capsys.readouterr().out
    assert make_phantom.main(["--out", str(tmp_path / "jpg"), *options[2:], "--layout", "rsna", "--format", "jpg"]) == 0
    assert len(list((tmp_path / "jpg/rsna").rglob("*.jpg"))) == 8
