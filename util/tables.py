"""Reading CSV tables by column name, with errors that name file, line and column."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from util.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
HEADER_LIMIT = 1 << 16  # characters looked at for the separator
EMPTY = ("", "NA", "N/A", "NaN", "nan", "null", "None")  # cells without a value, in columns that aren't text
TRUTH = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
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


def table_file(path: Path) -> Path:
    """Where a table is that may be gzipped: with .gz behind its name if it is there so, and not as it is named."""
    zipped = path.with_name(f"{path.name}.gz")
    return zipped if zipped.exists() and not path.exists() else path


def read_table(path: Path, required: Sequence[str], *, text: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file by column name, extra columns tolerated, blanks around names and cells taken off. The
    rows' index is their line in the file (of a record over several lines, its first).

    The columns `text` stay str, exactly as they are written ("007", "NA", ""). Others become numbers, or
    bool, where every cell that isn't empty (or NA, NaN, null, None) is one, and else stay str.

    Read are UTF-8, with or without a byte order mark, plain or gzipped whatever the name; commas,
    semicolons or tabs, where only one of them gives the `required` columns; empty lines; and empty cells
    after the last column.

    Raises `UserError` naming the file and what is wrong: a column that lacks or is there twice, a row of
    another number of cells (line), an unfinished quote, an end within the header, other encodings.
    """
    names, records = _open_table(path, required)
    lines, rows = [], []
    for line, cells in records:
        if len(cells) != len(names):
            if len(cells) < len(names) or any(cells[len(names) :]):
                raise UserError(
                    f"{path}: line {line} has {len(cells)} cells, the header {len(names)} columns; "
                    "is the file cut off, or a cell with a separator in it not quoted?"
                )
            del cells[len(names) :]
        if any(cells):
            lines.append(line)
            rows.append(cells)
    columns = zip(*rows) if rows else [()] * len(names)
    table = {name: list(cells) if name in text else _typed(cells) for name, cells in zip(names, columns) if name}
    return pd.DataFrame(table, index=pd.Index(lines, dtype=np.int64)).astype(dict.fromkeys(text, str))


def read_header(path: Path, required: Sequence[str]) -> list[str]:
    """The names of a table's columns. Raises `UserError` as `read_table`, of the header alone."""
    return _open_table(path, required)[0]


def _open_table(path: Path, required: Sequence[str]) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header's names and the records after it."""
    content = read_text(path)
    separator = _separator(path, content, required)
    records = _records(path, content, separator)
    _, names = next(records, (0, []))
    if not names:
        raise UserError(f"{path}: cannot be read as CSV (the file is empty)")
    while len(names) > 1 and not names[-1]:  # a comma at the end of the header
        names.pop()
    twice = [name for name, n in Counter(filter(None, names)).items() if n > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} appears twice in the header")
    lacking = [column for column in required if column not in names]
    if lacking:
        found = separator.join(names)
        found = found if len(found) <= 120 else f"{found[:120]}..."
        raise UserError(
            f"{path}: column {', '.join(map(repr, lacking))} is missing; the header, taken as separated by "
            f"{SEPARATORS[separator]}, is {found!r}"
        )
    if "\n" not in content and "\r" not in content:
        raise UserError(f"{path}: ends within its header; is the file cut off?")
    return names, records


def read_text(path: Path) -> str:
    """The text of a file, UTF-8, that may be gzipped. Raises `UserError` for anything else."""
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason})") from None
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: cannot be read as CSV (line {line} is not UTF-8 text)") from None
    if "\0" in content:
        raise UserError(f"{path}: cannot be read as CSV (it holds zero bytes; save it as UTF-8 text)")
    return content


def _records(path: Path, content: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, cells without the blanks around them) of every record that is no empty line."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, list(map(str.strip, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV (line {line}: {error})") from None


def _separator(path: Path, content: str, required: Sequence[str]) -> str:
    """What separates the cells: what the header has of commas, semicolons and tabs; of several, the one
    that gives the required columns."""
    headers = {}
    for separator in SEPARATORS:
        with contextlib.suppress(UserError):  # a quoted header makes sense with its own separator only
            _, names = next(_records(path, content[:HEADER_LIMIT], separator), (0, []))
            if len(names) > 1:
                headers[separator] = names
    fitting = [separator for separator, names in headers.items() if set(required) <= set(names)]
    candidates = fitting or list(headers)
    if not candidates:
        return ","
    if len(candidates) > 1:
        raise UserError(
            f"{path}: the header could be separated by {' or '.join(SEPARATORS[c] for c in candidates)}; "
            "save the table with commas alone"
        )
    return candidates[0]


def _typed(cells: Sequence[str]) -> np.ndarray:
    """The cells of a column as numbers or bool, if they all are; an empty one is NaN."""
    series = pd.Series([np.nan if cell in EMPTY else cell for cell in cells], dtype=object)
    try:
        return pd.to_numeric(series).to_numpy()
    except ValueError:
        truths = series.map(TRUTH, na_action="ignore")
        known = truths.notna().sum() == series.notna().sum()
        return (truths.infer_objects() if known else series).to_numpy()


def to_numbers(table: pd.DataFrame, columns: Sequence[str]) -> dict[str, np.ndarray]:
    """The columns as float64 arrays; NaN where a cell is no number."""
    return {column: pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=np.float64) for column in columns}


def bad_cells(table: pd.DataFrame, numbers: Mapping[str, np.ndarray], infinite: Collection[str] = ()) -> dict[int, str]:
    """Of each line of a `read_table` with a cell that is no finite number, its first such column and the
    cell, as text; `numbers` are the columns to look at, of which `infinite` may be infinite."""
    bad: dict[int, str] = {}
    for column, values in numbers.items():
        wrong = np.isnan(values) if column in infinite else ~np.isfinite(values)
        for line, cell in table[column][wrong].items():
            kind = "number" if column in infinite else "finite number"
            bad.setdefault(line, f"column {column!r}: {str(cell)!r} is not a {kind}")
    return dict(sorted(bad.items()))


def numeric_columns(
    table: pd.DataFrame, columns: Sequence[str], path: Path, *, infinite: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The columns of a `read_table` as float64 arrays, finite but for the columns `infinite`; `UserError`
    names file, line and column of the first cell that is no such number."""
    arrays = to_numbers(table, columns)
    for line, text in bad_cells(table, arrays, infinite).items():
        raise UserError(f"{path}: line {line}, {text}")
    return arrays


def parse_bool(cell: object, path: Path, line: int, column: str) -> bool:
    """True or False from a CSV cell (True/False, 1/0, yes/no in any case)."""
    text = str(cell).strip().lower()
    if text in ("true", "1", "1.0", "yes"):
        return True
    if text in ("false", "0", "0.0", "no"):
        return False
    raise UserError(f"{path}: line {line}, column {column!r}: {str(cell)!r} is neither true nor false")
