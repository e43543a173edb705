"""What a gaze data set has to give, whatever its files look like.

One data set = one short module with one function that returns `RawReadings` (see raw_reflacx.py and raw_egd.py),
entered in `datasets.prepare.readings.SOURCES`. Everything after that (joining with the images, heatmaps, writing the
processed tree, the gaze analysis) is the same for all of them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from datasets.fixations import FIXATION_COLUMNS, RECTANGLE
from util.errors import UserError
from util.tables import bad_cells, parse_bool

Parsed = TypeVar("Parsed")
# In the root of a raw data set whose gaze is made up; see `is_simulated`.
SIMULATED_FILE = "SIMULATED_GAZE.txt"
ELLIPSE_COLUMNS = (*RECTANGLE, "certainty")
MAX_BAD = 0.1  # of a reading's fixations; more of them bad, and the reading is unusable


@dataclass(frozen=True)
class Fixations:
    """The usable fixations of one reading.

    `table`: one row each, the columns of `datasets.fixations.FIXATION_COLUMNS` (float64), finite but for the
    rectangle, sigmas and durations positive; its index is their lines in the file. `left_out`: how
    many rows are not in it, by reason. `bad`: of these the damaged ones, as texts that name line and
    column; the others were left out by a rule.
    """

    table: pd.DataFrame
    left_out: Mapping[str, int] = field(default_factory=dict)
    bad: tuple[str, ...] = ()


def usable_fixations(
    table: pd.DataFrame,
    numbers: Mapping[str, np.ndarray],
    fixations: Mapping[str, np.ndarray | float],
    path: Path,
    rules: Mapping[str, np.ndarray],
) -> Fixations:
    """The rows that can be used, from a `read_table`, its columns as `numbers`, and the `FIXATION_COLUMNS` made of them.

    Left out as bad: a cell that is no finite number, a sigma that is not positive, a negative duration, a row that is
    there before, which would count twice; by rule: a duration of 0, and what `rules` name, True for each row that goes.

    Raises `UserError` naming `path` if more than the share `MAX_BAD` of all rows is bad.
    """
    columns = pd.DataFrame(dict(fixations), index=table.index)[list(FIXATION_COLUMNS)]
    damaged = bad_cells(table, numbers)
    values = {name: columns[name].to_numpy() for name in FIXATION_COLUMNS}
    finite = np.logical_and.reduce([np.isfinite(values[name]) for name in FIXATION_COLUMNS if name not in RECTANGLE])
    why_bad = {
        "not a finite number": ~finite | table.index.isin(list(damaged)),
        "angular resolution not positive": (values["sigma_x"] <= 0) | (values["sigma_y"] <= 0),
        "negative duration": values["duration"] < 0,
        "the same row again": table.duplicated().to_numpy(),
    }
    reason = np.full(len(table), "", dtype=object)  # arrays: with pandas' own it took much of the time of preparation
    reasons = {**why_bad, **rules, "duration of 0": values["duration"] == 0}
    for name, rows in reasons.items():
        reason[(reason == "") & np.asarray(rows)] = name
    bad = [f"line {line}, {damaged.get(line, name)}" for line, name in zip(table.index, reason) if name in why_bad]
    if len(bad) > MAX_BAD * len(table):
        raise UserError(f"{path}: {bad[0]}; {len(bad)} of {len(table)} fixations are bad, more than {MAX_BAD:.0%}")
    left_out = {name: n for name in reasons if (n := int((reason == name).sum()))}
    return Fixations(columns[reason == ""], left_out, tuple(bad))


@dataclass(frozen=True, kw_only=True)
class Reading(ABC):
    """One reader looking at one image once.

    `image_id` is the image's dicom_id, `image_path` where the data set says the image lies (a hint,
    relative, may be empty), `image_size` (height, width) in pixels of the original image, or None where the data set
    does not say. `labels` are the data set's own columns with their own values (certainty 0-5, bool or
    text); `datasets.raw.findings.unify` maps them to common findings. `split` is train, validate, test
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
    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        """The usable fixations, see `usable_fixations`; with `screen_filter` without those that look at
        the screen beside the image.

        Raises `UserError` naming file, line and column.
        """

    def original_size(self, file_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the image that positions count in, in whose scaled copy of `file_size` they are looked at:
        the recorded size, or the file's. UserError where the sides have another ratio (by more than a pixel each)."""
        if self.image_size is None:
            return file_size
        (height, width), (rows, columns) = file_size, self.image_size
        if abs(width * rows - height * columns) > columns + rows:
            raise UserError(f"is {width} x {height} px, the readings were made on {columns} x {rows}")
        return self.image_size

    def fixations_origin(self) -> str:
        """Digest of what `load_fixations` reads; by default the content of `fixations_path`."""
        try:
            return digest_of(self.fixations_path.read_bytes())
        except OSError as error:
            return f"errno {error.errno}"

    def origin(self) -> list:
        """All that its map and its entry are made from, JSON; not where the files are."""
        names = ("id", "study_id", "subject_id", "image_id", "image_size", "labels", "split", "phase", "source")
        return [*(getattr(self, name) for name in names), self.fixations_origin()]

    def load_ellipses(self) -> pd.DataFrame:
        """One row per marked abnormality: the box xmin, ymin, xmax, ymax (pixels of the original
        image) around an axis-aligned ellipse, certainty 1-5, and one bool column per label of the
        data set. No rows where the data set has none."""
        return pd.DataFrame(columns=list(ELLIPSE_COLUMNS), dtype=float)

    def load_chest_box(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) around the lungs and heart, pixels; None if the data set has none."""
        return None


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=10).hexdigest()


def only_root(raw: Path, holds: Callable[[Path], bool]) -> Path | None:
    """`raw` if it holds a data set, else the one directory below that does; None if none does. UserError if there
    are several, as versions beside each other, which no rule can choose from."""
    try:
        places = [raw] if holds(raw) else sorted(filter(holds, raw.iterdir())) if raw.is_dir() else []
    except OSError as error:
        raise UserError(f"{error.filename or raw}: can't be read ({error.strerror})") from None
    if len(places) > 1:
        raise UserError(
            f"{raw}: the data set is in {len(places)} of its directories, {places[0].name} and {places[1].name} among "
            "them; give one of them as --raw"
        )
    return places[0] if places else None


def is_simulated(root: Path) -> bool:
    """Whether the raw data set at `root` says that its gaze is made up, as scripts/make_phantom.py marks it.

    Preparation carries the mark into the entries of the index as `"simulated": true`, and every picture
    prints it.
    """
    return (root / SIMULATED_FILE).is_file()


@dataclass(frozen=True)
class Exclusion:
    """A reading or image that is left out. `reason` is a short fixed phrase to count by, `detail` names the
    file, row and column; `is_fault` marks damaged input, not what is left out by a rule."""

    id: str
    reason: str
    detail: str = ""
    is_fault: bool = False

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}{self.detail and f': {self.detail}'}"


def first_of(exclusions: Sequence[Exclusion]) -> str:
    """What a message that nothing is left adds."""
    return "".join(f"; {exclusion}" for exclusion in exclusions[:3])


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

    def none_of(self, split: str) -> str:
        """What to say where no reading of a split is left."""
        text = f"no usable reading of split {split!r} ({self.n_found} in all)"
        return "; ".join([text + first_of(self.exclusions), *self.notes])


@dataclass(frozen=True)
class Cells:
    """One row of a table, by column."""

    path: Path
    line: int
    row: Mapping[str, Any]

    def __getitem__(self, column: str) -> Any:
        return self.row[column]

    def where(self, column: str) -> str:
        """What a message calls a cell."""
        return f"{self.path}: line {self.line}, column {column!r}:"

    def truth(self, column: str) -> bool:
        return parse_bool(self.row[column], self.path, self.line, column)

    def number(self, column: str, allowed: range) -> int:
        text = str(self.row[column]).removesuffix(".0")
        if not text.isdecimal() or int(text) not in allowed:
            raise UserError(f"{self.where(column)} {text!r} is none of {allowed[0]}, ..., {allowed[-1]}")
        return int(text)


def parse_rows(
    table: pd.DataFrame, path: Path, id_column: str, parse: Callable[[Cells], Parsed], result: RawReadings
) -> dict[str, Parsed]:
    """What `parse` makes of each row, by its id; rows that it refuses, and ids given twice, are exclusions of `result`."""
    parsed: dict[str, Parsed] = {}
    for line, row in zip(table.index, table.to_dict("records")):
        cells, name = Cells(path, line, row), row[id_column]
        try:
            if name in parsed:
                raise UserError(f"{cells.where(id_column)} {name} appears a second time")
            parsed[name] = parse(cells)
        except UserError as error:
            result.exclusions.append(Exclusion(name, "unusable row", str(error), is_fault=True))
    return parsed
