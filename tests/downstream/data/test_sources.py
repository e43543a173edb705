"""Data sets from small folders as people have them: layouts, splits, labels, and what bad input gets."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import prepare_reflacx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from downstream.data import DATASETS, read_dataset
from downstream.data.folder import Folder
from downstream.data.labelled import (
    PARTS,
    TEST,
    TRAIN,
    VALID,
    LabelledImages,
    check_labels,
    files_digest,
    sample_fraction,
    split_table,
    write_split,
)
from downstream.data.splits import split_by_subject
from datasets.phantom.reflacx import make_study
from util.errors import UserError


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def refused(*args, **choices) -> str:
    """The one line that a bad input gets."""
    with pytest.raises(UserError) as caught:
        read_dataset(*args, **choices)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def rsna(tmp_path) -> Path:
    rows = [f"p{i:02d},,,,,{i % 2}" for i in range(40)] + ["p01,5,5,9,9,1"]
    write(tmp_path / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *rows)
    return tmp_path


@pytest.fixture
def nih(tmp_path) -> Path:
    ids = [f"{patient:08d}_{k:03d}.png" for patient in range(20) for k in range(2)]
    findings = ["No Finding", "Mass|Hernia", "Effusion"]
    rows = [f"{name},{findings[i % 3]},{i // 2},{'PA' if i % 4 else 'AP'}" for i, name in enumerate(ids)]
    write(tmp_path / "Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID,View Position", *rows)
    write(tmp_path / "train_val_list.txt", *ids[:32])
    write(tmp_path / "test_list.txt", *ids[32:])
    return tmp_path


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [f"{i}.png,{i % 2},{'' if i % 5 == 4 else (i // 2) % 2},s{i // 2}" for i in range(40)]
    return write(tmp_path / "labels.csv", "path,A,B,subject_id", *rows)


# ---------------------------------------------------------------- where images are


def test_ids_are_found_nested_flat_and_with_any_suffix(rsna):
    touch(rsna, *(f"stage_2_train_images/p{i:02d}.dcm" for i in range(20)))
    touch(rsna, *(f"elsewhere/deeper/p{i:02d}.PNG" for i in range(20, 40)), ".cache/p00.dcm", "__MACOSX/p01.dcm")
    images = read_dataset("rsna", rsna)
    assert len(images) == 40 and all(file.is_file() for file in images.files)
    assert all(file.stem == name for file, name in zip(images.files, images.ids, strict=True))


def test_chestxray14_in_its_twelve_folders_is_found(nih):
    names = pd.read_csv(nih / "Data_Entry_2017.csv")["Image Index"]
    touch(nih, *(f"images_{1 + i // 7:03d}/images/{name}" for i, name in enumerate(names)))
    images = read_dataset("nih", nih)
    assert [file.name for file in images.files] == images.ids
    official = set((nih / "test_list.txt").read_text().split())
    assert {images.ids[i] for i in images.indices(TEST)} == official
    assert len(set(images.subjects[images.indices(VALID)])) == 2  # an eighth of 16 patients
    assert images.strong_augmentation and not images.notes


def chexpert(root: Path, prefix: str = "CheXpert-v1.0-small/") -> None:
    header = (
        "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,"
        "Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,"
        "Fracture,Support Devices"
    )
    cells = ["", "0.0", "1.0", "-1.0"]
    for part, patients in (("train", range(1, 25)), ("valid", range(100, 104))):
        rows = [
            f"{prefix}{part}/patient{p:05d}/study{s}/view{v}_{'frontal' if v == 1 else 'lateral'}.jpg,F,50,"
            f"{'Frontal' if v == 1 else 'Lateral'},AP," + ",".join(cells[(p + k) % 4] for k in range(14))
            for p in patients
            for s in (1, 2)
            for v in (1, 2)
        ]
        write(root / f"{part}.csv", header, *rows)
        touch(root, *(row.partition(",")[0].removeprefix(prefix) for row in rows))


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", "", "a/b/c/"])
def test_chexpert_is_found_whatever_the_root_is_called(tmp_path, prefix):
    root = tmp_path / "my copy of it"
    chexpert(root, prefix)
    images = read_dataset("chexpert", root)
    assert len(images) == 48 + 8
    for file, name, part in zip(images.files, images.ids, images.parts, strict=True):
        assert file == root / name and name.endswith("view1_frontal.jpg")
        assert name.startswith("valid/" if part == TEST else "train/")
    assert len(set(images.ids)) == len(images)


def test_uncertain_and_empty_cells_of_chexpert(tmp_path):
    chexpert(tmp_path)
    raw = pd.concat(pd.read_csv(tmp_path / f"{part}.csv") for part in ("train", "valid"))
    raw = raw[raw["Frontal/Lateral"] == "Frontal"].set_index("Path")
    rules = {
        "published": ({"Atelectasis": 1, "Edema": 1, "Pleural Effusion": 1}, None),
        "zeros": ({}, "zeros"),
        "ones": (dict.fromkeys(raw, 1), "ignore"),
        "ignore": (dict.fromkeys(raw, np.nan), None),
    }
    for uncertain, (value_of, empty) in rules.items():
        images = read_dataset("chexpert", tmp_path, uncertain=uncertain, empty=empty)
        for i, name in enumerate(images.ids):
            row = raw.loc[f"CheXpert-v1.0-small/{name}"]
            for k, label in enumerate(images.label_names):
                expected = row[label]
                if expected == -1:
                    expected = value_of.get(label, 0)
                elif np.isnan(expected):
                    expected = np.nan if empty == "ignore" else 0
                assert np.array_equal(images.labels[i, k], np.float32(expected), equal_nan=True)


def test_the_published_draw_of_chexpert_says_that_patients_are_shared(tmp_path):
    chexpert(tmp_path)
    images = read_dataset("chexpert", tmp_path, split="published")
    shared = set(images.subjects[images.indices(TRAIN)]) & set(images.subjects[images.indices(VALID)])
    assert shared and any(f"{len(shared)} patients are in two parts" in note for note in images.notes)
    assert not read_dataset("chexpert", tmp_path).shared_subjects
    (tmp_path / "valid.csv").unlink()
    assert "valid.csv" in refused("chexpert", tmp_path) and "--split subject" in refused("chexpert", tmp_path)
    assert set(read_dataset("chexpert", tmp_path, split="subject").parts) == set(PARTS)


def test_an_image_that_could_be_two_files_is_asked_about(rsna):
    touch(rsna, *(f"images/p{i:02d}.png" for i in range(40)))
    write(rsna / "masks/p07.png", "something longer")
    message = refused("rsna", rsna)
    assert "images/p07.png" in message and "masks/p07.png" in message and "--images" in message
    assert len(read_dataset("rsna", rsna, images=rsna / "images")) == 40
    (rsna / "masks/p07.png").write_bytes((rsna / "images/p07.png").read_bytes())  # a copy is no question
    same_size = bytearray((rsna / "images/p07.png").read_bytes())
    same_size[0] ^= 1
    (rsna / "masks/p07.png").write_bytes(same_size)
    assert "masks/p07.png" in refused("rsna", rsna)
    (rsna / "masks/p07.png").write_bytes((rsna / "images/p07.png").read_bytes())
    touch(rsna, "dicom/p08.dcm")
    images = read_dataset("rsna", rsna)
    assert images.files[images.ids.index("p08")].suffix == ".png"
    assert any("2 images are there more than once" in note for note in images.notes)


def test_missing_images_are_named_and_may_be_skipped(nih):
    names = list(pd.read_csv(nih / "Data_Entry_2017.csv")["Image Index"])
    touch(nih, *(f"images/{name}" for name in names[4:]))
    message = refused("nih", nih)
    assert "4 of 40 images are missing" in message and "36 image files are below" in message
    assert "--skip_missing" in message
    whole = read_dataset("nih", nih, need_images=False)
    images = read_dataset("nih", nih, skip_missing=True)
    # The split of the others is that of the whole.
    assert dict(zip(images.ids, images.parts)) == {
        name: part for name, part in zip(whole.ids, whole.parts) if name not in names[:4]
    }
    assert any("4 of 40 images are missing and left out" in note for note in images.notes)
    assert "no image" in refused("nih", nih, images=write(nih / "empty/a.txt", "").parent, skip_missing=True)


def test_a_path_is_never_matched_by_its_name_alone(tmp_path):
    rows = [f"{part}/{i}.png,{i % 2}" for part in ("train", "test") for i in range(5)]
    path = write(tmp_path / "labels.csv", "path,labels", *rows)
    touch(tmp_path, *(f"train/{i}.png" for i in range(5)), *(f"test/{i}.png" for i in range(1, 5)))
    assert "1 of 10 images are missing, e.g. 'test/0.png'" in refused("csv", tmp_path, split="folds")
    touch(tmp_path, "test/0.png")
    images = read_dataset("csv", tmp_path, split="folds")
    assert [file.relative_to(tmp_path).as_posix() for file in images.files] == images.ids
    absolute = [f"{tmp_path}/{row}" for row in rows]
    write(path, "path,labels", *absolute)
    assert read_dataset("csv", tmp_path, split="folds").files == images.files


def test_names_that_differ_in_their_suffix_alone_are_two_images(tmp_path):
    write(tmp_path / "labels.csv", "path,labels", "1.png,1", "1.jpg,0", "b\\2.png,1", "./3.png,0")
    touch(tmp_path, "x/1.png", "x/1.jpg", "b/2.png", "3.png")
    images = read_dataset("csv", tmp_path, split="folds")
    found = [file.relative_to(tmp_path).as_posix() for file in images.files]
    assert found == ["x/1.png", "x/1.jpg", "b/2.png", "3.png"]


def test_a_circle_of_links_ends(rsna):
    touch(rsna, *(f"images/p{i:02d}.png" for i in range(40)))
    (rsna / "images/again").symlink_to(rsna)
    assert len(read_dataset("rsna", rsna)) == 40
    assert len([file for file in Folder(rsna).files if file.endswith("p00.png")]) <= 2


# ---------------------------------------------------------------- splits


def test_rsna_is_sorted_and_split_by_the_published_calls(rsna):
    images = read_dataset("rsna", rsna, need_images=False)
    frame = pd.DataFrame({"id": sorted(set(images.ids))})
    train, rest = train_test_split(frame, test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    for part, expected in ((TRAIN, train), (VALID, valid), (TEST, test)):
        assert [images.ids[i] for i in images.indices(part)] == list(expected["id"])
    fraction = train.sample(frac=0.5, random_state=42)["id"]
    assert [images.ids[i] for i in sample_fraction(images.indices(TRAIN), 0.5)] == list(fraction)
    for bad in (0, -1, 1.5, 0.001, float("nan")):
        with pytest.raises(UserError, match="--fractions"):
            sample_fraction(images.indices(TRAIN), bad)


@given(st.lists(st.integers(0, 30), min_size=6, max_size=80), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_split_by_subject_never_shares_one_and_ignores_the_order(numbers, seed):
    subjects = np.array([f"s{n}" for n in numbers])
    if len(set(numbers)) < 3:
        with pytest.raises(UserError, match="too few"):
            split_by_subject("made up", subjects, seed)
        return
    parts = split_by_subject("made up", subjects, seed)
    assert set(parts) == set(PARTS)
    part_of = dict(zip(subjects, parts))
    assert all(part_of[s] == p for s, p in zip(subjects, parts))
    again = split_by_subject("made up", subjects[::-1], seed)
    assert np.array_equal(again, parts[::-1])


def test_folds_and_test_give_no_parts_and_one(rsna):
    assert set(read_dataset("rsna", rsna, need_images=False, split="folds").parts) == {""}
    assert set(read_dataset("rsna", rsna, need_images=False, split="test").parts) == {TEST}


def test_official_lists_must_be_whole_and_apart(nih):
    lists = nih / "train_val_list.txt", nih / "test_list.txt"
    name = lists[1].read_text().split()[0]
    lists[0].write_text(lists[0].read_text() + name + "\n")
    assert name in refused("nih", nih, need_images=False) and "train_val_list" in refused("nih", nih)
    lists[0].unlink()
    assert "train_val_list.txt is missing" in refused("nih", nih, need_images=False)
    lists[1].unlink()
    images = read_dataset("nih", nih, need_images=False)
    assert any("warning" in note and "official split" in note for note in images.notes)
    assert "--split published" in refused("nih", nih, need_images=False, split="published")


def test_a_patient_in_two_official_lists_is_named(nih):
    names = list(pd.read_csv(nih / "Data_Entry_2017.csv")["Image Index"])
    write(nih / "train_val_list.txt", *names[:31])
    write(nih / "test_list.txt", *names[31:])
    message = refused("nih", nih, need_images=False)
    assert "subject '15' has images in test and" in message and "--split subject" in message


def test_covidx_splits_patients_not_images_and_offers_the_published(tmp_path):
    rows = [f"{i // 3} file {i}.png {'COVID-19' if i % 2 else 'normal'} src" for i in range(60)]
    write(tmp_path / "train.txt", *rows)
    write(tmp_path / "test.txt", "900 a.png normal src", "901 b.jpg COVID-19 src", "0 c.jpg pneumonia other")
    touch(tmp_path, *(f"train/file {i}.png" for i in range(60)), "test/a.png", "test/b.jpg", "test/c.jpg")
    images = read_dataset("covidx", tmp_path)
    assert images.task == "multiclass" and images.label_names == ["COVID-19", "normal", "pneumonia"]
    assert len(images.indices(VALID)) == 12
    assert images.files[images.ids.index("train/file 7.png")].name == "file 7.png"
    published = read_dataset("covidx", tmp_path, split="published")
    _, drawn = train_test_split(np.arange(60), test_size=0.2, random_state=0)
    assert [published.ids[i] for i in published.indices(VALID)] == [f"train/file {i}.png" for i in drawn]
    pairs = set(zip(published.subjects, published.parts, strict=True))
    assert any(f"{len(pairs) - 23} patients are in two parts" in note for note in published.notes)
    assert len(read_dataset("covidx", tmp_path, where=["source=src"])) == 62
    with pytest.raises(UserError, match="'pneumonia' is absent from every training image"):
        check_labels(images)
    write(tmp_path / "test.txt", "900 a.png normal")
    assert "line 1" in refused("covidx", tmp_path)


@pytest.mark.parametrize("release", ["", "_COVIDx9A"])
def test_covidx_validates_on_its_own_list(tmp_path, release):
    rows = [f"{i} {i}.png {'COVID-19' if i % 2 else 'normal'} src" for i in range(12)]
    for name, some in (("train", rows[:6]), ("val", rows[6:9]), ("test", rows[9:])):
        write(tmp_path / f"labels/{name}{release}.txt", *some)
        touch(tmp_path, *(f"{name}/{row.split()[1]}" for row in some))
    for split in ("auto", "published"):
        images = read_dataset("covidx", tmp_path, split=split)
        assert images.ids == [f"{'train' if i < 6 else 'val' if i < 9 else 'test'}/{i}.png" for i in range(12)]
        assert list(images.parts) == [TRAIN] * 6 + [VALID] * 3 + [TEST] * 3
    for name in ("train", "test"):
        shutil.copy(tmp_path / f"labels/{name}{release}.txt", tmp_path / f"labels/{name}_COVIDx9B.txt")
    assert "name the table by --csv" in refused("covidx", tmp_path)
    other = read_dataset("covidx", tmp_path, csv=tmp_path / "labels/train_COVIDx9B.txt")
    assert len(other) == 9 and len(other.indices(VALID)) == 1
    assert "expected the list that trains" in refused("covidx", tmp_path, csv=tmp_path / f"labels/test{release}.txt")


# ---------------------------------------------------------------- labels of a CSV


def test_the_study_of_a_csv_is_what_the_user_says(table, tmp_path):
    """Patients 1 to N of two hospitals are different people."""
    for study, found in ((" NIH", "nih"), (None, "")):
        options = {"need_images": False, "label_columns": ["A", "B"], "study": study}
        assert read_dataset("csv", table.parent, **options).study == found
    assert "--study has no effect" in refused("rsna", tmp_path, study="nih")
    # Another word for a known study would tell of no overlap with it.
    assert "--study MIMIC-CXR: " in refused("csv", table.parent, study="MIMIC-CXR")


def test_files_replaced_with_equal_size_and_time_are_other_files(tmp_path):
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "b.png").write_bytes(b"2")
    shutil.copystat(tmp_path / "a.png", tmp_path / "b.png")
    part = np.array([""])
    images = LabelledImages("x", ["a"], [tmp_path / "a.png"], np.array(["s"]), part, ["A"], np.ones((1, 1), np.float32))
    before = files_digest(images)
    assert files_digest(images) == before
    (tmp_path / "b.png").replace(tmp_path / "a.png")
    assert files_digest(images) != before


def test_one_column_per_label_and_one_column_of_names(table):
    images = read_dataset("csv", table.parent, need_images=False, label_columns=["A", "B"])
    raw = pd.read_csv(table).set_index("path")
    assert np.array_equal(images.labels, raw.loc[images.ids, ["A", "B"]].to_numpy(np.float32), equal_nan=True)
    assert list(images.subjects) == list(raw.loc[images.ids, "subject_id"])
    one = read_dataset("csv", table.parent, need_images=False, label_columns=["A"])
    assert one.label_names == ["A"]  # and not "0" and "1"
    zeros = read_dataset("csv", table.parent, need_images=False, label_columns=["A", "B"], empty="zeros")
    assert np.array_equal(zeros.labels, np.nan_to_num(images.labels))
    joined = [f"{i}.png;{'Mass; Edema' if i % 2 else 'No Finding'};s{i}" for i in range(9)]
    path = write(table.parent / "joined.csv", "path;labels;subject_id", *joined)
    assert "labels.csv" in refused("csv", table.parent) and "joined.csv" in refused("csv", table.parent)
    assert "cells" in refused("csv", table.parent, csv=path)
    write(path, "path,labels", *(f"{i}.png,{'Mass|Edema' if i % 2 else 'No Finding'}" for i in range(9)))
    images = read_dataset("csv", table.parent, csv=path, need_images=False)
    assert images.label_names == ["Edema", "Mass"]
    assert any("own subject" in note for note in images.notes)


def test_subjects_and_headers_lose_their_blanks(table):
    lines = table.read_text().splitlines()
    lines[0] = "path , A,B ,subject_id "
    lines[2] += "  "
    write(table, *lines)
    images = read_dataset("csv", table.parent, need_images=False, label_columns=["A"])
    assert len(set(images.subjects)) == 20


@pytest.mark.parametrize(
    ("line", "column", "cell", "said"),
    [
        (7, "A", "2", "line 7, column 'A': '2' is no label"),
        (9, "A", "yes please", "line 9, column 'A': 'yes please' is no label"),
        (5, "subject_id", "", "line 5, column 'subject_id': the cell is empty"),
        (4, "path", "", "line 4, column 'path': the cell is empty"),
        (3, "path", "0.png", "'0.png' is in lines 2, 3 with different values of 'A'"),
    ],
)
def test_bad_cells_are_named_by_line_and_column(table, line, column, cell, said):
    lines = [text.split(",") for text in table.read_text().splitlines()]
    lines[line - 1][lines[0].index(column)] = cell
    write(table, *map(",".join, lines))
    message = refused("csv", table.parent, need_images=False, label_columns=["A", "B"])
    assert said in message and str(table) in message


def test_numbers_are_never_names_of_findings(table):
    write(table, "path,labels", *(f"{i}.png,{['Mass', '1.0', '0'][i % 3]}" for i in range(9)))
    message = refused("csv", table.parent, need_images=False)
    assert "line 3, column 'labels': '1.0' is a number" in message
    write(table, "path,labels", *(f"{i}.png,{[1.0, 0.0, -1.0, ''][i % 4]}" for i in range(9)))
    images = read_dataset("csv", table.parent, need_images=False)
    assert any("2 cells are uncertain (-1); rule: ignore" in note for note in images.notes)
    assert images.label_names == ["labels"]
    assert np.isnan(images.labels).sum() == 4
    write(table, "path,labels", *(f"{i}.png," for i in range(9)))
    assert np.isnan(read_dataset("csv", table.parent, need_images=False).labels).all()


def test_where_keeps_rows_and_says_when_it_keeps_none(nih):
    images = read_dataset("nih", nih, need_images=False, where=["View Position=PA"])
    assert len(images) == 30
    assert len(read_dataset("nih", nih, need_images=False, where=["Patient ID=3", "Patient ID=17.0"])) == 4
    assert "keeps no row" in refused("nih", nih, need_images=False, where=["View Position=LL"])
    assert "column 'Viewpoint' is missing" in refused("nih", nih, need_images=False, where=["Viewpoint=PA"])
    assert "COLUMN=VALUE" in refused("nih", nih, need_images=False, where=["PA"])


def test_lists_beside_a_csv_and_a_bad_split_column_are_told(table):
    write(table.parent / "test_list.txt", "0.png")
    images = read_dataset("csv", table.parent, need_images=False, label_columns=["A"])
    assert any("test_list.txt" in note and "not used" in note for note in images.notes)
    lines = table.read_text().splitlines()
    parts = ["train", "Val", "test"]
    write(table, lines[0] + ",split", *(f"{text},{parts[i // 2 % 3]}" for i, text in enumerate(lines[1:])))
    images = read_dataset("csv", table.parent, need_images=False, label_columns=["A"])
    assert [len(images.indices(part)) for part in PARTS] == [14, 14, 12] and not images.notes
    write(table, lines[0] + ",split", *(f"{text},{parts[i % 3]}" for i, text in enumerate(lines[1:])))
    assert "subject 's0' has images in train and valid" in refused(
        "csv", table.parent, need_images=False, label_columns=["A"]
    )
    write(table, lines[0] + ",split", *(f"{text},hold-out" for text in lines[1:]))
    assert "line 2, column 'split': 'hold-out'" in refused("csv", table.parent, label_columns=["A"])


def test_rows_that_repeat_an_image_count_once(table):
    lines = table.read_text().splitlines()
    write(table, *lines, *lines[1:4])
    images = read_dataset("csv", table.parent, need_images=False, label_columns=["A"])
    assert len(images) == 40 and any("3 rows repeat" in note for note in images.notes)


# ---------------------------------------------------------------- other tables


def test_vindr_with_and_without_its_test(tmp_path):
    names = ["No finding", "Mass", "Mass", "Edema", "Mass", "No finding"]
    rows = [f"i{i:02d},{names[(i + k) % 6]},R{k}" for i in range(24) for k in range(3)]
    write(tmp_path / "annotations_train.csv", "image_id,class_name,rad_id", *rows, rows[1])
    images = read_dataset("vindr", tmp_path, need_images=False)
    for i, image in enumerate(images.ids):
        own = [row.split(",")[1] for row in rows if row.startswith(image)]
        assert images.labels[i].tolist() == [own.count("Edema") >= 2, own.count("Mass") >= 2]
    write(tmp_path / "annotations_test.csv", "image_id,class_name", "t1,Mass", "t2,No finding", "t2,No finding")
    images = read_dataset("vindr", tmp_path, need_images=False)
    assert {images.ids[i] for i in images.indices(TEST)} == {"t1", "t2"}
    assert images.labels[images.ids.index("t1")].tolist() == [0, 1]
    assert len(images.indices(VALID)) == 3


def test_padchest_lists_are_read_as_python_and_nothing_else(tmp_path):
    name = "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    header = "ImageID,PatientID,Projection,Labels"
    rows = [
        f"{i}.png,{i // 2},{'L' if i % 7 == 6 else 'PA'},\"['normal']\""
        if i % 2
        else f"{i}.png,{i // 2},PA,\"[' pleural effusion', 'cardiomegaly ']\""
        for i in range(40)
    ]
    path = write(tmp_path / name, header, *rows, "90.png,90,PA,", "91.png,91,PA,nan")
    images = read_dataset("padchest", tmp_path, need_images=False)
    assert images.label_names == ["cardiomegaly", "pleural effusion"]
    assert len(images) == 40 - 2 and "91.png" not in images.ids
    write(path, header, "0.png,0,PA,\"__import__('os')\"")
    assert "line 2" in refused("padchest", tmp_path, need_images=False)


def test_siim_header_has_a_blank_and_no_mask_is_minus_one(tmp_path):
    rows = [f"1.2.{i},{' -1' if i % 3 else ' 12 3 99 4'}" for i in range(30)] + ["1.2.0, 5 6"]
    path = write(tmp_path / "train-rle.csv", "ImageId, EncodedPixels", *rows)
    touch(tmp_path, *(f"dicom/1.2.{i}/9.{i}/1.2.{i}.dcm" for i in range(30)))
    images = read_dataset("siim", tmp_path)
    assert {name for name, label in zip(images.ids, images.labels[:, 0]) if label} == {
        f"1.2.{i}" for i in range(0, 30, 3)
    }
    assert all(file.name == f"{name}.dcm" for file, name in zip(images.files, images.ids))
    write(path, "ImageId,EncodedPixels", "1.2.3,none")
    assert "line 2, column 'EncodedPixels': 'none'" in refused("siim", tmp_path)


# ---------------------------------------------------------------- every data set


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_an_empty_folder_and_none_are_one_line(name, tmp_path):
    assert str(tmp_path) in refused(name, tmp_path)
    assert "is not a directory" in refused(name, tmp_path / "nowhere")
    if name != "tree":
        assert "one folder" in refused(name, [tmp_path, tmp_path])


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"covidx", "tree"}))
def test_a_damaged_table_is_one_line(name, tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\x00\xff\xfe broken")
    assert "t.csv" in refused(name, tmp_path, csv=tmp_path / "t.csv", need_images=False)
    write(tmp_path / "t.csv", "a,b", "1,2")
    assert "is missing" in refused(name, tmp_path, csv=tmp_path / "t.csv", need_images=False)


def test_options_without_effect_are_refused(rsna):
    assert "--image_column has no effect" in refused("rsna", rsna, image_column="patientId")
    assert "--labels Mass: has Pneumonia" in refused("rsna", rsna, labels=["Mass"], need_images=False)
    assert "--min_certainty 9" in refused("tree", rsna, min_certainty=9)


def test_a_gzipped_table_is_found_too(rsna):
    path = rsna / "stage_2_train_labels.csv"
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    assert "stage_2_train_labels.csv and stage_2_train_labels.csv.gz" in refused("rsna", rsna)
    path.unlink()
    assert len(read_dataset("rsna", rsna, need_images=False)) == 40


# ---------------------------------------------------------------- what is written


def made_up(labels: list[list[float]], parts: str, task: str = "multilabel") -> LabelledImages:
    n = len(labels)
    return LabelledImages(
        "made up",
        [f"{i}" for i in range(n)],
        [Path(f"{i}.png") for i in range(n)],
        np.array([f"s{i}" for i in range(n)]),
        np.array([{"t": TRAIN, "v": VALID, "e": TEST}[letter] for letter in parts]),
        [f"L{k}" for k in range(len(labels[0]))],
        np.array(labels, np.float32),
        task,
    )


def test_split_csv_and_table_say_the_same(tmp_path):
    nan = float("nan")
    images = made_up([[1, 0], [0, nan], [1, 1], [0, 0], [1, nan], [nan, 1]], "ttvvee")
    write_split(images, tmp_path / "split.csv")
    table = pd.read_csv(tmp_path / "split.csv", dtype={"id": str})
    assert list(table.columns) == ["id", "subject", "split", "L0", "L1"]
    assert np.array_equal(table[["L0", "L1"]].to_numpy(np.float32), images.labels, equal_nan=True)
    assert list(table["split"]) == list(images.parts)
    rows = [line.split() for line in split_table(images).splitlines()]
    assert rows[0] == ["train", "valid", "test"] and rows[1] == ["images", "2", "2", "2"]
    assert rows[3][:3] == ["L0", "1", "1"] and rows[4][:4] == ["L1", "0", "(+1", "unknown)"]


def test_classes_that_cannot_be_judged_are_told_or_refused():
    assert check_labels(made_up([[1, 1], [0, 0], [1, 1], [0, 0], [1, 0], [0, 0]], "ttvvee")) == [
        "made up: 'L1' has 0 images with and 2 without it in test; left out of the mean"
    ]
    for labels, parts, said in (
        ([[1], [0], [1], [0], [1], [1]], "ttvvee", "the test images are all of one kind"),
        ([[1], [0], [0], [0], [1], [0]], "ttvvee", "the validation images are all of one kind"),
        ([[0], [0], [1], [0], [1], [0]], "ttvvee", "'L0' is absent from every training image"),
        ([[1], [1], [1], [0], [1], [0]], "ttvvee", "'L0' is present in every training image"),
        (
            [[1, 0, 0, 0], [1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 1]],
            "ttvvee",
            "'L0' is present in .*, and 1 more are such; name the labels to keep by --labels .there are L1, L3.$",
        ),
        ([[1], [0], [1], [0]], "ttee", "no image is in valid"),
    ):
        with pytest.raises(UserError, match=said):
            check_labels(made_up(labels, parts))
    assert check_labels(made_up([[1, 1], [0, 0], [1, 0], [0, 0], [1, 1], [0, 0]], "ttvvee")) == [
        "made up: 'L1' has 0 images with and 2 without it in valid; its validation loss tells little"
    ]
    eye = np.eye(3).tolist()
    notes = check_labels(made_up(eye + eye + eye[:2], "tttvvvee", "multiclass"))
    assert notes == ["made up: 'L2' has 0 images with and 2 without it in test; left out of the mean"]
    with pytest.raises(UserError, match="nothing can be judged"):
        check_labels(made_up(eye + eye + [eye[0]] * 2, "tttvvvee", "multiclass"))


def test_labelled_images_refuse_what_no_reader_may_give():
    with pytest.raises(UserError, match="no image is left"):
        made_up([[1]], "t").take([])
    images = made_up([[1], [0]], "te")
    with pytest.raises(UserError, match="is there twice"):
        images.take([0, 0])


@pytest.mark.parametrize("cell", ["", "-1", "2", "x"])
def test_rsna_takes_no_other_target(rsna, cell):
    path = rsna / "stage_2_train_labels.csv"
    path.write_text(path.read_text().replace("p03,,,,,1", f"p03,,,,,{cell}"))
    assert f"line 5, column 'Target': {cell!r} is no label" in refused("rsna", rsna, need_images=False)


def test_a_tree_has_its_readers_labels_and_its_own_split_or_folds(tmp_path):
    study = make_study(tmp_path, 40, size=(64, 52), shared_images=4)
    where = {"--raw": study.raw, "--images": study.images, "--out": tmp_path / "tree"}
    options = [str(word) for pair in where.items() for word in pair]
    assert prepare_reflacx.main(options) == 0
    images = read_dataset("tree", tmp_path / "tree")
    assert images.study == "mimic"
    assert "is named twice" in refused("tree", [tmp_path / "tree", tmp_path / "tree/reflacx.json"])
    truth = {image.path.stem: image for image in study.truth}
    assert images.label_names[0] == "Any finding" and len(images) == 40
    for file, subject, part, labels in zip(images.files, images.subjects, images.parts, images.labels, strict=True):
        image = truth[file.stem]
        assert subject == image.subject_id
        assert part == {"train": TRAIN, "validate": VALID, "test": TEST}[image.split]
        if file.stem not in {other.path.stem for other in study.truth[:4]}:  # one reader, always sure enough
            assert bool(labels[0]) == bool(image.lesions)
    folds = read_dataset("tree", [tmp_path / "tree"], split="folds", labels=["Any finding"])
    assert set(folds.parts) == {""} and folds.label_names == ["Any finding"]
    strict = read_dataset("tree", tmp_path / "tree", min_certainty=5)
    assert np.nansum(strict.labels) < np.nansum(images.labels)
    assert "--labels Cough" in refused("tree", tmp_path / "tree", labels=["Cough"])
    assert "--csv has no effect" in refused("tree", tmp_path / "tree", csv=tmp_path / "a.csv")


def test_a_subject_under_two_spellings_is_one(tmp_path):
    rows = [f"a{i}.png,{'P' if i % 2 else 'p'}{i // 2},{i % 2}" for i in range(40)]
    write(tmp_path / "t.csv", "path,subject_id,sick", *rows)
    images = read_dataset("csv", tmp_path, label_columns=["sick"], need_images=False)
    assert len(set(images.subjects)) == 20
    assert any("'p0' and 'P0', and 19 more such are taken for one" in note for note in images.notes)
    rows = [f"a{i}.png,{i if i < 20 else f'{i - 20}.0'},{'train' if i < 20 else 'test'},1" for i in range(40)]
    write(tmp_path / "t.csv", "path,subject_id,split,sick", *rows)
    assert "subject '0' has images in test and train" in refused(
        "csv", tmp_path, label_columns=["sick"], need_images=False
    )


def test_words_for_yes_and_no_are_labels_in_a_single_column_too(tmp_path):
    write(tmp_path / "t.csv", "path,sick", *(f"a{i}.png,{'Yes' if i % 2 else 'no'}" for i in range(8)))
    images = read_dataset("csv", tmp_path, label_columns=["sick"], need_images=False)
    assert images.label_names == ["sick"] and sorted(images.labels[:, 0]) == [0] * 4 + [1] * 4


@pytest.mark.parametrize("again", ["same", "./a.png", "symbolic link", "hard link"])
def test_one_file_under_two_ids_is_refused(tmp_path, again):
    touch(tmp_path, "a.png", "b.png", "c.png")
    name = {"same": f"{tmp_path}/a.png", "./a.png": again}.get(again, "d.png")
    if again == "symbolic link":
        (tmp_path / "d.png").symlink_to("a.png")
    elif again == "hard link":
        (tmp_path / "d.png").hardlink_to(tmp_path / "a.png")
    write(tmp_path / "t.csv", "path,sick", "a.png,1", "b.png,0", f"{name},1", "c.png,1")
    assert "are the same file" in refused("csv", tmp_path, label_columns=["sick"])


def test_a_label_may_not_be_called_as_the_mean(tmp_path):
    write(tmp_path / "t.csv", "path,mean", "a.png,1", "b.png,0", "c.png,1")
    assert "give the label another name" in refused("csv", tmp_path, label_columns=["mean"], need_images=False)


def test_labels_that_teach_or_choose_nothing_are_refused():
    nan = float("nan")
    with pytest.raises(UserError, match="no label of any validation image is known"):
        check_labels(made_up([[1], [0], [nan], [nan], [1], [0]], "ttvvee"))
    folds = made_up([[1], [1], [1]], "ttt")
    with pytest.raises(UserError, match="present in every"):
        check_labels(replace(folds, parts=np.full(3, "", "<U5")))


def test_an_image_that_lacks_is_not_another_folders_image_of_its_name(tmp_path):
    write(tmp_path / "t.csv", "path,sick", "root/a/1.png,1", "root/a/2.png,0", "root/b/3.png,1", "root/b/4.png,0")
    touch(tmp_path, "a/1.png", "a/2.png", "a/3.png", "b/4.png")  # b/3.png is not there
    assert "1 of 4 images are missing, e.g. 'root/b/3.png'" in refused("csv", tmp_path, label_columns=["sick"])
    touch(tmp_path, "b/3.png")
    images = read_dataset("csv", tmp_path, label_columns=["sick"])
    for image, file in zip(images.ids, images.files, strict=True):
        assert file == tmp_path / image.removeprefix("root/")


@pytest.mark.parametrize(
    ("names", "there", "missing"),
    [
        # another folder that the table never names, with the same folder in it or without
        (["images/1.png", "images/2.png"], ["images/1.png", "rejected/2.png"], ["images/2.png"]),
        (["images/1.png", "images/2.png"], ["images/1.png", "rejected/images/2.png"], ["images/2.png"]),
        (["images/1.png", "images/2.png"], ["rejected/1.png", "rejected/2.png"], ["images/1.png", "images/2.png"]),
        (["x/train/p1/1.png", "x/train/p2/1.png"], ["train/p1/1.png", "no/p2/1.png"], ["x/train/p2/1.png"]),
        (["train/1.png", "test/2.png"], ["other/train/2.png"], ["train/1.png", "test/2.png"]),
        # the root may be the folder, or have another name than the paths begin with
        (["images/1.png", "images/2.png"], ["1.png", "2.png"], []),
        (["x/images/1.png", "x/images/2.png"], ["y/z/images/1.png", "y/z/images/2.png"], []),
        # CheXpert as its site gives it: parts whose folders are in no path
        (
            ["x/train/p1/1.png", "x/train/p2/1.png", "x/valid/p3/1.png"],
            ["a/p1/1.png", "b/p2/1.png", "valid/p3/1.png"],
            [],
        ),
    ],
)
def test_a_path_is_matched_by_the_folder_that_it_names_or_is_missing(tmp_path, names, there, missing):
    touch(tmp_path, *there)
    files = Folder(tmp_path).images(names, [])
    assert [name for name, file in zip(names, files, strict=True) if file is None] == missing
    assert all(file.name == Path(name).name for name, file in zip(names, files, strict=True) if file)


def test_an_empty_cell_in_a_column_of_names_heeds_its_rule(tmp_path):
    write(tmp_path / "t.csv", "path,labels", "a.png,x|y", "b.png,", "c.png,y", "d.png,Normal")
    plain = read_dataset("csv", tmp_path, need_images=False, split="folds")
    assert plain.labels.tolist() == [[1, 1], [0, 0], [0, 1], [0, 0]]
    assert "t.csv: 1 cells are empty; rule: zeros" in plain.notes
    ignored = read_dataset("csv", tmp_path, need_images=False, split="folds", empty="ignore")
    assert np.isnan(ignored.labels[1]).all() and np.isnan(ignored.labels).sum() == 2
    for choice in ({"uncertain": "ones"}, {"empty": "ones"}):
        assert "which holds names; leave it out" in refused("csv", tmp_path, need_images=False, **choice)


def _csv(root: Path, cells: list[tuple[str, str, str]], **choices) -> LabelledImages:
    pd.DataFrame(cells, columns=["path", "labels", "subject_id"]).to_csv(root / "t.csv", index=False)
    return read_dataset("csv", root, need_images=False, **choices)


def test_names_that_may_be_several_or_the_same_are_told(tmp_path):
    cells = [(f"{i}.png", ["Edema;Mass", "edema", "Edema"][i % 3], f"s{i // 2}") for i in range(12)]
    notes = " ".join(_csv(tmp_path, cells).notes)
    assert "'Edema;Mass' is taken for one finding" in notes and "'Edema' and 'edema' are taken for two" in notes
    notes = " ".join(_csv(tmp_path, cells, separator=";", labels=["Mass"]).notes)
    assert "taken for one finding" not in notes
    with pytest.raises(UserError, match="--separator"):
        _csv(tmp_path, cells, separator="")


def test_what_programs_write_for_no_subject_is_no_subject(tmp_path):
    cells = [(f"{i}.png", "Edema", "NaN" if i > 8 else f"s{i}") for i in range(12)]
    with pytest.raises(UserError, match="line 11, column 'subject_id': 'NaN' names nobody"):
        _csv(tmp_path, cells)


def test_rows_too_few_for_a_published_split_and_two_tests_are_one_line(tmp_path):
    (tmp_path / "stage_2_train_labels.csv").write_text("patientId,Target\np1,0\np2,1\n")
    with pytest.raises(UserError, match="2 images are too few"):
        read_dataset("rsna", tmp_path, need_images=False)
    row = "Path,Frontal/Lateral,Edema\ntrain/patient{}/study1/a.jpg,Frontal,1\n"
    for i, name in enumerate(("train.csv", "a/valid.csv", "b/valid.csv")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row.format(i))
    with pytest.raises(UserError, match="a/valid.csv and b/valid.csv; keep one of them"):
        read_dataset("chexpert", tmp_path, need_images=False, labels=["Edema"])
