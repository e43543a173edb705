"""From the cells of a table to rows and labels, the same way for every data set."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import IGNORE, ONES, PUBLISHED, ZEROS
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID
from util.errors import UserError
from util.tables import read_table

VALUE_OF = {ZEROS: 0.0, ONES: 1.0, IGNORE: np.nan}
NO_SUBJECT = ("", "nan", "none", "null", "n/a", "<na>")
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
# What the published CheXpert run takes -1 for; 0 for labels that are not here.
PUBLISHED_UNCERTAIN = {"Atelectasis": 1.0, "Edema": 1.0, "Pleural Effusion": 1.0}
PART_NAMES = {"train": TRAIN, **dict.fromkeys(("val", "valid", "validate", "validation"), VALID), "test": TEST}


@dataclass(frozen=True)
class Source:
    """A table, the folder of its data set, the options, and lines to print, to which the methods add."""

    path: Path
    folder: Folder
    args: argparse.Namespace
    notes: list[str]

    def other(self, pattern: str, *, needed: bool = False) -> Source | None:
        """Another table of the data set."""
        path = self.folder.table(pattern, needed=needed)
        return replace(self, path=path) if path else None

    def read(
        self, columns: Sequence[str], *, ids: Sequence[str], subject: str | None = None, views: Sequence[str] = ()
    ) -> pd.DataFrame:
        """The rows that --where keeps, as text, by their line in the file; with `views`, a column and some of its values,
        only those of these.

        Raises:
            UserError: a column is missing, no row is left, or one names nothing in `ids` or nobody in `subject`, where
                "nan" and what else programs write for nobody would all be one person.
        """
        named = [*ids, subject] if subject else ids
        table = self.where(read_table(self.path, [*named, *columns, *views[:1]]))
        if table.empty:
            raise UserError(f"{self.path}: no rows")
        for column in named:
            none = table[column].str.lower().isin(NO_SUBJECT if column == subject else [""])
            self.refuse(table[column], none, "names nothing; give every row one")
        return self.keep(table, views[0], views[1:], "of other views") if views else table

    def where(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows that --where keeps."""
        allowed: dict[str, list[str]] = {}
        for condition in self.args.where:
            column, _, value = map(str.strip, condition.partition("="))
            allowed.setdefault(column, []).append(value)
        for column, values in allowed.items():
            if column not in table:
                raise UserError(f"--where {column}: {self.path} has {', '.join(table)}")
            table = self.keep(table, column, values)
        return table

    def images(
        self, image: str, columns: Sequence[str], subject: str | None = None, views: Sequence[str] = ()
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """`read`, one row per image: its id and subject, and the table's own columns."""
        table = self.read(columns, ids=[image], subject=subject, views=views)
        named = {"id": image} | ({"subject": subject} if subject else {})
        table = self.once(table, image, [*columns, *named.values()])
        return table[[*named.values()]].set_axis([*named], axis=1), table

    def keep(self, table: pd.DataFrame, column: str, values: Collection[str], others: str = "") -> pd.DataFrame:
        """The rows that have one of the values in a column; `notes` count the `others`. `UserError` if none has."""
        kept = table[table[column].isin(values)]
        if kept.empty:
            found = ", ".join(map(repr, sorted(set(table[column]))[:5]))
            raise UserError(f"{self.path}: no row has {column} {' or '.join([*values][:5])}, but {found}")
        if others and len(kept) < len(table):
            self.notes.append(f"{self.path.name}: {len(table) - len(kept)} images {others} are left out")
        return kept

    def refuse(self, cells: pd.Series, bad: pd.Series, what: str) -> None:
        """`UserError` by line and column for the first of the cells that are bad, if any."""
        if bad.any():
            line, cell = cells.index[bad][0], cells[bad].iloc[0]
            raise UserError(f"{self.path}: line {line}, column {cells.name!r}: {cell[:60]!r} {what}")

    def once(self, table: pd.DataFrame, column: str, others: Sequence[str]) -> pd.DataFrame:
        """One row per id; `UserError` for an id whose rows say different things in `others`."""
        kept = table.drop_duplicates([column, *others])
        self.refuse(
            kept[column], kept[column].duplicated(), "is in a line above too, with other values; keep one of them"
        )
        if len(kept) < len(table):
            self.notes.append(f"{self.path.name}: {len(table) - len(kept)} rows repeat an image that is there already")
        return kept

    def labels(
        self, table: pd.DataFrame, columns: Sequence[str], uncertain: str | None = None, empty: str | None = None
    ) -> pd.DataFrame:
        """Labels of a table with one column each: float32 1, 0 and NaN.

        Cells are 1 or 0, or true, false, yes, no; -1 (uncertain) or empty if a rule says what these count as, of
        --uncertain and --empty or else the default, which `notes` then repeat with their number.

        Raises:
            UserError: file, line and column of the first cell that is none of these.
        """
        cells, uncertain, empty = table[list(columns)], self.args.uncertain or uncertain, self.args.empty or empty
        values = cells.apply(lambda column: pd.to_numeric(column.str.lower().replace(WORDS), errors="coerce"))
        known, expected = values.isin([0, 1]), "1, 0"
        for rule, what, found in ((uncertain, "uncertain (-1)", values == -1), (empty, "empty", cells == "")):
            if rule:
                value = {
                    name: PUBLISHED_UNCERTAIN.get(name, 0.0) if rule == PUBLISHED else VALUE_OF[rule]
                    for name in columns
                }
                values = values.mask(found, pd.Series(value), axis=1)
                known, expected = known | found, f"{expected}, {what}"
                if count := found.sum(axis=None):
                    self.notes.append(f"{self.path.name}: {count} cells are {what}; rule: {rule}")
        for name in columns:
            self.refuse(cells[name], ~known[name], f"is no label; expected {expected}")
        return values.astype(np.float32)


def one_hot(words: pd.Series, index: pd.Index) -> pd.DataFrame:
    """float32 1 where a row has a word, else 0; a row may have several words in `words`, or none. The words are sorted."""
    return pd.get_dummies(words).groupby(level=0).max().reindex(index, fill_value=False).astype(np.float32)
