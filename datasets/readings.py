"""What a gaze data set has to give, whatever its files look like.

One data set = one short module with one function that returns `RawReadings` (see reflacx_raw.py and
egd_raw.py), entered in `datasets.prepare.SOURCES`. Everything after that (joining with the images,
heatmaps, writing the processed tree, the gaze analysis) is the same for all of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from util.errors import UserError

ELLIPSE_COLUMNS = ("xmin", "ymin", "xmax", "ymax", "certainty")
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Reading(ABC):
    """One reader looking at one image once.

    `image_id` is the image's dicom_id, `image_path` where the data set says the image lies (a hint,
    relative, may be empty), `image_size` (width, height) in pixels or None where the data set does
    not say. `labels` are the data set's own columns with their own values (certainty 0-5, bool or
    text); `datasets.findings.unify` maps them to common findings. `split` is train, validate, test
    or None. `fixations_path` is the file that messages name. The heavy tables are read by the load_
    methods, when they are wanted.
    """

    id: str
    study_id: str
    subject_id: str
    image_id: str
    image_path: str = ""
    image_size: tuple[int, int] | None
    labels: Mapping[str, int | bool | str]
    split: str | None
    phase: int | None
    source: str
    fixations_path: Path

    @abstractmethod
    def load_fixations(self) -> pd.DataFrame:
        """One row per fixation with the columns of `util.gaze.FIXATION_COLUMNS` (float64).

        Raises `UserError` naming file, row and column.
        """

    def load_ellipses(self) -> pd.DataFrame:
        """One row per marked abnormality: the box xmin, ymin, xmax, ymax (pixels of the original
        image) around an axis-aligned ellipse, certainty 1-5, and one bool column per label of the
        data set. No rows where the data set has none."""
        return pd.DataFrame(columns=list(ELLIPSE_COLUMNS), dtype=float)

    def load_chest_box(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) around the lungs and heart, pixels; None where there is none."""
        return None


@dataclass(frozen=True)
class Exclusion:
    """A reading that is left out. `reason` is a short fixed phrase to count by, `detail` names the
    file, row and column; `is_fault` tells damaged input from what is left out by the rules."""

    id: str
    reason: str
    detail: str = ""
    is_fault: bool = False


@dataclass
class RawReadings:
    """The readings of a raw data set, in the order of their ids, and those already left out."""

    source: str
    readings: list[Reading]
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def n_found(self) -> int:
        return len(self.readings) + len(self.exclusions)


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
