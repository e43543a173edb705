"""The real label tables, which torchxrayvision ships: exact counts, splits to the row, no shared patient."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
from pathlib import Path

import pandas as pd
import pytest
from read_labelled import read_dataset

from downstream.data.labelled import TEST, TRAIN, VALID, sample_fraction, study_digest
from downstream.results import PUBLISHED_IMAGES

COUNTS = [
    # data set, table of the package, its site's name, images of each part, these with the first label, digest of all
    ("siim", "siim-pneumothorax-train-rle.csv.gz", "train-rle.csv", "8432 1808 1807", "1860 404 405", "859f04282b49c039540a"),
    ("nih", "Data_Entry_2017_v2020.csv.gz", "Data_Entry_2017.csv", "78470 16821 16829", "7994 1726 1839", "cd5b5cb7d9456775b30b"),
    ("vindr", "vinbigdata-train.csv.gz", "train.csv", "10500 2250 2250", "1623 364 359", "ca72b3c44ddbd7dbb8ea"),
    (
        "padchest",
        "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz",
        "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",
        "67353 14433 14433",
        "9550 2085 2016",
        "0d4dd69247999a2cea91",
    ),
    ("chexpert", "chexpert_train.csv.gz", "train.csv", "186025 5002 148", "58037 1546 50", "6fbfe72d5869d827f77b"),
    ("rsna", "kaggle_stage_2_train_labels.csv.zip", "stage_2_train_labels.csv", "18678 4003 4003", "4162 928 922", "89156ec99f0199abf8e4"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "packed", "table", "counts", "positive", "digest"), COUNTS, ids=[row[0] for row in COUNTS]
)
def test_a_real_table_is_split_to_the_row(name, packed, table, counts, positive, digest, tmp_path):
    if (spec := importlib.util.find_spec("torchxrayvision")) is None:
        pytest.skip("torchxrayvision, which ships the real label tables, is not installed")
    source = Path(spec.submodule_search_locations[0], "data", packed)
    if packed.endswith(".zip"):
        shutil.unpack_archive(source, tmp_path)
    else:
        (tmp_path / table).write_bytes(gzip.decompress(source.read_bytes()))
    if name == "chexpert":  # whose valid.csv is not in the package
        lines = (tmp_path / table).read_text().splitlines()[:201]
        text = "\n".join(lines).replace("train/patient", "valid/patient9")
        (tmp_path / "valid.csv").write_text(text)
    images = read_dataset(name, tmp_path, need_images=False)
    parts = [images.indices(part) for part in (TRAIN, VALID, TEST)]
    assert " ".join(str(len(rows)) for rows in parts) == counts
    assert " ".join(f"{images.labels[rows, 0].sum():.0f}" for rows in parts) == positive
    assert study_digest(images) == digest
    assert pd.DataFrame({"part": images.parts}).groupby(images.subjects)["part"].nunique().max() == 1
    if name == "rsna":
        assert PUBLISHED_IMAGES[name] == (18_678 + 4_003, 4_003)
        for fraction, expected in ((0.01, (187, 36)), (0.1, (1_868, 414))):
            chosen = sample_fraction(parts[0], fraction)
            assert (len(chosen), int(images.labels[chosen, 0].sum())) == expected
