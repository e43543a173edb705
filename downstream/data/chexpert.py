"""CheXpert: frontal images, five judged findings, valid.csv as the test."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import AUTO, PUBLISHED, ZEROS, Choices
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import join_same, label_values, labelled_images, read_rows
from downstream.data.splits import choose_parts, draw_subjects
from util.errors import UserError

JUDGED = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
VIEW, FRONTAL = "Frontal/Lateral", "Frontal"
VALID_IMAGES = 5000
_PATH = re.compile(r"(?:^|.*?/)(?P<id>(?:(?:train|valid|test)/)?(?P<patient>patient\d+)/[^/]+/[^/]+)$")


def read_chexpert(paths: list[Path], choices: Choices) -> LabelledImages:
    """train.csv, of whose frontal images 5,000 validate, and valid.csv, which tests.

    The published run draws its 5,000 by image, so that patients stand on both sides; here they are drawn by
    patient unless --split published asks for the former.
    """
    folder = Folder(paths[0])
    path = choices.csv or folder.table("train.csv")
    test = folder.table_if_any("valid.csv")
    wanted = list(choices.labels or JUDGED)
    if unknown := [label for label in wanted if label not in FINDINGS]:
        raise UserError(f"chexpert: --labels {unknown[0]}: has {', '.join(FINDINGS)}")
    notes: list[str] = []
    tables = [_read(file, wanted, choices, notes) for file in (path, test) if file]
    table = pd.concat(tables)
    subjects = table["patient"].to_numpy(str)
    official = np.repeat([TRAIN, TEST], [len(tables[0]), len(table) - len(tables[0])])
    if test is None and choices.split in (AUTO, PUBLISHED):
        raise UserError(
            f"{folder.root}: valid.csv, which is the test, is not in it or below; pass --split subject to test "
            "on some of train.csv"
        )
    train = np.flatnonzero(official == TRAIN)
    # Small copies (made-up ones) keep three quarters to train on.
    count = min(VALID_IMAGES, len(train) // 4)
    if choices.split == PUBLISHED:
        drawn = np.random.default_rng(choices.split_seed).choice(len(train), count, replace=False)
        official[train[drawn]] = VALID
        shared = len(set(subjects[official == VALID]) & set(subjects[official == TRAIN]))
        notes.append(
            f"warning: chexpert: --split published draws by image: {shared} patients are in train and in valid"
        )
    elif len(train):
        official[train[draw_subjects(subjects[train], count, choices.split_seed)]] = VALID
    return labelled_images(
        "chexpert",
        folder,
        choices,
        ids=list(table["id"]),
        names=list(table["Path"]),
        subjects=subjects,
        parts=choose_parts(choices, "chexpert", subjects, official, notes),
        labels=(wanted, table[wanted].to_numpy(np.float32)),
        notes=notes,
        strong_augmentation=True,
        shared_subjects=choices.split == PUBLISHED,
    )


def _read(path: Path, labels: list[str], choices: Choices, notes: list[str]) -> pd.DataFrame:
    """Frontal rows of one table: id, patient, Path and the labels' values."""
    table = read_rows(path, ["Path", VIEW, *labels], choices)
    frontal = table[table[VIEW] == FRONTAL]
    if frontal.empty:
        raise UserError(f"{path}: column {VIEW!r} has no {FRONTAL!r}")
    if len(frontal) < len(table):
        notes.append(f"chexpert: {len(table) - len(frontal)} lateral rows of {path.name} are left out")
    frontal = join_same(frontal, "Path", labels, path, notes)
    parts = frontal["Path"].str.replace("\\", "/").str.extract(_PATH)
    if (bad := parts["id"].isna().to_numpy()).any():
        line, cell = frontal.index[bad][0], frontal["Path"][bad].iloc[0]
        raise UserError(
            f"{path}: line {line}, column 'Path': {cell!r} is not .../patientNNNNN/studyN/file; "
            "read other tables with --dataset csv"
        )
    values = label_values(
        frontal, labels, path, notes, uncertain=choices.uncertain or PUBLISHED, empty=choices.empty or ZEROS
    )
    return pd.concat([frontal[["Path"]], parts, pd.DataFrame(values, frontal.index, labels)], axis=1).reset_index(
        drop=True
    )
