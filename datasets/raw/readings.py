"""What a gaze data set has to give, whatever its files look like.

One data set = one short module with one function that returns `RawReadings` (see reflacx.py and
egd.py), entered in `datasets.prepare.readings.SOURCES`. Everything after that (joining with the images,
heatmaps, writing the processed tree, the gaze analysis) is the same for all of them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

# In the root of a raw data set whose gaze is made up; see `is_simulated`.
SIMULATED_FILE = "SIMULATED_GAZE.txt"
ELLIPSE_COLUMNS = ("xmin", "ymin", "xmax", "ymax", "certainty")


@dataclass(frozen=True, kw_only=True)
class Reading(ABC):
    """One reader looking at one image once.

    `image_id` is the image's dicom_id, `image_path` where the data set says the image lies (a hint,
    relative, may be empty), `image_size` (height, width) in pixels or None where the data set does
    not say. `labels` are the data set's own columns with their own values (certainty 0-5, bool or
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
    def load_fixations(self) -> pd.DataFrame:
        """One row per fixation with the columns of `util.gaze.FIXATION_COLUMNS` (float64).

        Raises `UserError` naming file, row and column.
        """

    def fixations_origin(self) -> str:
        """Digest of what `load_fixations` reads; by default the content of `fixations_path`."""
        try:
            return hashlib.blake2b(self.fixations_path.read_bytes(), digest_size=10).hexdigest()
        except OSError as error:
            return f"errno {error.errno}"

    def origin(self) -> list:
        """All that its map and its entry are made from, JSON; not where the files are."""
        return [
            self.id, self.study_id, self.subject_id, self.image_id, self.image_size, dict(self.labels), self.split,
            self.phase, self.source, self.fixations_origin(),
        ]  # fmt: skip

    def load_ellipses(self) -> pd.DataFrame:
        """One row per marked abnormality: the box xmin, ymin, xmax, ymax (pixels of the original
        image) around an axis-aligned ellipse, certainty 1-5, and one bool column per label of the
        data set. No rows where the data set has none."""
        return pd.DataFrame(columns=list(ELLIPSE_COLUMNS), dtype=float)

    def load_chest_box(self) -> tuple[float, float, float, float] | None:
        """(xmin, ymin, xmax, ymax) around the lungs and heart, pixels; None where there is none."""
        return None


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
