"""Data sets from small folders as people have them: layouts, splits, labels, and what bad input gets."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import prepare_reflacx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom_chexpert import make_chexpert
from read_labelled import make_labelled, read_dataset
from sklearn.model_selection import train_test_split

from datasets.phantom.gaze_study import make_study
from downstream.data.choices import NAMES
from downstream.data.folder import Folder
from downstream.data.labelled import PARTS, TEST, TRAIN, VALID, LabelledImages, check_labels, sample_fraction
from downstream.data.readers import CHEXPERT_JUDGED
from downstream.data.splits import split_by_subject
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


def read(name: str, root: Path, **choices) -> LabelledImages:
    return read_dataset(name, root, need_images=False, **choices)


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
def chexpert(tmp_path) -> Path:
    return make_chexpert(tmp_path, 48, size=(16, 16)).raw


@pytest.fixture
def table(tmp_path) -> Path:
    rows = [f"{i}.png,{i % 2},{'' if i % 5 == 4 else (i // 2) % 2},s{i // 2}" for i in range(40)]
    return write(tmp_path / "labels.csv", "path,A,B,subject_id", *rows)


# ---------------------------------------------------------------- where images are


def test_ids_are_found_nested_flat_with_any_suffix_and_in_a_circle_of_links(rsna):
    touch(rsna, *(f"stage_2_train_images/p{i:02d}.dcm" for i in range(20)))
    touch(rsna, *(f"elsewhere/deeper/p{i:02d}.PNG" for i in range(20, 40)), ".cache/p00.dcm", "a/._p01.dcm")
    (rsna / "elsewhere/again").symlink_to(rsna)
    images = read_dataset("rsna", rsna)
    assert len(images) == 40 and [file.stem for file in images.files] == images.ids


def test_chestxray14_in_its_twelve_folders_is_found(nih):
    names = pd.read_csv(nih / "Data_Entry_2017.csv")["Image Index"]
    touch(nih, *(f"images_{1 + i // 7:03d}/images/{name}" for i, name in enumerate(names)))
    images = read_dataset("nih", nih)
    assert [file.name for file in images.files] == images.ids
    assert {images.ids[i] for i in images.indices(TEST)} == set((nih / "test_list.txt").read_text().split())
    assert len(set(images.subjects[images.indices(VALID)])) == 2  # an eighth of 16 patients
    assert images.strong_augmentation and len(images.notes) == 1


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", "", "a/b/c/"])
def test_chexpert_is_found_whatever_the_root_is_called(chexpert, prefix):
    for path in chexpert.glob("*.csv"):
        path.write_text(path.read_text().replace("CheXpert-v1.0-small/", prefix))
    images = read_dataset("chexpert", chexpert)
    for file, name, part in zip(images.files, images.ids, images.parts, strict=True):
        assert file == chexpert / name and name.endswith("view1_frontal.jpg")
        assert name.startswith("valid/" if part == TEST else "train/")


@pytest.mark.parametrize(
    ("uncertain", "ones", "empty"),
    [
        (None, ("Atelectasis", "Edema", "Pleural Effusion"), None),
        ("zeros", (), "zeros"),
        ("ones", CHEXPERT_JUDGED, "ignore"),
    ],
)
def test_uncertain_and_empty_cells_of_chexpert(chexpert, uncertain, ones, empty):
    train = pd.read_csv(chexpert / "train.csv")
    train.loc[:3, list(CHEXPERT_JUDGED)] = -1
    train.to_csv(chexpert / "train.csv", index=False)
    raw = pd.concat(pd.read_csv(chexpert / f"{part}.csv") for part in ("train", "valid")).set_index("Path")
    images = read("chexpert", chexpert, uncertain=uncertain, empty=empty)
    for i, name in enumerate(images.ids):
        for label, found in zip(images.label_names, images.labels[i], strict=True):
            cell = raw.loc[f"CheXpert-v1.0-small/{name}", label]
            expected = {-1: label in ones, 0: 0, 1: 1}.get(cell, np.nan if empty == "ignore" else 0)
            assert np.array_equal(found, np.float32(expected), equal_nan=True)


def test_the_published_draw_of_chexpert_says_that_patients_are_shared(chexpert):
    images = read("chexpert", chexpert, split="published")
    shared = set(images.subjects[images.indices(TRAIN)]) & set(images.subjects[images.indices(VALID)])
    assert shared and any(f"{len(shared)} patients are in two parts" in note for note in images.notes)
    assert not read("chexpert", chexpert).shared_subjects
    (chexpert / "valid.csv").unlink()
    with pytest.raises(UserError, match="no image is in test; correct the split, or pass --split subject"):
        check_labels(read("chexpert", chexpert))
    assert set(read("chexpert", chexpert, split="subject").parts) == set(PARTS)


def test_an_image_that_could_be_two_files_is_asked_about(rsna):
    touch(rsna, *(f"images/p{i:02d}.png" for i in range(40)), "dicom/p08.dcm")
    write(rsna / "masks/p07.png", "something longer")
    message = refused("rsna", rsna)
    assert "images/p07.png" in message and "masks/p07.png" in message and "--images" in message
    assert len(read_dataset("rsna", rsna, images=rsna / "images")) == 40
    shutil.copy(rsna / "images/p07.png", rsna / "masks/p07.png")  # a copy is no question
    images = read_dataset("rsna", rsna)
    assert images.files[images.ids.index("p08")].suffix == ".png"
    assert any("2 images are there more than once" in note for note in images.notes)


def test_missing_images_are_named_and_may_be_skipped(nih):
    names = list(pd.read_csv(nih / "Data_Entry_2017.csv")["Image Index"])
    touch(nih, *(f"images/{name}" for name in names[4:]))
    message = refused("nih", nih)
    assert "4 of 40 images are missing" in message and "36 image files are below" in message
    whole, images = read("nih", nih), read_dataset("nih", nih, skip_missing=True)
    # The split of the others is that of the whole.
    parts = {name: part for name, part in zip(whole.ids, whole.parts) if name not in names[:4]}
    assert dict(zip(images.ids, images.parts)) == parts
    assert sum(images.tallies["missing images"].values()) == 4


@pytest.mark.parametrize(
    ("names", "there", "missing"),
    [
        # another folder that the table never names
        ("images/1.png images/2.png", "images/1.png rejected/2.png", "images/2.png"),
        ("x/train/p1/1.png x/train/p2/1.png", "train/p1/1.png no/p2/1.png", "x/train/p2/1.png"),
        ("root/a/1.png root/b/3.png", "a/1.png a/3.png", "root/b/3.png"),
        ("train/0.png test/0.png", "train/0.png", "test/0.png"),
        ("train/p1/1.png test/p1/2.png", "train/p1/1.png train/p1/2.png", "test/p1/2.png"),
        # the root may be the folder, or have another name than the paths begin with
        ("images/1.png images/2.png", "1.png 2.png", ""),
        ("x/images/1.png x/images/2.png", "y/z/images/1.png y/z/images/2.png", ""),
        # CheXpert as its site gives it: parts whose folders are in no path
        ("x/train/p1/1.png x/train/p2/1.png x/valid/p3/1.png", "a/p1/1.png b/p2/1.png valid/p3/1.png", ""),
        # names that differ in their suffix alone are two images
        ("1.png 1.jpg b\\2.png ./3.png", "x/1.png x/1.jpg b/2.png 3.png", ""),
    ],
)
def test_a_path_is_matched_by_the_folder_that_it_names_or_is_missing(tmp_path, names, there, missing):
    names = names.split()
    touch(tmp_path, *there.split())
    files = Folder(tmp_path).images(names, [])
    assert [name for name, file in zip(names, files, strict=True) if file is None] == missing.split()
    found = {file for file in files if file}
    assert len(found) == len(names) - len(missing.split())
    assert all(file.name == Path(name.replace("\\", "/")).name for name, file in zip(names, files) if file)
    absolute = [str(file) for file in found]
    assert Folder(tmp_path).images([*absolute, f"{tmp_path}/none.png"], []) == [*map(Path, absolute), None]


def test_images_of_one_folder_that_are_in_two_are_asked_about(tmp_path):
    touch(tmp_path, "images/1.png", "rejected/images/2.png")
    with pytest.raises(UserError, match="images of the table could be .* of images/1.png or of rejected/images/2.png"):
        Folder(tmp_path).images(["images/1.png", "images/2.png"], [])


@pytest.mark.parametrize("name", ["./a.png", "link.png"])
def test_one_file_under_two_ids_is_refused(tmp_path, name):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "link.png").symlink_to("a.png")
    write(tmp_path / "t.csv", "path,sick", "a.png,1", "b.png,0", f"{name},1")
    assert "are the same file" in refused("csv", tmp_path, label_columns=["sick"], split="folds")


# ---------------------------------------------------------------- splits


def test_rsna_is_sorted_and_split_by_the_published_calls(rsna):
    images = read("rsna", rsna)
    frame = pd.DataFrame({"id": sorted(set(images.ids))})
    train, rest = train_test_split(frame, test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    for part, expected in ((TRAIN, train), (VALID, valid), (TEST, test)):
        assert [images.ids[i] for i in images.indices(part)] == list(expected["id"])
    fraction = train.sample(frac=0.5, random_state=42)["id"]
    assert [images.ids[i] for i in sample_fraction(images.indices(TRAIN), 0.5)] == list(fraction)
    with pytest.raises(UserError, match="--fractions"):
        sample_fraction(images.indices(TRAIN), 0.001)
    for split, parts in (("folds", {""}), ("test", {TEST})):
        assert set(read("rsna", rsna, split=split).parts) == parts


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
    assert np.array_equal(split_by_subject("made up", subjects[::-1], seed), parts[::-1])


def test_official_lists_must_be_whole_and_apart(nih):
    train, test = nih / "train_val_list.txt", nih / "test_list.txt"
    before, name = train.read_text(), test.read_text().split()[0]
    train.write_text(f"{before}{name}\n")
    assert name in (message := refused("nih", nih)) and "in the list of train too" in message
    test.write_text(test.read_text().replace(f"{name}\n", ""))
    assert "subject '16' has images in two parts" in (message := refused("nih", nih, need_images=False))
    assert "--split subject" in message
    train.unlink()
    assert any("no split is given" in note for note in read("nih", nih).notes)
    assert "--split published" in refused("nih", nih, split="published")


def test_covidx_splits_patients_not_images_and_offers_the_published(tmp_path):
    rows = [f"{i // 3} file {i}.png {'COVID-19' if i % 2 else 'normal'} src" for i in range(60)]
    train = write(tmp_path / "labels/train_COVIDx9A.txt", *rows)
    tests = ["900 a.png normal src", "901 b.jpg COVID-19 src", "0 c.jpg pneumonia other"]
    write(tmp_path / "labels/test_COVIDx9A.txt", *tests)
    images = read("covidx", tmp_path)
    assert images.task == "multiclass" and images.label_names == ["COVID-19", "normal", "pneumonia"]
    assert len(images.indices(VALID)) == 12
    assert images.files[images.ids.index("train/file 7.png")].name == "file 7.png"
    published = read("covidx", tmp_path, split="published")
    _, drawn = train_test_split(np.arange(60), test_size=0.2, random_state=0)
    assert [published.ids[i] for i in published.indices(VALID)] == [f"train/file {i}.png" for i in drawn]
    pairs = set(zip(published.subjects, published.parts, strict=True))
    assert any(f"{len(pairs) - 23} patients are in two parts" in note for note in published.notes)
    assert len(read("covidx", tmp_path, where=["source=src"])) == 62
    write(tmp_path / "labels/val_COVIDx9A.txt", "800 v.png normal src")
    touch(tmp_path, *(f"train/file {i}.png" for i in range(60)), "test/a.png", "test/b.jpg", "test/c.jpg", "val/v.png")
    for split in ("auto", "published"):
        images = read_dataset("covidx", tmp_path, split=split)
        assert [images.ids[i] for i in images.indices(VALID)] == ["val/v.png"] and len(images.indices(TRAIN)) == 60
    write(tmp_path / "labels/test_COVIDx9A.txt", *tests, "900 a.png normal")
    assert "line 4" in refused("covidx", tmp_path)
    shutil.copy(train, train.with_name("train_COVIDx9B.txt"))
    assert "give the table with --csv" in refused("covidx", tmp_path)


# ---------------------------------------------------------------- labels of a CSV


def test_the_study_of_a_csv_is_what_the_user_says(table, rsna):
    """Patients 1 to N of two hospitals are different people."""
    for study, found in ((" NIH", "nih"), ("MIMIC-CXR", "mimic"), (None, "")):
        assert read("csv", rsna, csv=table, label_columns=["A", "B"], study=study).study == found
    assert "--study has no effect" in refused("rsna", rsna, study="nih")


def test_one_column_per_label(table):
    images = read("csv", table.parent, label_columns=["A", "B"])
    raw = pd.read_csv(table).set_index("path").loc[images.ids]
    assert np.array_equal(images.labels, raw[["A", "B"]].to_numpy(np.float32), equal_nan=True)
    assert list(images.subjects) == list(raw["subject_id"])
    zeros = read("csv", table.parent, label_columns=["A", "B"], empty="zeros")
    assert np.array_equal(zeros.labels, np.nan_to_num(images.labels))
    lines = table.read_text().splitlines()
    write(table, *lines, *lines[1:4])
    again = read("csv", table.parent, label_columns=["A"])
    assert again.label_names == ["A"] and len(again) == 40  # and not "0" and "1"
    assert any("3 rows repeat" in note for note in again.notes)
    write(table.parent / "other.csv", "path")
    assert "labels.csv and other.csv" in refused("csv", table.parent)


@pytest.mark.parametrize(
    ("line", "column", "cell", "said"),
    [
        (7, "A", "2", "line 7, column 'A': '2' is no label"),
        (5, "subject_id", "NaN", "line 5, column 'subject_id': 'NaN' names nothing"),
        (3, "path", "0.png", "line 3, column 'path': '0.png' is in a line above too, with other values"),
    ],
)
def test_bad_cells_are_named_by_line_and_column(table, line, column, cell, said):
    lines = [text.split(",") for text in table.read_text().splitlines()]
    lines[line - 1][lines[0].index(column)] = cell
    write(table, *map(",".join, lines))
    message = refused("csv", table.parent, label_columns=["A", "B"])
    assert said in message and str(table) in message


@pytest.mark.parametrize(
    ("cells", "choices", "labels", "values", "note"),
    [
        (["Yes", "no", "1"], {}, ["labels"], [[1], [0], [1]], ""),
        (["1.0", "0.0", "-1.0", ""], {}, ["labels"], [[1], [0], [9], [9]], "1 cells are uncertain (-1); rule: ignore"),
        (["x|y", "", "Normal"], {}, ["x", "y"], [[1, 1], [0, 0], [0, 0]], "1 cells are empty; rule: zeros"),
        (["x|y", "", "Normal"], {"empty": "ignore"}, ["x", "y"], [[1, 1], [9, 9], [0, 0]], "rule: ignore"),
        (["x; y", "X"], {"separator": ";"}, ["X", "x", "y"], [[0, 1, 1], [1, 0, 0]], ""),
    ],
)
def test_a_single_column_of_numbers_or_names(tmp_path, cells, choices, labels, values, note):
    write(tmp_path / "t.csv", "path,labels", *(f"{i}.png,{c}" for i, c in enumerate(cells)))
    images = read("csv", tmp_path, split="folds", **choices)
    assert images.label_names == labels and note in " ".join(images.notes) and "own subject" in " ".join(images.notes)
    assert np.nan_to_num(images.labels, nan=9).tolist() == values


@pytest.mark.parametrize(
    ("header", "cells", "choices", "said"),
    [
        ("labels", ["Mass", "1.0", "0"], {}, "line 3, column 'labels': '1.0' is a number"),
        ("labels", ["Mass", "", "x"], {"labels": ["Cough"]}, "--labels Cough: has Mass, x"),
        ("labels", ["", "Normal", ""], {"split": "folds"}, "no label is left"),
        ("labels", ["Mass", "mean", "x"], {"split": "folds"}, "'mean' is there twice"),  # results.csv has such a row
        ("labels,split", ["x,train", "y,hold-out", "x,test"], {}, "line 3, column 'split': 'hold-out'"),
    ],
)
def test_labels_and_splits_of_a_csv_that_can_not_be_are_refused(tmp_path, header, cells, choices, said):
    write(tmp_path / "t.csv", f"path,{header}", *(f"{i}.png,{c}" for i, c in enumerate(cells)))
    assert said in refused("csv", tmp_path, need_images=False, **choices)


def test_where_keeps_rows_and_says_when_it_keeps_none(nih):
    assert len(read("nih", nih, where=["View Position=PA"])) == 30
    assert len(read("nih", nih, where=["Patient ID=3", "Patient ID=17"])) == 4
    assert "no row has View Position LL, but 'AP', 'PA'" in refused("nih", nih, where=["View Position=LL"])
    assert "--where Viewpoint: " in refused("nih", nih, where=["Viewpoint=PA"])


def test_a_split_column_is_used(table):
    head, *lines = table.read_text().splitlines()
    parts = ["train", "Val", "test"]
    write(table, f"{head},split", *(f"{text},{parts[i // 2 % 3]}" for i, text in enumerate(lines)))
    images = read("csv", table.parent, label_columns=["A"])
    assert [len(images.indices(part)) for part in PARTS] == [14, 14, 12]
    write(table, f"{head},split", *(f"{text},{parts[i % 3]}" for i, text in enumerate(lines)))
    assert "subject 's0' has images in two parts" in refused(
        "csv", table.parent, label_columns=["A"], need_images=False
    )
    images = read("csv", table.parent, label_columns=["A"], split="published")
    assert any("20 patients are in two parts" in note for note in images.notes)


def test_a_subject_under_two_spellings_is_one(tmp_path):
    rows = [f"a{i}.png,{'P' if i % 2 else 'p'}{i // 2},x" for i in range(40)]
    write(tmp_path / "t.csv", "path,subject_id,labels", *rows)
    images = read("csv", tmp_path)
    assert len(set(images.subjects)) == 20
    assert any("'p0' and 'P0' and 19 more such are taken for one" in note for note in images.notes)
    rows = [f"a{i}.png,{i if i < 20 else f'{i - 20}.0'},{'train' if i < 20 else 'test'},x" for i in range(40)]
    write(tmp_path / "t.csv", "path,subject_id,split,labels", *rows)
    assert "subject '0' has images in two parts" in refused("csv", tmp_path, need_images=False)


# ---------------------------------------------------------------- other tables


def test_vindr_by_most_readers_from_boxes_or_labels_of_images(tmp_path):
    names = ["No finding", "Mass", "Mass", "Edema", "Mass", "No finding"]
    rows = [f"i{i:02d},{names[(i + k) % 6]},R{k}" for i in range(24) for k in range(3)]
    rows += ["z,Mass,R0", "z,No finding,R1"]  # half of the readers are not most of them
    write(tmp_path / "annotations_train.csv", "image_id,class_name,rad_id", *rows, rows[1])
    images = read("vindr", tmp_path)
    for i, image in enumerate(images.ids):
        own = [row.split(",")[1] for row in rows if row.startswith(image)]
        assert images.labels[i].tolist() == [own.count("Edema") >= 2, own.count("Mass") >= 2]
    write(tmp_path / "annotations_test.csv", "image_id,class_name", "t1,Mass", "t2,No finding", "t2,No finding")
    write(tmp_path / "image_labels_test.csv", "image_id,Mass,No finding", "t1,1,0", "t2,0,1")
    for image_labels in (False, True):  # these go before boxes
        if image_labels:
            rows = [f"i{i:02d},R{k},{int(i % 3 <= k)},{i % 2}" for i in range(24) for k in range(3)]
            write(tmp_path / "image_labels_train.csv", "image_id,rad_ID,Mass,No finding", *rows)
        images = read("vindr", tmp_path)
        assert {images.ids[i] for i in images.indices(TEST)} == {"t1", "t2"} and len(images.indices(VALID)) == 3
        assert images.labels[images.ids.index("t1"), -1] == 1 and images.labels[images.ids.index("t2"), -1] == 0
    assert images.label_names == ["Mass"]
    assert all(images.labels[images.ids.index(f"i{i:02d}"), 0] == (i % 3 <= 1) for i in range(24))


def test_padchest_lists_are_read_as_python_and_nothing_else(tmp_path):
    path = tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv"
    header = "ImageID,PatientID,Projection,Labels"
    sick = "\"[' pleural effusion', 'cardiomegaly ']\""
    write(path, header, f"0.png,0,PA,{sick}", "1.png,1,PA,[]", "2.png,2,L,[]", "3.png,3,PA,", "4.png,4,PA,nan")
    images = read("padchest", tmp_path, split="folds")
    assert images.label_names == ["cardiomegaly", "pleural effusion"] and images.ids == ["0.png", "1.png"]
    assert images.labels.tolist() == [[1, 1], [0, 0]]
    write(path, header, "0.png,0,PA,\"__import__('os')\"")
    assert "line 2" in refused("padchest", tmp_path)


def test_a_tree_has_its_readers_labels_and_its_own_split_or_folds(tmp_path):
    study, tree = make_study(tmp_path, 40, size=(64, 52), shared_images=4), tmp_path / "tree"
    where = {"--raw": study.raw, "--images": study.images, "--out": tree}
    assert prepare_reflacx.main([str(word) for pair in where.items() for word in pair]) == 0
    images = read_dataset("tree", tree)
    assert images.study == "mimic" and images.label_names[0] == "Any finding" and len(images) == 40
    truth = {image.path.stem: image for image in study.truth}
    shared = {image.path.stem for image in study.truth[:4]}
    for file, subject, part, labels in zip(images.files, images.subjects, images.parts, images.labels, strict=True):
        image = truth[file.stem]
        assert subject == image.subject_id
        assert part == {"train": TRAIN, "validate": VALID, "test": TEST}[image.split]
        # one reader, always sure enough
        assert file.stem in shared or bool(labels[0]) == bool(image.lesions)
    folds = read_dataset("tree", [tree], split="folds", labels=["Any finding"])
    assert set(folds.parts) == {""} and folds.label_names == ["Any finding"]
    assert np.nansum(read_dataset("tree", tree, min_certainty=5).labels) < np.nansum(images.labels)
    assert "--csv has no effect" in refused("tree", tree, csv=tmp_path / "a.csv")


# ---------------------------------------------------------------- every data set


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_empty_folder_and_a_damaged_table_are_one_line(name, tmp_path):
    assert str(tmp_path) in refused(name, tmp_path)
    assert "is not a directory" in refused(name, tmp_path / "nowhere")
    if name == "tree":
        return
    assert "one folder" in refused(name, [tmp_path, tmp_path])
    (tmp_path / "t.csv").write_bytes(b"\x00\xff\xfe broken")
    assert "t.csv" in refused(name, tmp_path, csv=tmp_path / "t.csv")
    write(tmp_path / "t.csv", "a,b", "1,2")
    assert ("line 1" if name == "covidx" else "is missing") in refused(name, tmp_path, csv=tmp_path / "t.csv")


def test_tables_may_be_zipped_and_are_never_guessed_between(rsna):
    path = rsna / "stage_2_train_labels.csv"
    for folder in "ab":
        write(rsna / folder / path.name, "patientId,Target", "p01,1")
    assert len(read("rsna", rsna)) == 40  # of the root
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    assert "stage_2_train_labels.csv and stage_2_train_labels.csv.gz" in refused("rsna", rsna)
    path.unlink()
    assert len(read("rsna", rsna)) == 40
    assert "2 images are too few" in refused("rsna", rsna, where=["patientId=p01", "patientId=p02"])
    Path(f"{path}.gz").unlink()
    assert f"a/{path.name} and b/{path.name}; keep one of them" in refused("rsna", rsna)


# ---------------------------------------------------------------- what can't be judged


def made_up(labels: str, parts: str, task: str = "multilabel") -> LabelledImages:
    """Images with a word of `labels` each, a letter for each label ("n" is unknown), and a letter of `parts`."""
    values = [[float(letter.replace("n", "nan")) for letter in word] for word in labels.split()]
    return make_labelled(values, [{"t": TRAIN, "v": VALID, "e": TEST, "-": ""}[letter] for letter in parts], task=task)


@pytest.mark.parametrize(
    ("labels", "parts", "task", "said"),
    [
        ("1 0 1 0 1 1", "ttvvee", "multilabel", "no label has 1 images with it, .* in test"),
        ("1 0 0 0 1 0", "ttvvee", "multilabel", "no label has 1 images with it, .* in valid"),
        ("0 0 1 0 1 0", "ttvvee", "multilabel", "no training image, or every one, has L0"),
        ("1 1 1", "---", "multilabel", "no training image, or every one, has L0"),
        ("1000 1101 1010 0101 1110 0001", "ttvvee", "multilabel", "has L0, L2; .* --labels .there are L1, L3.$"),
        ("10 01 10 01 10 10", "ttvvee", "multiclass", "nothing can be judged"),
    ],
)
def test_labels_that_teach_or_judge_nothing_are_refused(labels, parts, task, said):
    with pytest.raises(UserError, match=said):
        check_labels(made_up(labels, parts, task))


def test_labels_that_one_part_can_not_judge_are_named():
    test = made_up("11 00 11 00 10 00", "ttvvee")
    line = "made up: 'L1' has 0 images with and 2 without it in test; left out of the mean"
    assert check_labels(test) == [line]
    with pytest.raises(UserError, match="no label has 2 images with it, .* or a lower --min_positives"):
        check_labels(test, min_positives=2)
    assert "keeps 1 training images, all of one kind by L0, L1" in check_labels(test, fractions=[0.5])[1]
    notes = check_labels(made_up("100 010 001 100 010 001 100 010", "tttvvvee", "multiclass"))
    assert notes == [line.replace("L1", "L2")]
