"""The real label tables, which torchxrayvision ships: exact counts, published splits, no shared patient."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datasets.downstream import read_dataset
from datasets.downstream.labelled import TEST, TRAIN, VALID, LabelledImages, sample_fraction


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
    for fraction, expected in ((0.01, (187, 36)), (0.1, (1_868, 414)), (1, (18_678, 4_162))):
        chosen = sample_fraction(images, fraction)
        assert (len(chosen), int(images.labels[chosen, 0].sum())) == expected
        assert (images.parts[chosen] == TRAIN).all()


def test_chestxray14_keeps_patients_apart_without_its_lists_and_says_so(tables, tmp_path):
    root = unpack(tables, "Data_Entry_2017_v2020.csv.gz", tmp_path / "Data_Entry_2017_v2020.csv")
    images = read_dataset("nih", root, need_images=False)
    assert len(images) == 112_120
    assert len(set(images.subjects)) == 30_805
    by_part = [set(images.subjects[images.indices(part)]) for part in (TRAIN, VALID, TEST)]
    assert sum(map(len, by_part)) == 30_805
    assert any("test_list.txt" in note and "warning" in note for note in images.notes)
    # Every eighth patient in the official test list: the rest of the test's patients go nowhere else.
    ids = np.array(images.ids)
    test = np.isin(images.subjects, np.unique(images.subjects)[::8])
    (tmp_path / "test_list.txt").write_text("\n".join(ids[test]))
    (tmp_path / "train_val_list.txt").write_text("\n".join(ids[~test]))
    official = read_dataset("nih", root, need_images=False)
    assert set(np.array(official.ids)[official.indices(TEST)]) == set(ids[test])
    assert len(official.indices(VALID)) / (~test).sum() == pytest.approx(1 / 8, abs=0.001)
    assert not official.notes


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
    ignored = read_dataset("chexpert", root, need_images=False, uncertain="ignore", empty="ignore")
    assert images.ids == ignored.ids
    # -1 is the only cell that the published rule turns into 1 for one label and into 0 for another.
    assert np.nansum(images.labels[:, 0]) > np.nansum(ignored.labels[:, 0])
    assert np.nansum(images.labels[:, 1]) == np.nansum(ignored.labels[:, 1])
    assert np.isnan(ignored.labels).any() and not np.isnan(images.labels).any()
