"""Reading CSV tables by column name, with errors that name file, line and column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from util.errors import UserError

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_id(value: str, what: str) -> str:
    """`value` if it can be a file name and nothing more than that; else `UserError`."""
    if not _SAFE_ID.fullmatch(value) or ".." in value:
        raise UserError(f"{what} {value!r} is not a plain identifier (letters, digits, . _ -)")
    return value


def check_relative_path(value: str, what: str) -> str:
    """`value` if it stays below the directory it is joined to; else `UserError`."""
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value:
        raise UserError(f"{what} {value!r} leaves its directory")
    return value


def read_table(path: Path, required: Sequence[str], *, text: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file by column name, extra columns tolerated; the columns `text` stay str (an empty cell
    is ""), pandas finds the types of the others.

    Raises `UserError` naming the file, and the column if one lacks.
    """
    try:
        table = pd.read_csv(path, low_memory=False, dtype=dict.fromkeys(text, str))
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (ValueError, OSError) as error:  # pandas' parser and empty-file errors are ValueErrors
        raise UserError(f"{path}: cannot be read as CSV ({' '.join(str(error).split())})") from error
    lacking = [column for column in required if column not in table.columns]
    if lacking:
        raise UserError(f"{path}: column {', '.join(map(repr, lacking))} is missing")
    table[list(text)] = table[list(text)].fillna("")
    return table


def numeric_columns(
    table: pd.DataFrame, columns: Sequence[str], path: Path, lines: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """The columns as finite float64 arrays; `UserError` names file, line and column of the first
    cell that is no finite number. `lines` are the rows' lines in the file; by default the first row
    is line 2, after the header."""
    arrays = {}
    for column in columns:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            cell = table[column].iloc[bad[0]]
            line = bad[0] + 2 if lines is None else lines[bad[0]]
            raise UserError(f"{path}: line {line}, column {column!r}: {str(cell)!r} is not a finite number")
        arrays[column] = values
    return arrays


def parse_bool(cell: object, path: Path, line: int, column: str) -> bool:
    """True or False from a CSV cell (True/False, 1/0, yes/no in any case)."""
    text = str(cell).strip().lower()
    if text in ("true", "1", "1.0", "yes"):
        return True
    if text in ("false", "0", "0.0", "no"):
        return False
    raise UserError(f"{path}: line {line}, column {column!r}: {str(cell)!r} is neither true nor false")
