"""Anybody's images: a table with one column per label, or one column of names."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import IGNORE, ONES, ZEROS
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID
from downstream.data.rows import WORDS, Rows, join_same, label_values, one_hot, one_spelling, read_rows, refuse_cell
from util.errors import UserError
from util.tables import read_table

SUBJECT, SPLIT = "subject_id", "split"  # read if the table has them
PART_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("valid", "validate", "validation", "val", "dev"), VALID),
    **dict.fromkeys(("test", "testing"), TEST),
}
NO_FINDING = ("", "no finding", "normal")
LISTS = ("train.txt", "test.txt", "val.txt", "*_list.txt", "valid.csv", "test.csv", "*split*.csv")


def read_csv(folder: Folder, choices: argparse.Namespace, notes: list[str]) -> Rows:
    """One row per image: its path, file name or id, labels, and if there are such columns its subject and split."""
    path, image = choices.csv or folder.table("*.csv"), choices.image_column
    header = list(read_table(path, [image]))
    subject = choices.subject_column or (SUBJECT if SUBJECT in header else None)
    split = choices.split_column or (SPLIT if SPLIT in header else None)
    others = [*choices.label_columns, *filter(None, (subject, split))]
    table = read_rows(path, choices.where, others, ids=[image], subject=subject)
    table = join_same(table, image, others, path, notes)
    rows = pd.DataFrame({"id": table[image], "subject": one_spelling("csv", table[subject or image], notes)})
    if split:
        rows["part"] = table[split].str.lower().map(PART_NAMES)
        refuse_cell(path, table[split], rows["part"].isna(), "is not train, valid or test")
    elif not choices.split_lists and (
        unused := [str(found) for found in Folder(path.parent).nearby(*LISTS) if found != path]
    ):
        notes.append(
            f"warning: csv: {', '.join(unused)} may be official lists of a split, which are not used; pass "
            "--split_lists or --split_column, or use the data set's own name with --dataset"
        )
    reason = f"each has its own {subject!r}" if subject else "name the subjects by --subject_column"
    return Rows(rows, _labels(table, path, choices, notes), no_patients=reason)


def _labels(table: pd.DataFrame, path: Path, choices: argparse.Namespace, notes: list[str]) -> pd.DataFrame:
    column = choices.label_columns[0]
    cells = table[column]
    numeric = _is_number(cells) | cells.str.lower().isin(WORDS.keys())
    if len(choices.label_columns) > 1 or (numeric | (cells == "")).all():
        rules = {"uncertain": choices.uncertain or IGNORE, "empty": choices.empty or IGNORE}
        return label_values(table, choices.label_columns, path, notes, **rules)
    if choices.uncertain is not None or choices.empty == ONES:
        option = "--uncertain" if choices.uncertain is not None else "--empty ones"
        raise UserError(f"{option}: has no effect on column {column!r}, which holds names; leave it out")
    if not choices.separator:
        raise UserError("--separator '': expected what stands between two names, such as '|'")
    if n_empty := int((cells == "").sum()):
        notes.append(f"{path.name}: {n_empty} cells are empty; rule: {choices.empty or ZEROS}")
    words = cells.str.split(choices.separator, regex=False).explode().str.strip()
    numbers = _is_number(words)
    refuse_cell(path, words, numbers, "is a number, but other lines name findings; give --label_columns one per label")
    words = words[~words.str.lower().isin(NO_FINDING)]
    if words.empty:
        raise UserError(f"{path}: column {column!r} names no finding in any row")
    found = words.groupby(level=0).agg(set)
    names = sorted(set(words))
    labels = one_hot([found.get(line, set()) for line in table.index], names)
    if choices.empty == IGNORE:
        labels[(cells == "").to_numpy()] = np.nan
    if several := [name for name in names if any(sign in name for sign in "|;,[")]:
        notes.append(
            f"warning: csv: column {column!r}: {several[0]!r} is taken for one finding, with {choices.separator!r} "
            "between findings; name another --separator if these are several"
        )
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(name.casefold(), name)) != name:
            notes.append(f"warning: csv: column {column!r}: {other!r} and {name!r} are taken for two findings")
    return labels


def _is_number(cells: pd.Series) -> pd.Series:
    return pd.to_numeric(cells, errors="coerce").notna()
