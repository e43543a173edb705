"""MIMIC-CXR-JPG, lists of other people; and who is left out: of lists, of pretraining, damaged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from read_labelled import read_dataset

from downstream.data.labelled import TEST, TRAIN, VALID, split_table
from downstream.main import main
from util.errors import UserError

CELLS = ("", "0.0", "1.0", "-1.0")


@pytest.fixture
def mimic(tmp_path) -> Path:
    """12 subjects with two studies each, of which every image but the third is frontal; the last study has no labels."""
    studies, images, parts = [], [], []
    for i in range(24):
        subject, study = 10000000 + i // 2, 50000000 + i
        studies.append((subject, study, CELLS[i % 4], CELLS[(i + 1) % 4]))
        for view in ("PA", "AP", "LATERAL"):
            dicom = f"{study}-{view}"
            images.append((dicom, subject, study, view))
            parts.append((dicom, study, subject, ("train", "validate", "test", "test")[max(0, i // 2 - 8)]))
            file = tmp_path / f"files/p10/p{subject}/s{study}/{dicom}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    tables = {
        "chexpert": (studies[:-1], ["subject_id", "study_id", "Edema", "Fracture"]),
        "metadata": (images, ["dicom_id", "subject_id", "study_id", "ViewPosition"]),
        "split": (parts, ["dicom_id", "study_id", "subject_id", "split"]),
    }
    for name, (rows, columns) in tables.items():
        pd.DataFrame(rows, columns=columns).to_csv(tmp_path / f"mimic-cxr-2.0.0-{name}.csv.gz", index=False)
    return tmp_path


def make_tree(root: Path, *subjects: str) -> Path:
    root.mkdir()
    entries = [
        {"reflacx_id": f"r{s}", "image_path": f"p10/p{s}/s1/{s}.jpg", "study_id": s, "subject_id": s} for s in subjects
    ]
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


def test_mimic_labels_of_studies_stand_at_their_frontal_images(mimic):
    images = read_dataset("mimic", mimic, labels=["Edema", "Fracture"])
    assert len(images) == 46 and images.study == "mimic" and not any("LATERAL" in name for name in images.ids)
    value = {"": 0, "0.0": 0, "1.0": 1}
    for name, file, subject, part, labels in zip(
        images.ids, images.files, images.subjects, images.parts, images.labels, strict=True
    ):
        i = int(name[:8]) - 50000000
        assert file == mimic / f"files/p10/p{subject}/s{50000000 + i}/{name}.jpg" and int(subject) == 10000000 + i // 2
        assert part == (TRAIN, VALID, TEST, TEST)[max(0, i // 2 - 8)]
        assert (
            labels[0] == (value | {"-1.0": 1})[CELLS[i % 4]] and labels[1] == (value | {"-1.0": 0})[CELLS[(i + 1) % 4]]
        )
    notes = " ".join(images.notes)
    assert "24 images of other views are left out" in notes and "2 images of studies that are not in" in notes
    ignored = read_dataset(
        "mimic", mimic, labels=["Edema"], uncertain="ignore", empty="ignore", where=["ViewPosition=AP"]
    )
    assert len(ignored) == 23 and np.isnan(ignored.labels).sum() == 11
    rows = gzip.decompress((mimic / "mimic-cxr-2.0.0-split.csv.gz").read_bytes()).replace(b",validate", b",later")
    (mimic / "mimic-cxr-2.0.0-split.csv.gz").write_bytes(rows)
    with pytest.raises(UserError, match="'50000018-PA' has no part in mimic-cxr-2.0.0-split.csv"):
        read_dataset("mimic", mimic, labels=["Edema"])


def test_test_subjects_of_pretraining_are_counted_and_may_be_left_out(mimic, tmp_path):
    tree = make_tree(tmp_path / "tree", "10000000", "p10000011")  # one that trains, one that tests
    options = {"labels": ["Edema"], "pretrained_on": [tree]}
    images = read_dataset("mimic", mimic, **options)
    assert images.tallies == {"subjects of pretraining": {TEST: 1, TRAIN: 1}} and "warning" in images.notes[-1]
    without = read_dataset("mimic", mimic, **options, leave_out_pretrained=True)
    assert set(images.ids) - set(without.ids) == {"50000022-PA", "50000022-AP"}
    (row,) = (line for line in split_table(without).splitlines() if "left out for it" in line)
    assert row.split()[-1] == "2"
    with pytest.raises(UserError, match="pass --study mimic"):
        read_dataset("csv", mimic, csv=mimic / "mimic-cxr-2.0.0-split.csv.gz", image_column="dicom_id",
                     label_columns=["split"], subject_column="subject_id", split="subject", pretrained_on=[tree])  # fmt: skip


LISTS = [
    # lists, as people publish them, of the images a/0.png ... a/9.png
    (["0.png 1", "1.png 0"], ["2"], ["3.jpg", "4"]),
    (["path,label", "x/a/0.png,1", "'x\\a\\1.png',0"], ["a/2.png;1"], ["3\t0 1 0", "4 # end", ""]),
]


@pytest.fixture
def ten(tmp_path) -> Path:
    (tmp_path / "a").mkdir()
    pd.DataFrame({"path": [f"a/{i}.png" for i in range(10)], "subject_id": ["s0"] * 4 + [f"s{i}" for i in range(6)],
                  "labels": ["x", ""] * 5}).to_csv(tmp_path / "t.csv", index=False)  # fmt: skip
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (30, 26), np.uint8)).save(tmp_path / f"a/{i}.png")
    return tmp_path


@pytest.mark.parametrize("lists", LISTS)
def test_lists_of_others_say_who_trains_and_tests(ten, lists):
    paths = [ten / f"{part}.lst" for part in (TRAIN, VALID, TEST)]
    for path, lines in zip(paths, lists, strict=True):
        path.write_text("\n".join(lines))
    images = read_dataset("csv", ten, split_lists=paths)
    found = [f"{part} {name}" for part, name in zip(images.parts, images.ids, strict=True)]
    assert found == [f"{part} a/{i}.png" for i, part in enumerate([TRAIN, TRAIN, VALID, TEST, TEST])]
    notes = " ".join(images.notes)
    assert "5 images are in no list of the split" in notes and "1 patients are in two parts" in notes
    assert ("1 of 3 lines name no image" in notes) == ("path" in lists[0][0])
    with pytest.raises(UserError, match="leave one of them out"):
        read_dataset("csv", ten, split_lists=paths, split="folds")
    paths[2].write_text("7\n1.png")
    with pytest.raises(UserError, match="a/1.png is in the list of train too"):
        read_dataset("csv", ten, split_lists=paths)


def test_damaged_images_are_listed_at_once_or_left_out(ten, capsys):
    table = pd.read_csv(ten / "t.csv", keep_default_na=False)
    table = table.assign(split=["train"] * 4 + ["valid"] * 3 + ["test"] * 3, subject_id=range(10))
    table.to_csv(ten / "t.csv", index=False)
    for i, keep in ((1, 40), (7, 3)):  # cut off in its pixels, and in its header
        path = ten / f"a/{i}.png"
        path.write_bytes(path.read_bytes()[:-keep] if i == 1 else path.read_bytes()[:keep])
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(ten / "a/0.png")  # black, and sound
    fixed = "--dataset csv --weights pixels --method probe --device cpu --seeds 1 --num_workers 0"
    argv = [*fixed.split(), "--data_path", str(ten), "--output_dir", str(ten / "out")]
    with pytest.raises(UserError, match="2 of 10 images are damaged .*a/[17].png.*--skip_damaged leaves them out"):
        main(argv)
    printed = capsys.readouterr().out
    assert "a/1.png" in printed and "a/7.png" in printed
    assert main([*argv, "--skip_damaged"]) == 0
    printed = capsys.readouterr().out
    assert "2 damaged images are left out" in printed and "damaged images  " in printed
    split = pd.read_csv(ten / "out/split.csv").set_index("id")["split"]
    assert split.to_dict() == {name: part for name, part in zip(table["path"], table["split"]) if name[2] not in "17"}
