"""Anybody's images: a table with one column per label, or one column of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import IGNORE, ONES, ZEROS, Choices
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import (
    WORDS,
    check_ids,
    join_same,
    label_values,
    labelled_images,
    one_hot,
    one_spelling,
    own_subjects_note,
    read_rows,
)
from downstream.data.splits import choose_parts
from util.errors import UserError
from util.tables import read_header

SUBJECT, SPLIT = "subject_id", "split"  # taken where the table has them
PART_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    "valid": VALID,
    "validate": VALID,
    "validation": VALID,
    "val": VALID,
    "dev": VALID,
    "test": TEST,
    "testing": TEST,
}
LIST_SIGNS = "|;,["
NO_FINDING = ("", "no finding", "normal")
LISTS = ("train.txt", "test.txt", "val.txt", "*_list.txt", "valid.csv", "test.csv", "*split*.csv")


def read_csv(paths: list[Path], choices: Choices) -> LabelledImages:
    """One row per image: its path, file name or id, labels, and where there are such columns its subject and
    split."""
    folder = Folder(paths[0])
    path = choices.csv or folder.table("*.csv")
    header = read_header(path, [choices.image_column])
    subject, split = (
        name or (default if default in header else None)
        for name, default in ((choices.subject_column, SUBJECT), (choices.split_column, SPLIT))
    )
    extra = [name for name in (subject, split) if name]
    table = read_rows(path, [choices.image_column, *choices.label_columns, *extra], choices)
    check_ids(table, choices.image_column, path)
    notes: list[str] = []
    table = join_same(table, choices.image_column, [*choices.label_columns, *extra], path, notes)
    ids = list(table[choices.image_column])
    if subject:
        check_ids(table, subject, path, subjects=True)
    subjects = one_spelling("csv", table[subject if subject else choices.image_column], notes)
    reason = f"each has its own {subject!r}" if subject else "name the subjects by --subject_column"
    notes += own_subjects_note("csv", subjects, reason)
    official = None
    if split:
        words = table[split].str.lower()
        if (bad := ~words.isin(PART_NAMES.keys()).to_numpy()).any():
            line, cell = table.index[bad][0], table[split][bad].iloc[0]
            raise UserError(f"{path}: line {line}, column {split!r}: {cell!r} is not train, valid or test")
        official = words.map(PART_NAMES).to_numpy(str)
    elif unused := [str(found) for found in Folder(path.parent).nearby(*LISTS) if found != path]:
        notes.append(
            f"warning: csv: {', '.join(unused)} may be official lists of a split, which are not used; name a "
            "column by --split_column, or use the data set's own name with --dataset"
        )
    return labelled_images(
        "csv",
        folder,
        choices,
        ids=ids,
        subjects=subjects,
        parts=choose_parts(choices, "csv", subjects, official, notes),
        labels=_labels(table, path, choices, notes),
        notes=notes,
    )


def _labels(table: pd.DataFrame, path: Path, choices: Choices, notes: list[str]) -> tuple[list[str], np.ndarray]:
    columns = list(choices.label_columns)
    cells = table[columns[0]]
    numeric = pd.to_numeric(cells, errors="coerce").notna() | cells.str.lower().isin(WORDS.keys())
    if len(columns) > 1 or (numeric | (cells == "")).all():
        rules = {"uncertain": choices.uncertain or IGNORE, "empty": choices.empty or IGNORE}
        return columns, label_values(table, columns, path, notes, **rules)
    if choices.uncertain is not None or choices.empty == ONES:
        option = "--uncertain" if choices.uncertain is not None else "--empty ones"
        raise UserError(f"{option}: has no effect on column {columns[0]!r}, which holds names; leave it out")
    if n_empty := int((cells == "").sum()):
        notes.append(f"{path.name}: {n_empty} cells are empty; rule: {choices.empty or ZEROS}")
    rows = [{part.strip() for part in cell.split(choices.separator)} for cell in cells]
    rows = [{name for name in row if name.lower() not in NO_FINDING} for row in rows]
    for line, row in zip(table.index, rows, strict=True):
        for name in row:
            if _is_number(name):
                raise UserError(
                    f"{path}: line {line}, column {columns[0]!r}: {name!r} is a number where names of findings "
                    "stand in other lines; give one column per label by --label_columns"
                )
    names = sorted(set().union(*rows))
    if not names:
        raise UserError(f"{path}: column {columns[0]!r} names no finding in any row")
    notes += _odd_names(names, columns[0], choices.separator)
    labels = one_hot(rows, names)
    if choices.empty == IGNORE:
        labels[(cells == "").to_numpy()] = np.nan
    return names, labels


def _odd_names(names: list[str], column: str, separator: str) -> list[str]:
    """Warnings of names that look like several in one, and of two that may be one."""
    notes = []
    if several := [name for name in names if any(sign in name for sign in LIST_SIGNS)]:
        notes.append(
            f"warning: csv: column {column!r}: {several[0]!r} is taken for one finding, with {separator!r} between "
            "findings; name another --separator if these are several"
        )
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(name.casefold(), name)
        if other != name:
            notes.append(f"warning: csv: column {column!r}: {other!r} and {name!r} are taken for two findings")
    return notes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
