"""What a gaze data set has to give, whatever its files look like.

One data set = one short module with one function that returns `RawReadings` (see read_reflacx.py and read_egd.py),
entered in `datasets.raw.sources.SOURCES`. Everything after that (joining with the images, heatmaps, writing the
processed tree, the gaze analysis) is the same for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from datasets.fixations import FIXATION_COLUMNS, RECTANGLE
from datasets.raw.findings import LABELS
from util.errors import UserError
from util.tables import check_truth, check_whole, read_table

Check = Callable[[str, str], Any]  # of a cell and what a message calls it, as those of `util.tables`
Cell = Callable[..., Any]  # see `parse_rows`
# In the root of a raw data set whose gaze is made up, as scripts/make_phantom.py marks it. Preparation carries the mark
# into the entries of the index as `"simulated": true`, and every picture prints it.
SIMULATED_FILE = "SIMULATED_GAZE.txt"
CHECKS: Mapping[str, Check] = {
    "certainty": partial(check_whole, allowed=range(6)),
    "yes/no": check_truth,
    "text": lambda value, what: value,
}
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
    numbers: pd.DataFrame, fixations: pd.DataFrame, path: Path, rules: Mapping[str, pd.Series] = MappingProxyType({})
) -> Fixations:
    """The rows that can be used, from a file's columns as numbers (NaN where a cell is none), its lines for an index,
    and the `FIXATION_COLUMNS` made of them.

    Left out as bad: a cell that is no finite number, a sigma that is not positive, a negative duration, a row that is
    there before, which would count twice; by rule: a duration of 0, and what `rules` name, True for each row that goes.

    Raises `UserError` naming `path` if more than the share `MAX_BAD` of all rows is bad.
    """
    fixations = fixations[list(FIXATION_COLUMNS)]
    duration, *sigmas = (fixations[name].to_numpy() for name in ("duration", "sigma_x", "sigma_y"))
    finite = np.isfinite(numbers.to_numpy(np.float64))
    bad = {
        "not a finite number": ~finite.all(1),
        "angular resolution not positive": np.min(sigmas, 0) <= 0,
        "negative duration": duration < 0,
        "the same row again": numbers.duplicated().to_numpy(),
    }
    reasons = {**bad, **rules, "duration of 0": duration == 0}
    reason = np.select([*reasons.values()], [*reasons], "")  # the first that holds
    damage = [
        f"line {line}, {why if row.all() else f'column {numbers.columns[row.argmin()]!r} is not a finite number'}"
        for line, why, row in zip(numbers.index, reason, finite)
        if why in bad
    ]
    if len(damage) > MAX_BAD * len(numbers):
        raise UserError(
            f"{path}: {damage[0]}; {len(damage)} of {len(numbers)} fixations are bad, more than {MAX_BAD:.0%}"
        )
    left_out = {name: n for name in reasons if (n := int((reason == name).sum()))}
    return Fixations(fixations[reason == ""], left_out, tuple(damage))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One reader looking at one image once; a subclass for each data set has `load_fixations`.

    `image_id` is the image's dicom_id, `image_path` where the data set says the image lies (a hint,
    relative, may be empty), `image_size` (height, width) in pixels of the original image, which positions count in.
    `labels` are the data set's own columns with their own values (certainty 0-5, bool or
    text); `datasets.raw.findings.unify` maps them to common findings. `split` is train, validate, test
    or None. `fixations_path` is the file that messages name. The heavy tables are read by the load_
    methods, when they are wanted.
    """

    id: str
    study_id: str
    subject_id: str
    image_id: str
    image_path: str = ""
    image_size: tuple[int, int]
    labels: Mapping[str, int | bool | str]
    split: str | None = None
    phase: int | None = None
    source: str
    fixations_path: Path

    def load_fixations(self) -> Fixations:
        """The usable fixations, see `usable_fixations`. Raises `UserError` naming file, line and column."""
        raise NotImplementedError

    def check_copy(self, file_size: tuple[int, int]) -> None:
        """UserError unless a file of (height, width) `file_size` can be a scaled copy of the image: its sides have the
        same ratio, within a pixel each."""
        (height, width), (rows, columns) = file_size, self.image_size
        if abs(width * rows - height * columns) > columns + rows:
            raise UserError(f"is {width} x {height} px, the readings were made on {columns} x {rows}")

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
        image) around an axis-aligned ellipse, certainty 1-5, and its common findings (a list). No rows where
        the data set has none."""
        return pd.DataFrame(columns=[*RECTANGLE, "certainty", "findings"])

    def load_chest_box(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) around the lungs and heart, pixels; None if the data set has none."""
        return None


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=10).hexdigest()


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
    """The readings of a raw data set, in the order of their ids, and those already left out. `datasets.raw.sources.read_raw`
    sets the others: the data set's name, the options of its reader, and whether its gaze is made up."""

    readings: list[Reading]
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    simulated: bool = False

    @property
    def n_found(self) -> int:
        return len(self.readings) + len(self.exclusions)

    def of_split(self, split: str) -> dict[str, Reading]:
        """Those of a split, or of all, by id; `UserError` if there are none."""
        chosen = {reading.id: reading for reading in self.readings if split in ("all", reading.split)}
        if not chosen:
            text = f"no usable reading of split {split!r} ({self.n_found} in all)"
            raise UserError("; ".join([text + first_of(self.exclusions), *self.notes]))
        return chosen


def parse_labels(cell: Cell, asked: int | str) -> dict[str, int | bool | str]:
    """The labels that `datasets.raw.findings.LABELS` has for a phase or data set."""
    return {label: cell(label, CHECKS[kind]) for label, kind in LABELS[asked].items()}


def parse_rows(path: Path, required: Sequence[str], make: Callable[[Cell], Any], result: RawReadings) -> dict[str, Any]:
    """What `make` makes of each row of a table with the `required` columns, by its id, the first of them.

    `make` is given a function from a column, and a `Check`, to the row's value. Rows with a cell that is refused, and
    ids given twice, are exclusions of `result`.
    """
    table, parsed, id_column = read_table(path, required), {}, required[0]
    for line, row in zip(table.index, table.to_dict("records")):

        def cell(column: str, check: Check = CHECKS["text"], row: Mapping[str, str] = row) -> Any:
            return check(row[column], f"column {column!r}:")

        try:
            if row[id_column] in parsed:
                raise UserError(f"column {id_column!r}: {row[id_column]} appears a second time")
            parsed[row[id_column]] = make(cell)
        except UserError as error:
            detail = f"{path}: line {line}, {error}"
            result.exclusions.append(Exclusion(row[id_column], "unusable row", detail, is_fault=True))
    return parsed
