"""The published data sets, from the files of their sites: each reader makes one table of them."""

from __future__ import annotations

import argparse
import ast
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from downstream.data.choices import AUTO, PUBLISHED, ZEROS
from downstream.data.folder import Folder
from downstream.data.labelled import MULTICLASS, PARTS, TEST, TRAIN, VALID
from downstream.data.rows import Rows, join_same, keep_where, label_values, one_hot, read_rows, refuse_cell
from downstream.data.splits import draw_subjects, listed_parts, split_70_15_15
from util.errors import UserError
from util.tables import read_table, read_text

Choices = argparse.Namespace

# ---------------------------------------------------------------- RSNA pneumonia challenge, SIIM-ACR pneumothorax


def read_rsna(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """stage_2_train_labels.csv has a row per box; a patient is positive if one of them is (Target 1)."""
    path = choices.csv or folder.table("*stage_2_train_labels*.csv")
    table = read_rows(path, choices.where, ["Target"], ids=["patientId"])
    positive = label_values(table, ["Target"], path, notes)["Target"].groupby(table["patientId"], sort=True).max()
    return _split_as_published(positive.rename("Pneumonia"))


def read_siim(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """train-rle.csv has a row per mask; an image is positive if one is not "-1"."""
    column = "EncodedPixels"  # the header has a blank before it
    path = choices.csv or folder.table("*train-rle*.csv", "stage_2_train.csv")
    table = read_rows(path, choices.where, [column], ids=["ImageId"])
    is_mask = table[column] != "-1"
    odd = is_mask & ~table[column].str.fullmatch(r"\d+( +\d+)*")
    refuse_cell(path, table[column], odd, "is neither -1 nor pairs of numbers")
    positive = is_mask.astype(np.float32).groupby(table["ImageId"], sort=True).max()
    return _split_as_published(positive.rename("Pneumothorax"), no_patients=f"{path.name} names no patients")


def _split_as_published(label: pd.Series, **more: str) -> Rows:
    """Images sorted by id and split 70/15/15, in the order that this leaves."""
    order, parts = split_70_15_15(len(label))
    ids = label.index[order]
    return Rows(pd.DataFrame({"id": ids, "subject": ids, "part": parts}), label.iloc[order].to_frame(), **more)


# ---------------------------------------------------------------- ChestX-ray14

NIH_LISTS = {TRAIN: "train_val_list.txt", TEST: "test_list.txt"}
NIH_FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)


def read_nih(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """Data_Entry_2017*.csv with the official lists; an eighth of the patients of train_val_list.txt validates (the
    authors' own lists are not published)."""
    image, labels, patient = "Image Index", "Finding Labels", "Patient ID"
    path = choices.csv or folder.table("Data_Entry_2017*.csv")
    table = read_rows(path, choices.where, [labels], ids=[image], subject=patient)
    table = join_same(table, image, [labels, patient], path, notes)
    found = [{part.strip() for part in cell.split("|")} - {"No Finding"} for cell in table[labels]]
    unknown = pd.Series([not names <= set(NIH_FINDINGS) for names in found], table.index)
    refuse_cell(path, table[labels], unknown, "has a word that is none of the 14 findings")
    rows = pd.DataFrame({"id": table[image], "subject": table[patient]})
    lists = {part: folder.table(name, needed=False) for part, name in NIH_LISTS.items()}
    if any(lists.values()):
        for part, name in NIH_LISTS.items():
            if lists[part] is None:
                raise UserError(f"{folder.root}: {name} is missing, while the other list is there; get both")
        rows["part"] = listed_parts(list(rows["id"]), lists, notes)
        patients = np.unique(rows["subject"][rows["part"] == TRAIN].to_numpy(str))
        drawn = np.random.default_rng(choices.split_seed).permutation(patients)[: max(1, round(len(patients) / 8))]
        rows.loc[(rows["part"] == TRAIN) & rows["subject"].isin(drawn), "part"] = VALID
    else:
        notes.append(
            f"warning: nih: {' and '.join(NIH_LISTS.values())} are not in {folder.root}, so this is not the official "
            "split and no result compares with a published one"
        )
    return Rows(rows, one_hot(found, NIH_FINDINGS), strong_augmentation=True)


# ---------------------------------------------------------------- CheXpert, MIMIC-CXR-JPG

CHEXPERT_JUDGED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT_FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
CHEXPERT_PATH = r"(?:^|.*?/)(?P<id>(?:(?:train|valid|test)/)?(?P<subject>patient\d+)/[^/]+/[^/]+)$"


def read_chexpert(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """train.csv, of whose frontal images 5,000 validate, and valid.csv, which tests.

    The published run draws its 5,000 by image, so that patients are on both sides; here they are drawn by patient unless
    --split published asks for the former.
    """
    labels, rules = _chexpert_options(choices, CHEXPERT_JUDGED)
    tables, values = [], []
    files = {TRAIN: choices.csv or folder.table("train.csv"), TEST: folder.table("valid.csv", needed=False)}
    for part, path in files.items():
        if path is None:
            continue
        whole = read_rows(path, choices.where, ["Path", "Frontal/Lateral", *labels])
        table = whole[whole["Frontal/Lateral"] == "Frontal"]
        if table.empty:
            raise UserError(f"{path}: column 'Frontal/Lateral' has no 'Frontal'")
        if len(table) < len(whole):
            notes.append(f"chexpert: {len(whole) - len(table)} lateral rows of {path.name} are left out")
        table = join_same(table, "Path", labels, path, notes)
        names = table["Path"].str.replace("\\", "/").str.extract(CHEXPERT_PATH)
        refuse_cell(path, table["Path"], names["id"].isna(), "is not .../patientNNNNN/studyN/file; use --dataset csv")
        tables.append(names.assign(file=table["Path"], part=part))
        values.append(label_values(table, labels, path, notes, **rules))
    if files[TEST] is None and choices.split in (AUTO, PUBLISHED) and not choices.split_lists:
        raise UserError(
            f"{folder.root}: valid.csv, which is the test, is not in it or below; pass --split subject to test "
            "on some of train.csv"
        )
    rows = pd.concat(tables, ignore_index=True)
    train = np.flatnonzero(rows["part"] == TRAIN)
    count = min(5000, len(train) // 4)  # small copies (made-up ones) keep three quarters to train on
    if choices.split == PUBLISHED:
        drawn = np.random.default_rng(choices.split_seed).choice(len(train), count, replace=False)
        rows.loc[train[drawn], "part"] = VALID
    else:
        draw_valid(rows, count, choices)
    values = pd.concat(values, ignore_index=True)
    return Rows(rows, values, strong_augmentation=True, shared_subjects=choices.split == PUBLISHED)


def _chexpert_options(choices: Choices, default: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The labels of --labels, and what their cells count as."""
    labels = list(choices.labels or default)
    if unknown := set(labels).difference(CHEXPERT_FINDINGS):
        raise UserError(f"--labels {min(unknown)}: there are {', '.join(CHEXPERT_FINDINGS)}")
    return labels, {"uncertain": choices.uncertain or PUBLISHED, "empty": choices.empty or ZEROS}


def read_mimic(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """The labels of a study (mimic-cxr-2.0.0-chexpert.csv, or -negbio.csv) for each of its frontal images (PA, AP), and the
    official split."""
    labels, rules = _chexpert_options(choices, CHEXPERT_FINDINGS)
    path = (
        choices.csv or folder.table("mimic-cxr-*-chexpert.csv", needed=False) or folder.table("mimic-cxr-*-negbio.csv")
    )
    studies = join_same(read_rows(path, (), labels, ids=["study_id"]), "study_id", labels, path, notes)
    values = label_values(studies, labels, path, notes, **rules).set_index(studies["study_id"])
    split = folder.table("mimic-cxr-*-split.csv")
    parts = read_rows(split, (), ["split"], ids=["dicom_id"])
    parts = dict(zip(parts["dicom_id"], parts["split"].replace("validate", VALID)))
    metadata = folder.table("mimic-cxr-*-metadata.csv")
    images = read_rows(metadata, choices.where, ["ViewPosition"], ids=["dicom_id", "study_id"], subject="subject_id")
    images = join_same(images, "dicom_id", ["subject_id", "study_id"], metadata, notes)
    frontal = images[images["ViewPosition"].isin(("PA", "AP"))]
    table = frontal[frontal["study_id"].isin(values.index)]
    if table.empty:
        raise UserError(f"{metadata}: no image is PA or AP and of a study in {path.name}")
    notes.append(
        f"mimic: labels of {path.name}; {len(images) - len(frontal)} images of other views than PA and AP and "
        f"{len(frontal) - len(table)} of studies without labels are left out"
    )
    part = table["dicom_id"].map(parts)
    refuse_cell(metadata, table["dicom_id"], ~part.isin(PARTS), f"has no part in {split.name}")
    subject, study = table["subject_id"], table["study_id"]
    place = "files/p" + subject.str[:2] + "/p" + subject + "/s" + study + "/" + table["dicom_id"] + ".jpg"
    rows = pd.DataFrame({"id": table["dicom_id"], "subject": subject, "part": part, "file": place})
    return Rows(rows, values.loc[study])


def draw_valid(rows: pd.DataFrame, count: int, choices: Choices) -> None:
    """Let subjects of the training part with `count` images validate."""
    train = np.flatnonzero(rows["part"] == TRAIN)
    if len(train):
        drawn = draw_subjects(rows["subject"].to_numpy(str)[train], count, choices.split_seed)
        rows.iloc[train[drawn], rows.columns.get_loc("part")] = VALID


# ---------------------------------------------------------------- COVIDx

COVIDX_COLUMNS = ["patient", "filename", "class", "source"]
COVIDX_FOLDERS = {TRAIN: "train", VALID: "val", TEST: "test"}  # also what a part's list is called


def read_covidx(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """Lines "patient filename class source" of train.txt, test.txt and, in newer releases, val.txt, images in train/,
    test/ and val/. Lists of older releases are called train_COVIDx9A.txt and so on.

    Patients are told apart within their source, whose numbers another source may use again. Without val.txt a fifth of
    train.txt validates, as published drawn by image; here by patient unless --split published asks for the former.
    """
    first = choices.csv or folder.table("train.txt", "train_COVIDx*.txt")
    if not first.name.startswith("train"):
        raise UserError(f"--csv {first}: expected the list that trains, train.txt or train_COVIDx9A.txt")
    tables = []
    for part, name in COVIDX_FOLDERS.items():
        path = first.with_name(first.name.replace("train", name, 1))
        if part != VALID or path.is_file():
            table = join_same(_read_covidx_list(path), "filename", ["patient", "class", "source"], path, notes)
            tables.append(table.assign(part=part, id=f"{name}/" + table["filename"]))
    rows = keep_where(pd.concat(tables, ignore_index=True), folder.root, choices.where).reset_index(drop=True)
    rows["subject"] = rows["source"] + " " + rows["patient"]
    train = np.flatnonzero(rows["part"] == TRAIN)
    if len(tables) == 2 and choices.split == PUBLISHED:
        kept, drawn = train_test_split(train, test_size=0.2, random_state=0)
        rows.loc[drawn, "part"] = VALID
        rows = rows.loc[[*kept, *drawn, *np.flatnonzero(rows["part"] == TEST)]]
    elif len(tables) == 2:
        draw_valid(rows, max(1, round(len(train) / 5)), choices)
    classes = one_hot([{name} for name in rows["class"]], sorted(set(rows["class"])))
    return Rows(rows, classes, MULTICLASS, shared_subjects=choices.split == PUBLISHED)


def _read_covidx_list(path: Path) -> pd.DataFrame:
    rows = {}
    for line, content in enumerate(read_text(path).splitlines(), start=1):
        if len(words := content.split()) >= len(COVIDX_COLUMNS):
            rows[line] = [words[0], " ".join(words[1:-2]), *words[-2:]]  # only a file's name can have blanks
        elif words:
            raise UserError(f"{path}: line {line}: expected '{' '.join(COVIDX_COLUMNS)}', found {content.strip()!r}")
    if not rows:
        raise UserError(f"{path}: no rows")
    return pd.DataFrame.from_dict(rows, orient="index", columns=COVIDX_COLUMNS)


# ---------------------------------------------------------------- VinDr-CXR


def read_vindr(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """PhysioNet's image_labels_train.csv and image_labels_test.csv, which have all labels; or the boxes of its
    annotations_train.csv and annotations_test.csv, or of Kaggle's train.csv (whose tests have no labels).

    A finding is present if more than half of an image's readers say so; the test has one consensus. An eighth of the
    training images validates.
    """
    path = choices.csv or folder.table("image_labels_train.csv", needed=False)
    path = path or folder.table("annotations_train.csv", "train.csv")
    train, boxes = _majority(path, choices)
    test_path = folder.table("annotations_test.csv" if boxes else "image_labels_test.csv", needed=False)
    test = _majority(test_path, choices)[0] if test_path else train.iloc[:0]
    notes.append(f"vindr: labels of {path.name}{f' and {test_path.name}' if test_path else ''}")
    if both := set(train.index) & set(test.index):
        raise UserError(f"{test_path}: {min(both)!r} is in {path.name} too; get the tables again")
    labels = pd.concat([train, test]).astype(np.float32).fillna(0)
    rows = pd.DataFrame({"id": labels.index, "subject": labels.index})
    if test_path:
        rows["part"] = np.repeat([TRAIN, TEST], [len(train), len(test)])
        draw_valid(rows, max(1, round(len(train) / 8)), choices)
    return Rows(rows, labels[sorted(labels)], no_patients="the tables name no patients")


def _majority(path: Path, choices: Choices) -> tuple[pd.DataFrame, bool]:
    """Which findings each image has, bool, one row per image in the order of their ids; and whether from boxes."""
    image, finding = "image_id", "class_name"
    header = list(read_table(path, [image]))
    readers = [column for column in header if column.lower() == "rad_id"]  # none in the tests' consensus
    boxes = finding in header
    findings = [finding] if boxes else [column for column in header if column not in (image, *readers)]
    table = read_rows(path, choices.where, findings, ids=[image, *readers, *([finding] if boxes else ())])
    by_reader = [table[column] for column in (image, *readers)]
    if boxes:
        marks = pd.crosstab(by_reader, table[finding]) > 0
    else:
        marks = label_values(table, findings, path, []).groupby(by_reader).max()
    found = marks.groupby(level=0).mean() > 0.5
    return found[[name for name in found if name.lower() != "no finding"]], boxes


# ---------------------------------------------------------------- PadChest

PADCHEST_NO_FINDING = {"normal", "exclude", "unchanged", "suboptimal study", ""}


def read_padchest(folder: Folder, choices: Choices, notes: list[str]) -> Rows:
    """PA and AP images; Labels are Python lists in text, and rows without one are left out.

    Labels are those that 1% of the images have, unless --labels names others.
    """
    image, labels, patient, view = "ImageID", "Labels", "PatientID", "Projection"
    path = choices.csv or folder.table("PADCHEST_chest_x_ray_images_labels*.csv")
    table = read_rows(path, choices.where, [labels, view], ids=[image], subject=patient)
    frontal = table[table[view].isin(("PA", "AP"))]
    known = frontal[~frontal[labels].isin(("", "nan"))]  # the real table has the word in one row
    if known.empty:
        raise UserError(f"{path}: no row has {view} PA or AP and {labels}")
    notes.append(
        f"padchest: {len(table) - len(frontal)} images of other projections than PA and AP and "
        f"{len(frontal) - len(known)} without labels are left out"
    )
    known = join_same(known, image, [labels, patient], path, notes)
    lists = known[labels].map(_python_list)
    refuse_cell(path, known[labels], lists.isna(), "is no list of labels")
    found = [{str(label).strip() for label in names} - PADCHEST_NO_FINDING for names in lists]
    counts = Counter(label for row in found for label in row)
    names = sorted(counts)
    if choices.labels is None:
        names = [label for label in names if counts[label] >= 0.01 * len(found)]
        notes.append(f"padchest: the {len(names)} of {len(counts)} labels that 1% of the images have")
    return Rows(pd.DataFrame({"id": known[image], "subject": known[patient]}), one_hot(found, names))


def _python_list(cell: str) -> list | None:
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return None
    return found if isinstance(found, list) else None
