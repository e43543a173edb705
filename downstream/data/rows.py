"""From the cells of a table to rows, subjects and labels, the same way for every data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import IGNORE, ONES, PUBLISHED, ZEROS
from downstream.data.labelled import MULTILABEL
from util.errors import UserError
from util.subjects import same_subjects
from util.tables import read_table

VALUE_OF = {ZEROS: 0.0, ONES: 1.0, IGNORE: np.nan}
NO_SUBJECT = ("", "nan", "none", "null", "n/a", "<na>")
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
# What the published CheXpert run takes -1 for; 0 for labels that are not here.
PUBLISHED_UNCERTAIN = {"Atelectasis": 1.0, "Edema": 1.0, "Pleural Effusion": 1.0}


@dataclass
class Rows:
    """What a reader makes of a data set's tables: a row for each image, in the order that a published split leaves.

    Attributes:
        table: columns id, subject, and if there are such: part (the official or published one), file (what the image's
            file is called; default: the id).
        labels: float32, a column for each label, the same rows: 1, 0, NaN.
        no_patients: why every image may count as its own subject; "" where it can't be.
        by_part: whether the images are then sorted by part.

    The others are those of `LabelledImages`.
    """

    table: pd.DataFrame
    labels: pd.DataFrame
    task: str = MULTILABEL
    strong_augmentation: bool = False
    shared_subjects: bool = False
    no_patients: str = ""
    by_part: bool = True


def read_rows(
    path: Path, where: Sequence[str], columns: Sequence[str], *, ids: Sequence[str] = (), subject: str | None = None
) -> pd.DataFrame:
    """The rows of a table that --where keeps, as text, by their line in the file.

    Raises:
        UserError: a column is missing, or a row names nothing in `ids` or nobody in `subject`, where "nan" and what else
            programs write for nobody would all be one person.
    """
    named = [*ids, subject] if subject else list(ids)
    wanted = list(dict.fromkeys([*named, *columns, *conditions(where)]))
    table = read_table(path, wanted)
    if table.empty:
        raise UserError(f"{path}: no rows")
    table = keep_where(table, path, where)
    for column in named:
        none = table[column].str.lower().isin(NO_SUBJECT if column == subject else [""])
        refuse_cell(path, table[column], none, "names nothing; give every row one")
    return table


def refuse_cell(path: Path, cells: pd.Series, bad: pd.Series, what: str) -> None:
    """`UserError` by line and column for the first of the cells that are bad, if any."""
    if bad.any():
        line, cell = cells.index[bad][0], cells[bad].iloc[0]
        raise UserError(f"{path}: line {line}, column {cells.name!r}: {cell[:60]!r} {what}")


def conditions(where: Sequence[str]) -> dict[str, list[str]]:
    """--where as the allowed values of each column."""
    found: dict[str, list[str]] = {}
    for condition in where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition!r}: expected COLUMN=VALUE")
        found.setdefault(column.strip(), []).append(value.strip())
    return found


def keep_where(table: pd.DataFrame, path: Path, where: Sequence[str]) -> pd.DataFrame:
    """The rows that --where keeps; `UserError` if it keeps none, or a column is missing."""
    for column, values in conditions(where).items():
        if column not in table:
            raise UserError(f"--where {column}: {path} has {', '.join(table.columns)}")
        numbers = _numbers(pd.Series(values)).dropna()
        kept = table[column].isin(values) | _numbers(table[column]).isin(numbers)
        if not kept.any():
            found = ", ".join(map(repr, sorted(set(table[column]))[:5]))
            raise UserError(f"{path}: --where keeps no row; column {column!r} has {found}")
        table = table[kept]
    return table


def _numbers(cells: pd.Series) -> pd.Series:
    return pd.to_numeric(cells, errors="coerce")


def label_values(
    table: pd.DataFrame,
    columns: Sequence[str],
    path: Path,
    notes: list[str],
    *,
    uncertain: str | None = None,
    empty: str | None = None,
) -> pd.DataFrame:
    """Labels of a table with one column each: float32 1, 0 and NaN.

    Cells are 1 or 0, or true, false, yes, no; -1 (uncertain) or empty if a rule says what these count as,
    which `notes` then repeat with their number.

    Raises:
        UserError: file, line and column of the first cell that is none of these.
    """
    labels, counts = {}, np.zeros(2, int)
    for column in columns:
        values = _numbers(table[column].str.lower().replace(WORDS))
        minus, blank = values == -1, table[column] == ""
        bad = ~(values.isin((0, 1)) | (minus & (uncertain is not None)) | (blank & (empty is not None)))
        more = ", -1 (uncertain)" * (uncertain is not None) + ", an empty cell" * (empty is not None)
        refuse_cell(path, table[column], bad, f"is no label; expected 1, 0{more}")
        counts += minus.sum(), blank.sum()
        if uncertain is not None:
            rule = PUBLISHED_UNCERTAIN.get(column, 0.0) if uncertain == PUBLISHED else VALUE_OF[uncertain]
            values = values.mask(minus, rule)
        if empty is not None:
            values = values.mask(blank, VALUE_OF[empty])
        labels[column] = values.astype(np.float32)
    for count, what, rule in zip(counts, ("uncertain (-1)", "empty"), (uncertain, empty), strict=True):
        if count:
            notes.append(f"{path.name}: {count} cells are {what}; rule: {rule}")
    return pd.DataFrame(labels, table.index)


def one_hot(rows: Sequence[set[str]], names: Sequence[str]) -> pd.DataFrame:
    """float32 1 where a row has the name, else 0."""
    values = np.array([[name in row for name in names] for row in rows], np.float32)
    return pd.DataFrame(values.reshape(len(rows), len(names)), columns=list(names))


def join_same(table: pd.DataFrame, column: str, others: Sequence[str], path: Path, notes: list[str]) -> pd.DataFrame:
    """One row per id whose rows say the same in `others`; `UserError` with the lines of one whose rows differ."""
    kept = table.drop_duplicates(column)
    if len(kept) == len(table):
        return table
    different = table.groupby(column, sort=False)[list(others)].nunique() > 1
    worst = different.index[different.any(axis=1)]
    if len(worst):
        lines = table.index[table[column] == worst[0]][:4].tolist()
        raise UserError(
            f"{path}: {worst[0]!r} is in lines {', '.join(map(str, lines))} with different values of "
            f"{different.loc[worst[0]].idxmax()!r}, and {len(worst) - 1} more ids likewise; keep one row per image"
        )
    notes.append(f"{path.name}: {len(table) - len(kept)} rows repeat an image that is there already")
    return kept


def one_spelling(name: str, subjects: Sequence[str], notes: list[str]) -> list[str]:
    """Subjects with one spelling each; `notes` name some that had two (`same_subjects`)."""
    spelt, merged = same_subjects(list(subjects))
    if merged:
        more = f", and {len(merged) - 1} more such" if len(merged) > 1 else ""
        notes.append(f"warning: {name}: subjects {merged[0]}{more} are taken for one")
    return spelt
