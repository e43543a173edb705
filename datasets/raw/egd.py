"""EGD-CXR 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from datasets.raw.ids import match_ids
from datasets.raw.mimic_cxr import read_sizes
from datasets.raw.readings import (
    Cells,
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    digest_of,
    only_root,
    parse_rows,
    usable_fixations,
)
from util.errors import UserError
from util.tables import check_id, check_relative_path, read_table, table_file, to_numbers

DEFAULT_SIGMA = 150.0  # px of the original image, the data set's authors' own
LABELS = ("Normal", "CHF", "pneumonia")
_MASTER_TEXT = ("dicom_id", "path", "study_id", "patient_id")
_FIXATION_TEXT = ("DICOM_ID", "SESSION_ID")
_TIME, _DURATION = "Time (in secs)", "FPOGD"
_POSITION = ("X_ORIGINAL", "Y_ORIGINAL")
# Where no size is recorded: what short sides MIMIC-CXR's films have, and the share of fixations off the picture,
# without doubt that the file is the original.
_SHORT_SIDES = 1500, 4300
_MAX_OFF = 0.1
_ASK = "give MIMIC-CXR's table of metadata, which has the original sizes, by --metadata"


@dataclass(frozen=True, kw_only=True)
class EgdReading(Reading):
    """A reading whose fixations were read with everybody else's from the one file of the data set:
    `rows` has x, y, time and, where the file has it, duration, and the file's lines for an index."""

    rows: pd.DataFrame = field(repr=False, compare=False)
    sigma: float
    size_is_recorded: bool

    def original_size(self, file_size: tuple[int, int]) -> tuple[int, int]:
        """As `Reading.original_size`; without a recorded size the file must look like the original."""
        if not self.size_is_recorded and not _SHORT_SIDES[0] <= min(file_size) <= _SHORT_SIDES[1]:
            raise UserError(
                f"is {file_size[1]} x {file_size[0]} px, which no original of MIMIC-CXR is, and the fixations are in "
                f"pixels of the original; {_ASK}"
            )
        return super().original_size(file_size)

    def fixations_origin(self) -> str:
        return f"{self.sigma} {digest_of(self.rows.to_csv().encode())}"

    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        """As `Reading.load_fixations`; fixations off the picture are left out, the picture was always
        shown whole. Without a column of durations a fixation lasted since the one before it (the first:
        since the image came up), and is bad where that one's time is."""
        numbers = to_numbers(self.rows, [column for column in self.rows if column not in _FIXATION_TEXT])
        duration = numbers.get(_DURATION, np.diff(numbers[_TIME], prepend=0.0))
        x, y = (numbers[column] for column in _POSITION)
        height, width = self.image_size or (np.inf, np.inf)
        off = (x < 0) | (y < 0) | (x >= width) | (y >= height)
        if not self.size_is_recorded and off.sum() > _MAX_OFF * len(off):
            raise UserError(
                f"{off.sum()} of {len(off)} fixations are off the picture of {width} x {height} px: is it the original? "
                f"{_ASK}"
            )
        whole = {"xmin": -np.inf, "ymin": -np.inf, "xmax": np.inf, "ymax": np.inf}
        fixations = {"x": x, "y": y, "duration": duration, "sigma_x": self.sigma, "sigma_y": self.sigma, **whole}
        return usable_fixations(self.rows, numbers, fixations, self.fixations_path, {"off the picture": off})


def find_egd_root(raw: Path) -> Path | None:
    """The directory that holds master_sheet.csv: `raw` or one below it; None if none does. UserError if several do."""
    return only_root(raw, lambda root: table_file(root / "master_sheet.csv").is_file())


def read_egd(raw: Path, *, sigma: float = DEFAULT_SIGMA, metadata: Path | None = None) -> RawReadings:
    """All readings of the raw data set, ordered by id; raises `UserError` for unusable tables.

    A reading is one image in one session, its id <dicom_id>-<session>. The data set has no angular
    resolution, hence `sigma`, px of the original image; it has no splits and no image sizes, which are those of
    `metadata`, MIMIC-CXR's table.
    """
    if not sigma > 0:
        raise UserError(f"--sigma {sigma:g} is not positive")
    root = find_egd_root(raw)
    if root is None:
        raise UserError(f"{raw}: no master_sheet.csv here or one directory below (egd-cxr/1.0.0)")
    sizes = {} if metadata is None else read_sizes(metadata)
    result = RawReadings("egd", [])
    path = table_file(root / "master_sheet.csv")
    master = read_table(path, (*_MASTER_TEXT, *LABELS), text=_MASTER_TEXT)
    sheet = parse_rows(master, path, "dicom_id", _parse_row, result)

    path = table_file(root / "fixations.csv")
    table = read_table(path, (*_FIXATION_TEXT, _TIME, *_POSITION), text=_FIXATION_TEXT)
    columns = [*_FIXATION_TEXT, _TIME, *_POSITION, *(c for c in (_DURATION,) if c in table)]
    table["DICOM_ID"] = _image_ids(table["DICOM_ID"], master["dicom_id"], path, result)
    rows_of = table[table["DICOM_ID"].isin([*sheet])][columns].groupby(list(_FIXATION_TEXT), sort=True)
    for (image, session), rows in rows_of:
        reading = EgdReading(
            id=check_id(f"{image}-{session}", f"{path}: line {rows.index[0]}, column 'SESSION_ID':"),
            split=None,
            phase=None,
            source="egd",
            image_size=sizes.get(image),
            size_is_recorded=image in sizes,
            fixations_path=path,
            rows=rows,
            sigma=sigma,
            **sheet[image],
        )
        result.readings.append(reading)
    for image in sorted(set(sheet) - set(table["DICOM_ID"])):
        result.exclusions.append(Exclusion(image, "no fixations", f"{path}: none of DICOM_ID {image}", is_fault=True))
    return result


def _image_ids(written: pd.Series, known: pd.Series, path: Path, result: RawReadings) -> pd.Series:
    """The image of each row of fixations: some ids of the published file are cut off at the end. None for an id of
    no image, and for one that may be of several, which is a fault."""
    match = match_ids(written, known, cut_off=True)
    rows = written.value_counts()
    if match.completed:
        name, whole = next(iter(match.completed.items()))
        result.notes.append(
            f"{rows[[*match.completed]].sum()} fixations of {len(match.completed)} ids that are cut off, or "
            f"in other letters, were taken for the only image that fits (e.g. {name!r} for {whole})"
        )
    if unknown := [name for name in match.unknown if name]:
        result.notes.append(
            f"{rows[unknown].sum()} fixations of {len(unknown)} ids ({', '.join(map(repr, unknown[:3]))}, ...) are of no "
            "image of the master sheet: calibration screens, if the sheet is whole and of the same version"
        )
    for name, images in {**match.ambiguous, **({"": ["all"]} if "" in rows else {})}.items():
        detail = (
            f"{path}: line {written.index[written == name][0]}, column 'DICOM_ID': {name!r}, here and in "
            f"{rows[name] - 1} more rows, may be any of {', '.join(images)}"
        )
        result.exclusions.append(Exclusion(name, "ambiguous image id", detail, is_fault=True))
    return written.map(match.found)


def _parse_row(cells: Cells) -> dict[str, Any]:
    """The part of a reading's fields that the master sheet gives."""
    path, image_id = check_relative_path(cells["path"], cells.where("path")), cells["dicom_id"]
    if PurePosixPath(path).stem != image_id:
        raise UserError(f"{cells.where('path')} {path!r} is not the image of dicom_id {image_id!r}")
    return {
        "image_id": check_id(image_id, cells.where("dicom_id")),
        "study_id": check_id(cells["study_id"], cells.where("study_id")),
        "subject_id": check_id(cells["patient_id"], cells.where("patient_id")),
        "image_path": path,
        "labels": {label: cells.truth(label) for label in LABELS},
    }
