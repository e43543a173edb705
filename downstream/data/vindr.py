"""VinDr-CXR: findings that most readers of an image marked; the test as PhysioNet gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import Choices
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import check_ids, labelled_images, own_subjects_note, read_rows
from downstream.data.splits import choose_parts, draw_subjects
from util.errors import UserError

TRAIN_TABLES, TEST_TABLES = ("annotations_train.csv", "train.csv"), ("annotations_test.csv",)
ID, NAME, READER = "image_id", "class_name", "rad_id"
NO_FINDING = "No finding"
VALID_SHARE = 1 / 8


def read_vindr(paths: list[Path], choices: Choices) -> LabelledImages:
    """Box rows, image by reader by finding, of PhysioNet's annotations_train.csv and annotations_test.csv, or
    of Kaggle's train.csv alone (whose tests have no labels).

    A finding is present where more than half of an image's readers marked it; the test has one consensus.
    An eighth of the training images validates.
    """
    folder = Folder(paths[0])
    path = choices.csv or folder.table(*TRAIN_TABLES)
    test_path = folder.table_if_any(*TEST_TABLES)
    train = _majority(read_rows(path, [ID, NAME, READER], choices), path)
    test = _majority(read_rows(test_path, [ID, NAME], choices), test_path) if test_path else train.iloc[:0]
    both = sorted(set(train.index) & set(test.index))
    if both:
        raise UserError(f"{test_path}: {both[0]!r} is in {path.name} too; get the tables again")
    table = pd.concat([train, test]).fillna(False)
    findings = sorted(table.columns)
    ids = table.index.to_numpy(str)
    notes = own_subjects_note("vindr", ids, "the tables name no patients")
    official = None
    if test_path:
        official = np.repeat([TRAIN, TEST], [len(train), len(test)])
        count = max(1, round(VALID_SHARE * len(train)))
        official[np.flatnonzero(draw_subjects(ids[: len(train)], count, choices.split_seed))] = VALID
    return labelled_images(
        "vindr",
        folder,
        choices,
        ids=list(ids),
        subjects=ids,
        parts=choose_parts(choices, "vindr", ids, official, notes),
        labels=(findings, table[findings].to_numpy(np.float32)),
        notes=notes,
    )


def _majority(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Which findings each image has, bool, one row per image in the order of their ids."""
    for column in table.columns.intersection([ID, NAME, READER]):
        check_ids(table, column, path)
    if READER not in table:
        table = table.assign(**{READER: ""})
    readers = table.groupby(ID)[READER].nunique()
    marks = table.drop_duplicates([ID, READER, NAME]).groupby([ID, NAME]).size().unstack(fill_value=0)
    marks = marks.drop(columns=[name for name in marks if name.lower() == NO_FINDING.lower()])
    return marks.gt(readers / 2, axis=0)
