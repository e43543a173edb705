"""The real label tables, which torchxrayvision ships: exact counts, published splits, no shared patient."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from read_labelled import read_dataset

from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages, sample_fraction
from downstream.results import PUBLISHED_IMAGES


@pytest.fixture(scope="module")
def tables() -> Path:
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None:
        pytest.skip("torchxrayvision, which ships the real label tables, is not installed")
    return Path(spec.submodule_search_locations[0], "data")


def unpack(tables: Path, name: str, place: Path) -> Path:
    """A table of the package under its site's name."""
    with gzip.open(tables / name) as source, open(place, "wb") as file:
        shutil.copyfileobj(source, file)
    return place.parent


def counts(images: LabelledImages, label: int = 0) -> dict[str, tuple[int, int]]:
    return {
        part: (len(images.indices(part)), int(np.nansum(images.labels[images.indices(part), label])))
        for part in (TRAIN, VALID, TEST)
    }


def test_rsna_is_split_as_published_to_the_row(tables, tmp_path):
    with zipfile.ZipFile(tables / "kaggle_stage_2_train_labels.csv.zip") as archive:
        archive.extractall(tmp_path)
    images = read_dataset("rsna", tmp_path, need_images=False)
    assert len(images) == 26_684 == len(set(images.subjects))
    assert counts(images) == {TRAIN: (18_678, 4_162), VALID: (4_003, 928), TEST: (4_003, 922)}
    assert PUBLISHED_IMAGES["rsna"] == (18_678 + 4_003, 4_003)
    for fraction, expected in ((0.01, (187, 36)), (0.1, (1_868, 414)), (1, (18_678, 4_162))):
        chosen = sample_fraction(images.indices(TRAIN), fraction)
        assert (len(chosen), int(images.labels[chosen, 0].sum())) == expected
        assert (images.parts[chosen] == TRAIN).all()


def test_chestxray14_without_its_lists_keeps_patients_apart_and_says_so(tables, tmp_path):
    root = unpack(tables, "Data_Entry_2017_v2020.csv.gz", tmp_path / "Data_Entry_2017_v2020.csv")
    images = read_dataset("nih", root, need_images=False)
    assert len(images) == 112_120
    assert len(set(images.subjects)) == 30_805
    by_part = [set(images.subjects[images.indices(part)]) for part in (TRAIN, VALID, TEST)]
    assert sum(map(len, by_part)) == 30_805
    assert any("no split is given" in note for note in images.notes)


def test_chexpert_has_191027_frontal_images_and_its_uncertain_labels_as_published(tables, tmp_path):
    root = unpack(tables, "chexpert_train.csv.gz", tmp_path / "train.csv")
    header, *rows = (tmp_path / "train.csv").read_text().splitlines()
    patients = [row.replace("train/patient", "valid/patient9") for row in rows[:200]]
    (tmp_path / "valid.csv").write_text("\n".join([header, *patients]))
    images = read_dataset("chexpert", root, need_images=False)
    train_and_valid = len(images.indices(TRAIN)) + len(images.indices(VALID))
    assert train_and_valid == 191_027
    assert 5_000 <= len(images.indices(VALID)) < 5_100
    assert images.strong_augmentation
    assert images.label_names == ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    # As published an uncertain atelectasis counts as present, an uncertain consolidation as absent.
    frame = pd.read_csv(tmp_path / "train.csv")
    frame = frame[frame["Frontal/Lateral"] == "Frontal"]
    in_train_csv = np.concatenate([images.indices(TRAIN), images.indices(VALID)])
    for label, values in (("Atelectasis", [1, -1]), ("Consolidation", [1])):
        present = images.labels[in_train_csv, images.label_names.index(label)].sum()
        assert present == frame[label].isin(values).sum()


def test_siim_has_12047_images_in_12954_rows(tables, tmp_path):
    root = unpack(tables, "siim-pneumothorax-train-rle.csv.gz", tmp_path / "train-rle.csv")
    images = read_dataset("siim", root, need_images=False)
    assert len(images) == 12_047
    # 9,378 rows say -1, one for each image without a mask.
    assert int(images.labels.sum()) == 12_047 - 9_378
    assert {part: count for part, (count, _) in counts(images).items()} == {TRAIN: 8432, VALID: 1808, TEST: 1807}
    assert any("own subject" in note for note in images.notes)




