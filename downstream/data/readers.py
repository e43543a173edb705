"""The data sets, from the files of their sites: each reader makes one table of them.

A reader returns a row for each image, in the order that a published split leaves, and its labels, float32 1, 0, NaN. The
columns of the rows are id, which is also what the image's file is called; subject, if the tables name patients; and part,
if there is an official or published one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from downstream.data.choices import IGNORE, PUBLISHED, ZEROS
from downstream.data.labelled import TEST, TRAIN, VALID
from downstream.data.rows import PART_NAMES, VALUE_OF, WORDS, Source, one_hot
from downstream.data.splits import draw_subjects, listed_parts
from util.errors import UserError
from util.tables import read_table, read_text

Table = tuple[pd.DataFrame, pd.DataFrame]  # rows, labels

# ---------------------------------------------------------------- RSNA pneumonia challenge, SIIM-ACR pneumothorax


def read_rsna(source: Source) -> Table:
    """A row per box; a patient is positive if one of them is (Target 1)."""
    table = source.read(["Target"], ids=["patientId"])
    positive = source.labels(table, ["Target"])["Target"].rename("Pneumonia")
    rows, labels = _split_as_published(positive.groupby(table["patientId"]).max(), source)
    return rows.assign(subject=rows["id"]), labels


def read_siim(source: Source) -> Table:
    """A row per mask; an image is positive if one is not "-1"."""
    table = source.read(["EncodedPixels"], ids=["ImageId"])  # the header has a blank before it
    masks = table["EncodedPixels"].rename("Pneumothorax")
    source.refuse(masks, ~masks.str.fullmatch(r"-1|\d+( +\d+)*"), "is neither -1 nor pairs of numbers")
    return _split_as_published((masks != "-1").groupby(table["ImageId"]).max(), source)


def _split_as_published(label: pd.Series, source: Source) -> Table:
    """Images sorted by id and split 70/15/15 by two calls of scikit-learn, in the order that these leave; the first half of
    the 30% tests."""
    if len(label) < 4:
        raise UserError(f"{source.path}: {len(label)} images are too few to train, validate and test on")
    train, rest = train_test_split(label, test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    label = pd.concat({TRAIN: train, VALID: valid, TEST: test})
    return pd.DataFrame([*label.index], columns=["part", "id"]), label.to_frame()


# ---------------------------------------------------------------- ChestX-ray14

NIH_LISTS = {TRAIN: "train_val_list.txt", TEST: "test_list.txt"}
NIH_FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)


def read_nih(source: Source) -> Table:
    """With the official lists; an eighth of the patients of train_val_list.txt validates (the authors' own lists are not
    published)."""
    rows, table = source.images("Image Index", ["Finding Labels"], "Patient ID")
    words = table["Finding Labels"].str.split("|").explode().str.strip()
    source.refuse(words, ~words.isin(["No Finding", *NIH_FINDINGS]), "is none of the 14 findings")
    lists = {part: source.folder.table(name, needed=False) for part, name in NIH_LISTS.items()}
    if all(lists.values()):
        rows["part"] = listed_parts(list(rows["id"]), lists, source.notes)
        draw_valid(rows, 1 / 8, source, "subject")
    return rows, one_hot(words, table.index).reindex(columns=NIH_FINDINGS, fill_value=0)


# ---------------------------------------------------------------- CheXpert, MIMIC-CXR-JPG

CHEXPERT_JUDGED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHEXPERT_FINDINGS = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"),
    *("Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture"),
    "Support Devices",
)
CHEXPERT_PATH = r"(?:^|.*?/)(?P<id>(?:(?:train|valid|test)/)?(?P<subject>patient\d+)/[^/]+/[^/]+)$"


def read_chexpert(source: Source) -> Table:
    """train.csv, of whose frontal images 5,000 validate, and valid.csv, which tests.

    The published run draws its 5,000 by image, so that patients are on both sides; here they are drawn by patient unless
    --split published asks for the former.
    """
    args, names, tables = source.args, list(source.args.labels or CHEXPERT_JUDGED), []
    for part, own in ((TRAIN, source), (TEST, source.other("valid.csv"))):
        if own:
            _, table = own.images("Path", names, views=["Frontal/Lateral", "Frontal"])
            rows = table["Path"].str.replace("\\", "/").str.extract(CHEXPERT_PATH)
            own.refuse(table["Path"], rows["id"].isna(), "is not .../patientNNNNN/studyN/file; use --dataset csv")
            labels = own.labels(table, names, PUBLISHED, ZEROS)
            tables.append(pd.concat([rows.assign(part=part), labels], axis=1))
    rows = pd.concat(tables, ignore_index=True)
    train = np.flatnonzero(rows["part"] == TRAIN)
    count = min(5000, len(train) // 4)  # small copies (made-up ones) keep three quarters to train on
    if args.split == PUBLISHED:
        rows.loc[np.random.default_rng(args.split_seed).choice(train, count, replace=False), "part"] = VALID
    else:
        draw_valid(rows, count / len(train), source)
    return rows, rows[names]


def read_mimic(source: Source) -> Table:
    """The labels of a study for each of its PA and AP images, and the official split."""
    names = list(source.args.labels or CHEXPERT_FINDINGS)
    studies = source.once(read_table(source.path, ["study_id", *names]), "study_id", names)
    labels = source.labels(studies, names, PUBLISHED, ZEROS).set_index(studies["study_id"])
    split = source.other("mimic-cxr-*-split.csv", needed=True).path
    parts = read_table(split, ["dicom_id", "split"])
    parts = dict(zip(parts["dicom_id"], parts["split"]))
    images = source.other("mimic-cxr-*-metadata.csv", needed=True)
    rows, table = images.images("dicom_id", ["study_id"], "subject_id", views=["ViewPosition", "PA", "AP"])
    table = images.keep(table, "study_id", labels.index, f"of studies that are not in {source.path.name}")
    rows["part"] = rows["id"].map(parts).map(PART_NAMES)
    images.refuse(rows["id"], rows["part"].isna(), f"has no part in {split.name}")
    return rows.loc[table.index], labels.loc[table["study_id"]]


def draw_valid(rows: pd.DataFrame, share: float, source: Source, unit: str = "id") -> None:
    """Let whole subjects with a share of the training images, or of other units, validate."""
    train, subjects = rows["part"] == TRAIN, rows.get("subject", rows["id"])
    units = subjects[train][~rows[unit][train].duplicated()].to_numpy(str)
    drawn = units[draw_subjects(units, share * len(units), source.args.split_seed)]
    rows.loc[train & subjects.isin(drawn), "part"] = VALID


# ---------------------------------------------------------------- COVIDx

COVIDX_LINE = r"\s*(?P<patient>\S+)\s+(?P<filename>.*\S)\s+(?P<class>\S+)\s+(?P<source>\S+)\s*$"
COVIDX_FOLDERS = {TRAIN: "train", VALID: "val", TEST: "test"}  # also what a part's list is called


def read_covidx(source: Source) -> Table:
    """Lines "patient filename class source" of train.txt, test.txt and, in newer releases, val.txt, images in train/,
    test/ and val/. Lists of older releases are called train_COVIDx9A.txt and so on.

    Patient numbers count within their source, since another source may use the same. Without val.txt a fifth of
    train.txt validates, as published drawn by image; here by patient unless --split published asks for the former.
    """
    tables = []
    for part, name in COVIDX_FOLDERS.items():
        own = replace(source, path=source.path.with_name(source.path.name.replace("train", name, 1)))
        if part != VALID or own.path.is_file():
            lines = pd.Series(["", *read_text(own.path).splitlines()], name="line")
            lines = lines[lines.str.strip() != ""]
            table = lines.str.extract(COVIDX_LINE)
            own.refuse(lines, table["patient"].isna(), "is not: patient filename class source")
            table = own.once(table, "filename", list(table))
            tables.append(table.assign(part=part, id=f"{name}/" + table["filename"]))
    rows = source.where(pd.concat(tables)).reset_index(drop=True)
    rows["subject"] = rows["source"] + " " + rows["patient"]
    train = np.flatnonzero(rows["part"] == TRAIN)
    if len(tables) == 2 and source.args.split == PUBLISHED:
        kept, drawn = train_test_split(train, test_size=0.2, random_state=0)
        rows.loc[drawn, "part"] = VALID
        rows = rows.loc[[*kept, *drawn, *np.flatnonzero(rows["part"] == TEST)]]
    elif len(tables) == 2:
        draw_valid(rows, 1 / 5, source)
    return rows, one_hot(rows["class"], rows.index)


# ---------------------------------------------------------------- VinDr-CXR


def read_vindr(source: Source) -> Table:
    """PhysioNet's image_labels_train.csv and image_labels_test.csv, which have all labels; or the boxes of its
    annotations_train.csv and annotations_test.csv, or of Kaggle's train.csv (whose tests have no labels).

    A finding is present if more than half of an image's readers say so; the test has one consensus. An eighth of the
    training images validates.
    """
    boxes = "class_name" in read_table(source.path, ["image_id"])
    tests = source.other("annotations_test.csv" if boxes else "image_labels_test.csv")
    found = pd.concat({part: _majority(own) for part, own in ((TRAIN, source), (TEST, tests)) if own})
    labels = found[sorted(found)].fillna(False).astype(np.float32)
    rows = pd.DataFrame([*labels.index], columns=["part", "id"])
    if not tests:
        return rows[["id"]], labels
    draw_valid(rows, 1 / 8, source)
    return rows, labels


def _majority(source: Source) -> pd.DataFrame:
    """Which findings each image has, bool, one row per image in the order of their ids."""
    header = list(read_table(source.path, ["image_id"]))
    ids = [column for column in header if column.lower() in ("image_id", "rad_id")]  # tests have one consensus
    boxes = "class_name" in header
    findings = ["class_name"] if boxes else [column for column in header if column not in ids]
    table = source.read(findings, ids=ids + findings * boxes)
    marks = one_hot(table["class_name"], table.index) if boxes else source.labels(table, findings)
    found = marks.groupby([table[column] for column in ids]).max().groupby(level=0).mean() > 0.5
    return found[[name for name in found if name.lower() != "no finding"]]


# ---------------------------------------------------------------- PadChest

PADCHEST_NO_FINDING = ("normal", "exclude", "unchanged", "suboptimal study", "")


def read_padchest(source: Source) -> Table:
    """PA and AP images; Labels are Python lists in text, and rows without one are left out.

    Labels are those that 1% of the images have, unless --labels names others.
    """
    rows, table = source.images("ImageID", ["Labels"], "PatientID", views=["Projection", "PA", "AP"])
    cells = source.keep(table, "Labels", set(table["Labels"]) - {"", "nan"}, "without labels")["Labels"]
    source.refuse(cells, ~cells.str.fullmatch(r"\[.*\]"), "is no list of labels")
    words = cells.str.strip("[]").str.split(",").explode().str.strip(" '\"")
    found = one_hot(words[~words.isin(PADCHEST_NO_FINDING)], cells.index)
    if not source.args.labels:
        found = found.loc[:, found.sum() >= 0.01 * len(found)]
    return rows.loc[cells.index], found


# ---------------------------------------------------------------- anybody's table

NO_FINDING = ("", "no finding", "normal")


def read_csv(source: Source) -> Table:
    """One row per image: its path, file name or id, labels, and if there are such columns its subject and split."""
    args, header = source.args, list(read_table(source.path, [source.args.image_column]))
    subject = args.subject_column or ("subject_id" if "subject_id" in header else None)
    split = args.split_column or ("split" if "split" in header else None)
    others = [*args.label_columns, split] if split else args.label_columns
    rows, table = source.images(args.image_column, others, subject)
    if split:
        rows["part"] = table[split].str.lower().map(PART_NAMES)
        source.refuse(table[split], rows["part"].isna(), "is not train, valid or test")
    cells = table[args.label_columns[0]]
    if len(args.label_columns) > 1 or (_is_number(cells) | cells.str.lower().isin(["", *WORDS])).all():
        return rows, source.labels(table, args.label_columns, IGNORE, IGNORE)
    words = cells.str.split(args.separator, regex=False).explode().str.strip()
    what = "is a number, but other lines name findings; give --label_columns one per label"
    source.refuse(words, _is_number(words), what)
    labels, is_empty = one_hot(words[~words.str.lower().isin(NO_FINDING)], table.index), cells == ""
    if is_empty.any():
        rule = args.empty or ZEROS
        labels[is_empty] = VALUE_OF[rule]
        source.notes.append(f"{source.path.name}: {is_empty.sum()} cells are empty; rule: {rule}")
    return rows, labels


def _is_number(cells: pd.Series) -> pd.Series:
    return pd.to_numeric(cells, errors="coerce").notna()


# The reader of each data set, and the table of its labels: of the first of these patterns that any file fits.
READERS = {
    "rsna": (read_rsna, ["*stage_2_train_labels*.csv"]),
    "nih": (read_nih, ["Data_Entry_2017*.csv"]),
    "chexpert": (read_chexpert, ["train.csv"]),
    "mimic": (read_mimic, ["mimic-cxr-*-chexpert.csv", "mimic-cxr-*-negbio.csv"]),
    "siim": (read_siim, ["*train-rle*.csv", "stage_2_train.csv"]),
    "covidx": (read_covidx, ["train*.txt"]),
    "vindr": (read_vindr, ["image_labels_train.csv", "annotations_train.csv", "train.csv"]),
    "padchest": (read_padchest, ["PADCHEST_chest_x_ray_images_labels*.csv"]),
    "csv": (read_csv, ["*.csv"]),
}
