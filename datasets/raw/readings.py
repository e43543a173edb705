"""What a gaze data set has to give, whatever its files look like.

One data set = one short module with one function that returns `RawReadings` (see reflacx.py and
egd.py), entered in `datasets.prepare.readings.SOURCES`. Everything after that (joining with the images,
heatmaps, writing the processed tree, the gaze analysis) is the same for all of them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.fixations import FIXATION_COLUMNS, RECTANGLE
from util.errors import UserError

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
    fixations: pd.DataFrame,
    path: Path,
    *,
    damaged: Mapping[int, str] | None = None,
    repeated: Sequence[bool] | None = None,
    rules: Mapping[str, Sequence[bool]] | None = None,
) -> Fixations:
    """The rows of `fixations` (`FIXATION_COLUMNS`, indexed by line) that can be used.

    Left out as bad: a cell that is no finite number (of the rectangle: no number), a sigma that is not
    positive, a negative duration, a row that is `repeated`, which would count twice; by rule: a duration of 0, and what `rules` name, True for each row
    that goes. `damaged` says of lines what their file has instead of a number.

    Raises `UserError` naming `path` if more than the share `MAX_BAD` of all rows is bad.
    """
    damaged = damaged or {}
    finite = [column for column in FIXATION_COLUMNS if column not in RECTANGLE]
    with np.errstate(invalid="ignore"):
        unreadable = ~np.isfinite(fixations[finite]).all(axis=1) | fixations[list(RECTANGLE)].isna().any(axis=1)
        reasons = {
            "not a finite number": unreadable | fixations.index.isin(list(damaged)),
            "angular resolution not positive": (fixations[["sigma_x", "sigma_y"]] <= 0).any(axis=1),
            "negative duration": fixations["duration"] < 0,
            "the same row again": pd.Series(False if repeated is None else repeated, fixations.index, bool),
        }
        n_kinds_of_bad = len(reasons)
        reasons |= {name: pd.Series(rule, fixations.index, bool) for name, rule in (rules or {}).items()}
        reasons["duration of 0"] = fixations["duration"] == 0
    left, left_out, bad = pd.Series(True, fixations.index), Counter(), []
    for i, (reason, mask) in enumerate(reasons.items()):
        gone = fixations.index[left & mask]
        if len(gone):
            left_out[reason] = len(gone)
        if i < n_kinds_of_bad:
            bad += [(line, damaged.get(line, reason)) for line in gone]
        left[gone] = False
    lines = [f"line {line}, {text}" for line, text in sorted(bad)]
    if len(bad) > MAX_BAD * len(fixations):
        raise UserError(
            f"{path}: {lines[0]}; {len(bad)} of {len(fixations)} fixations are bad, more than {MAX_BAD:.0%}"
        )
    return Fixations(fixations[left], dict(left_out), tuple(lines))


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
            return hashlib.blake2b(self.fixations_path.read_bytes(), digest_size=10).hexdigest()
        except OSError as error:
            return f"errno {error.errno}"

    def origin(self) -> list:
        """All that its map and its entry are made from, JSON; not where the files are."""
        return [
            self.id,
            self.study_id,
            self.subject_id,
            self.image_id,
            self.image_size,
            dict(self.labels),
            self.split,
            self.phase,
            self.source,
            self.fixations_origin(),
        ]

    def load_ellipses(self) -> pd.DataFrame:
        """One row per marked abnormality: the box xmin, ymin, xmax, ymax (pixels of the original
        image) around an axis-aligned ellipse, certainty 1-5, and one bool column per label of the
        data set. No rows where the data set has none."""
        return pd.DataFrame(columns=list(ELLIPSE_COLUMNS), dtype=float)

    def load_chest_box(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) around the lungs and heart, pixels; None where there is none."""
        return None


def only_root(raw: Path, holds: Callable[[Path], bool]) -> Path | None:
    """`raw` if it holds a data set, else the one directory below that does; None if there is none. UserError if there
    are several, as versions beside each other, which no rule can choose from."""
    if holds(raw) or not raw.is_dir():
        return raw if raw.is_dir() else None
    try:
        found = sorted(path for path in raw.iterdir() if holds(path))
    except OSError as error:
        raise UserError(f"{error.filename or raw}: can't be read ({error.strerror})") from None
    if len(found) > 1:
        raise UserError(
            f"{raw}: the data set is in {len(found)} of its directories, {found[0].name} and {found[1].name} among them; "
            "give one of them as --raw"
        )
    return found[0] if found else None


def is_simulated(root: Path) -> bool:
    """Whether the raw data set at `root` says that its gaze is made up, as scripts/make_phantom.py marks it.

    Preparation carries the mark into the entries of the index as `"simulated": true`, and every picture
    prints it.
    """
    return (root / SIMULATED_FILE).is_file()


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

    def none_of(self, split: str) -> str:
        """What to say where no reading of a split is left: how many there are, and what became of those left out."""
        text = f"no usable reading of split {split!r} ({self.n_found} in all)"
        for reason, number in Counter(exclusion.reason for exclusion in self.exclusions).items():
            first = next(exclusion for exclusion in self.exclusions if exclusion.reason == reason)
            text += f"; {number} left out: {reason}, e.g. {first.id}{': ' * bool(first.detail)}{first.detail}"
        return "; ".join([text, *self.notes])
