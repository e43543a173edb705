"""From the rows of a table to labels and images, the same way for every data set."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.files_by_id import identity
from downstream.data.choices import IGNORE, ONES, PUBLISHED, ZEROS, Choices
from downstream.data.folder import Folder, missing_message
from downstream.data.labelled import MULTICLASS, MULTILABEL, PARTS, LabelledImages
from util.errors import UserError
from util.subjects import same_subjects
from util.tables import read_table

VALUE_OF = {ZEROS: 0.0, ONES: 1.0, IGNORE: np.nan}
NO_VALUE = ("", "nan", "none", "null", "n/a", "<na>")
WORDS = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
# What the published CheXpert run takes -1 for; 0 for labels that are not here.
PUBLISHED_UNCERTAIN = {"Atelectasis": 1.0, "Edema": 1.0, "Pleural Effusion": 1.0}


def read_rows(path: Path, columns: Sequence[str], choices: Choices) -> pd.DataFrame:
    """The rows of a table that --where keeps, as text, by their line in the file."""
    columns = list(dict.fromkeys([*columns, *conditions(choices)]))
    table = read_table(path, columns, text=columns)
    if table.empty:
        raise UserError(f"{path}: no rows")
    return keep_where(table, path, choices)


def conditions(choices: Choices) -> dict[str, list[str]]:
    """--where as the allowed values of each column."""
    found: dict[str, list[str]] = {}
    for condition in choices.where:
        column, equals, value = condition.partition("=")
        if not equals:
            raise UserError(f"--where {condition!r}: expected COLUMN=VALUE")
        found.setdefault(column.strip(), []).append(value.strip())
    return found


def keep_where(table: pd.DataFrame, path: Path, choices: Choices) -> pd.DataFrame:
    """The rows that --where keeps; `UserError` where none is left, or a column lacks."""
    for column, values in conditions(choices).items():
        if column not in table:
            raise UserError(f"--where {column}: {path} has {', '.join(map(str, table.columns))}")
        kept = table[table[column].map(lambda cell, values=values: any(_same(cell, v) for v in values))]
        if kept.empty:
            found = ", ".join(map(repr, sorted(set(table[column]))[:5]))
            raise UserError(f"{path}: --where keeps no row; column {column!r} has {found}")
        table = kept
    return table


def check_ids(table: pd.DataFrame, column: str, path: Path, *, subjects: bool = False) -> None:
    """`UserError` naming the first line without a value in an id's column; of `subjects`, also what programs write
    where there is none, or all these rows would be one person."""
    none = table[column].str.lower().isin(NO_VALUE if subjects else ("",))
    if none.any():
        line, cell = table.index[none][0], table[column][none].iloc[0]
        problem = f"{cell!r} names nobody" if cell else "the cell is empty"
        raise UserError(f"{path}: line {line}, column {column!r}: {problem}; give every row one")


def label_values(
    table: pd.DataFrame,
    columns: Sequence[str],
    path: Path,
    notes: list[str],
    *,
    uncertain: str | None = None,
    empty: str | None = None,
) -> np.ndarray:
    """Labels of a table with one column each: float32 [N, C] of 1, 0 and NaN.

    Cells are 1 or 0, or true, false, yes, no; -1 (uncertain) or empty where a rule says what these count as,
    which `notes` then repeat with their number.

    Raises:
        UserError: file, line and column of the first cell that is none of these.
    """
    labels = np.empty((len(table), len(columns)), np.float32)
    allowed = (0, 1) if uncertain is None else (0, 1, -1)
    counts = np.zeros(2, int)
    for i, column in enumerate(columns):
        cells = table[column].str.lower().replace(WORDS)
        values = pd.to_numeric(cells, errors="coerce").to_numpy(np.float64, copy=True)
        blank = (table[column] == "").to_numpy()
        bad = np.flatnonzero(~np.isin(values, allowed) & ~(blank & (empty is not None)))
        if len(bad):
            cell = table[column].iloc[bad[0]]
            more = (uncertain and ", -1 (uncertain)", empty and ", an empty cell")
            raise UserError(
                f"{path}: line {table.index[bad[0]]}, column {column!r}: {cell!r} is no label; expected 1, 0"
                f"{''.join(part for part in more if part)}"
            )
        minus = values == -1
        counts += minus.sum(), blank.sum()
        if uncertain is not None:
            values[minus] = PUBLISHED_UNCERTAIN.get(column, 0.0) if uncertain == PUBLISHED else VALUE_OF[uncertain]
        if empty is not None:
            values[blank] = VALUE_OF[empty]
        labels[:, i] = values
    for count, what, rule in zip(counts, ("uncertain (-1)", "empty"), (uncertain, empty), strict=True):
        if count:
            notes.append(f"{path.name}: {count} cells are {what}; rule: {rule}")
    return labels


def one_hot(rows: Sequence[set[str]], names: Sequence[str]) -> np.ndarray:
    """float32 [N, C]: 1 where a row has the name."""
    return np.array([[name in row for name in names] for row in rows], np.float32).reshape(-1, len(names))


def join_same(table: pd.DataFrame, column: str, others: Sequence[str], path: Path, notes: list[str]) -> pd.DataFrame:
    """One row per id where an id's rows say the same in `others`; `UserError` with the lines where not."""
    repeated = table[table[column].duplicated(keep=False)]
    if repeated.empty:
        return table
    different = repeated.groupby(column, sort=False)[list(others)].nunique()
    worst = different.index[(different > 1).any(axis=1)]
    if len(worst):
        lines = table.index[table[column] == worst[0]][:4].tolist()
        name = next(other for other in others if different.loc[worst[0], other] > 1)
        raise UserError(
            f"{path}: {worst[0]!r} stands in lines {', '.join(map(str, lines))} with different values of "
            f"{name!r}, and {len(worst) - 1} more ids do; keep one row per image"
        )
    kept = table.drop_duplicates(column)
    notes.append(f"{path.name}: {len(table) - len(kept)} rows repeat an image that is there already")
    return kept


def labelled_images(
    name: str,
    folder: Folder,
    choices: Choices,
    *,
    ids: Sequence[str],
    subjects: Sequence[str] | np.ndarray,
    parts: np.ndarray,
    labels: Mapping[str, np.ndarray] | tuple[Sequence[str], np.ndarray],
    notes: list[str],
    names: Sequence[str] | None = None,
    task: str = MULTILABEL,
    strong_augmentation: bool = False,
    shared_subjects: bool = False,
    order: np.ndarray | None = None,
) -> LabelledImages:
    """The data set in the order train, valid, test (each as the split left it), its files found.

    Args:
        names: what the images' files are called (default: the ids).
        labels: (C names, float32 [N, C]).
        order: of the rows, as a published split leaves them (default: as they stand).

    Raises:
        UserError: images that are not there (without --skip_missing), or a label that --labels names.
    """
    label_names, values = labels
    label_names = list(label_names)
    if choices.labels is not None:
        unknown = [label for label in choices.labels if label not in label_names]
        if unknown or task == MULTICLASS:
            raise UserError(f"{name}: --labels {(unknown or choices.labels)[0]}: has {', '.join(label_names)}")
        values = values[:, [label_names.index(label) for label in choices.labels]]
        label_names = list(choices.labels)
    place = folder if choices.images is None else Folder(choices.images, "--images")
    names = list(ids if names is None else names)
    if choices.need_images:
        files = place.images(names, notes)
    else:
        files = [place.root / file for file in names]
    missing = np.array([file is None for file in files])
    if missing.any():
        lacking = [names[i] for i in np.flatnonzero(missing)]
        if not choices.skip_missing or missing.all():
            raise UserError(missing_message(place, lacking, len(names)))
        by_part = {part or "no part": int((missing & (parts == part)).sum()) for part in (*PARTS, "")}
        counts = ", ".join(f"{count} of {part}" for part, count in by_part.items() if count)
        notes.append(f"{name}: {len(lacking)} of {len(names)} images are not there and left out ({counts})")
    check_files(name, ids, files)
    rows = np.arange(len(names)) if order is None else order
    rank = np.array([{part: i for i, part in enumerate(PARTS)}.get(part, 0) for part in parts])
    rows = rows[np.argsort(rank[rows], kind="stable")]
    rows = rows[~missing[rows]]
    return LabelledImages(
        name,
        [ids[i] for i in rows],
        [files[i] for i in rows],
        np.asarray(subjects, str)[rows],
        np.asarray(parts)[rows],
        label_names,
        values[rows].astype(np.float32),
        task,
        strong_augmentation,
        notes,
        shared_subjects,
    )


def one_spelling(name: str, subjects: Sequence[str], notes: list[str]) -> np.ndarray:
    """Subjects with one spelling each, str [N]; `notes` tell of those that had two (`same_subjects`)."""
    spelt, merged = same_subjects(subjects)
    if merged:
        more = f", and {len(merged) - 1} more such" if len(merged) > 1 else ""
        notes.append(f"warning: {name}: subjects {merged[0]}{more} are taken for one")
    return np.asarray(spelt, str)


def own_subjects_note(name: str, subjects: Sequence[str], reason: str) -> list[str]:
    """A warning where every image is its own subject."""
    if len(set(subjects)) < len(subjects):
        return []
    return [
        f"warning: {name}: every image counts as its own subject ({reason}); a patient's images may stand on "
        "both sides of the split"
    ]


def check_files(name: str, ids: Sequence[str], files: Sequence[Path | None]) -> None:
    """`UserError` where two ids are the same file, by a link too: it could train under one and test under the other."""
    owners: dict[object, str] = {}
    for image, file in zip(ids, files, strict=True):
        other = image if file is None else owners.setdefault(identity(file) or os.path.abspath(file), image)
        if other != image:
            raise UserError(f"{name}: images {other!r} and {image!r} are the same file, {file}; keep one of them")


def _same(cell: str, value: str) -> bool:
    if cell == value:
        return True
    try:
        return float(cell) == float(value)
    except ValueError:
        return False
