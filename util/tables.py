"""Reading CSV tables by column name, with errors that name file, line and column."""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from util.errors import UserError
from util.subjects import subject_key

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
HEADER_LIMIT = 1 << 16  # characters looked at for the separator
TRUTH = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_id(value: str, what: str) -> str:
    """`value` if it can be a file name and nothing more than that; else `UserError`."""
    if not _SAFE_ID.fullmatch(value) or ".." in value:
        raise UserError(f"{what} {value!r} is not a plain identifier (letters, digits, . _ -)")
    return value


def check_truth(value: str, what: str) -> bool:
    """True or False (True/False, 1/0, yes/no in any case); else `UserError`."""
    if value.lower() not in TRUTH:
        raise UserError(f"{what} {value!r} is neither true nor false")
    return TRUTH[value.lower()]


def check_whole(value: str, what: str, allowed: range) -> int:
    """`value` as one of the whole numbers `allowed`; else `UserError`."""
    text = value.removesuffix(".0")
    if not text.isdecimal() or int(text) not in allowed:
        raise UserError(f"{what} {value!r} is none of {allowed[0]}, ..., {allowed[-1]}")
    return int(text)


def read_table(path: Path, required: Collection[str]) -> pd.DataFrame:
    """A CSV file by column name, extra columns tolerated, blanks around names and cells taken off. The
    rows' index is their line in the file (of a record over several lines, its first).

    Every cell is text, exactly as it is written ("007", "NA", ""); see `to_numbers` and `numeric_columns`.

    Read are UTF-8, with or without a byte order mark, plain or gzipped whatever the name; commas, semicolons or tabs,
    whichever gives the `required` columns; empty lines; and empty cells after the last column.

    Raises `UserError` naming the file and what is wrong: a column that is missing or appears twice, a row of
    another number of cells (line), an unfinished quote, other encodings.
    """
    content = read_text(path)
    head = content.lstrip("\r\n")[:HEADER_LIMIT].splitlines()[:1]

    def fit(separator: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader(head, delimiter=separator), [])]
        return {*required} <= {*names}, len(names)

    separator = max(SEPARATORS, key=fit)
    names, lines, rows, line = [], [], [], 1
    # pandas fills a row that is cut off in silence.
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    try:
        for record in reader:
            cells = [cell.strip() for cell in record]
            while len(cells) > len(names) and not cells[-1]:
                cells.pop()
            if not names:
                names = cells
            elif any(cells):
                if len(cells) != len(names):
                    raise UserError(
                        f"{path}: line {line} has {len(cells)} cells, the header {len(names)} columns; "
                        "is the file cut off, or a cell with a separator in it not quoted?"
                    )
                lines.append(line)
                rows.append(cells)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV (line {line}: {error})") from None
    if not names:
        raise UserError(f"{path}: cannot be read as CSV (the file is empty)")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"{path}: column {twice[0]!r} appears twice in the header")
    if missing := [column for column in required if column not in names]:
        raise UserError(
            f"{path}: column {', '.join(map(repr, missing))} is missing; the header, taken as separated by "
            f"{SEPARATORS[separator]}, is {separator.join(names)[:120]!r}"
        )
    table = pd.DataFrame(rows, columns=names, index=pd.Index(lines, dtype=np.int64), dtype=str)
    return table.drop(columns="", errors="ignore")


def read_text(path: Path) -> str:
    """The text of a file, UTF-8, that may be gzipped. Raises `UserError` for anything else."""
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: cannot be read as CSV (line {line} is not UTF-8 text)") from None
    if "\0" in content:
        raise UserError(f"{path}: cannot be read as CSV (it holds zero bytes; save it as UTF-8 text)")
    return content


def to_numbers(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The columns of a `read_table` as numbers; NaN where a cell is none."""
    return table[[*columns]].apply(pd.to_numeric, errors="coerce")


def numeric_columns(
    table: pd.DataFrame, columns: Sequence[str], path: Path, *, infinite: Collection[str] = ()
) -> pd.DataFrame:
    """The columns of a `read_table` as float64, finite but for the columns `infinite`; `UserError` names file, line and
    column of the first cell that is no such number."""
    numbers = to_numbers(table, columns).astype(np.float64)
    for row, place in np.argwhere(~np.isfinite(numbers)):
        line, column = table.index[row], columns[place]
        if column not in infinite or np.isnan(numbers[column][line]):
            raise UserError(f"{path}: line {line}, column {column!r}: {table[column][line]!r} is not a finite number")
    return numbers


def same_subjects(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names with one spelling for each subject, its first, and those that had another, as "'p3' and 'P3'"."""
    first: dict[str, str] = {}
    spelt = {name: first.setdefault(subject_key(name), name) for name in dict.fromkeys(names)}
    merged = [f"{kept!r} and {name!r}" for name, kept in spelt.items() if kept.strip() != name.strip()]
    return [spelt[name] for name in names], merged
