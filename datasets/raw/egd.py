"""EGD-CXR 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from datasets.fixations import FIXATION_COLUMNS
from datasets.raw.ids import IdMatch, match_ids
from datasets.raw.image_index import read_sizes
from datasets.raw.readings import Exclusion, Fixations, RawReadings, Reading, only_root, usable_fixations
from util.errors import UserError
from util.tables import bad_cells, check_id, check_relative_path, parse_bool, read_table, table_file, to_numbers

DEFAULT_SIGMA = 150.0  # px of the original image, the data set's authors' own
LABELS = ("Normal", "CHF", "pneumonia")
_MASTER_TEXT = ("dicom_id", "path", "study_id", "patient_id")
_FIXATION_TEXT = ("DICOM_ID", "SESSION_ID")
_LIKE_DICOM_ID = re.compile("[0-9a-f]{8}-", re.IGNORECASE)
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
        rows = self.rows.to_csv().encode()
        return f"{self.sigma} {hashlib.blake2b(rows, digest_size=10).hexdigest()}"

    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        """As `Reading.load_fixations`; fixations off the picture are left out, the picture was always
        shown whole. Without a column of durations a fixation lasted since the one before it (the first:
        since the image came up), and is bad where that one's time is."""
        if screen_filter:
            raise UserError("--screen_filter: EGD-CXR has none of the columns it needs")
        numbers = to_numbers(self.rows, [column for column in self.rows if column not in _FIXATION_TEXT])
        time = numbers[_TIME]
        duration = numbers.get(_DURATION, np.diff(time, prepend=0.0))
        x, y = (numbers[column] for column in _POSITION)
        height, width = self.image_size or (np.inf, np.inf)
        off = (x < 0) | (y < 0) | (x >= width) | (y >= height)
        if not self.size_is_recorded and off.sum() > _MAX_OFF * len(off):
            raise UserError(
                f"{off.sum()} of {len(off)} fixations are off the picture of {width} x {height} px: is it the original? "
                f"{_ASK}"
            )
        whole = {"xmin": -np.inf, "ymin": -np.inf, "xmax": np.inf, "ymax": np.inf}
        columns = {"x": x, "y": y, "duration": duration, "sigma_x": self.sigma, "sigma_y": self.sigma, **whole}
        return usable_fixations(
            pd.DataFrame(columns, index=self.rows.index)[list(FIXATION_COLUMNS)],
            self.fixations_path,
            damaged=bad_cells(self.rows, numbers),
            repeated=self.rows.duplicated(),
            rules={"off the picture": off},
        )


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
    sheet = {}
    for line, row in zip(master.index, master.to_dict("records")):
        name = row["dicom_id"]
        try:
            if name in sheet:
                raise UserError(f"{path}: line {line}, column 'dicom_id': {name} appears a second time")
            sheet[name] = _parse_row(row, path, line)
        except UserError as error:
            result.exclusions.append(Exclusion(name, "unusable master sheet row", str(error), is_fault=True))

    path = table_file(root / "fixations.csv")
    table = read_table(path, (*_FIXATION_TEXT, _TIME, *_POSITION), text=_FIXATION_TEXT)
    columns = [*_FIXATION_TEXT, _TIME, *_POSITION, *(c for c in (_DURATION,) if c in table)]
    match = match_ids(table["DICOM_ID"], master["dicom_id"], cut_off=True)
    _report_ids(match, table["DICOM_ID"], path, result)
    table["DICOM_ID"] = table["DICOM_ID"].map(match.found)
    known = table["DICOM_ID"].notna()
    for (image, session), rows in table.loc[known, columns].groupby(list(_FIXATION_TEXT), sort=True):
        if image not in sheet:
            continue  # its row of the master sheet is reported already
        name = f"{image}-{session}"
        try:
            check_id(name, f"{path}: line {rows.index[0]}, column 'SESSION_ID':")
        except UserError as error:
            result.exclusions.append(Exclusion(name, "unusable session id", str(error), is_fault=True))
            continue
        reading = EgdReading(
            id=name,
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
        detail = f"{path}: none of DICOM_ID {image}"
        result.exclusions.append(Exclusion(image, "no fixations", detail, is_fault=True))
    return result


def _report_ids(match: IdMatch, ids: pd.Series, path: Path, result: RawReadings) -> None:
    """Say what became of the ids of fixations that are not in the master sheet as they are written."""
    rows = ids.value_counts()
    if match.completed:
        name, whole = next(iter(match.completed.items()))
        result.notes.append(
            f"{rows[list(match.completed)].sum()} fixations of {len(match.completed)} ids that are cut off, or "
            f"in other letters, were taken for the only image that fits (e.g. {name!r} for {whole})"
        )
    nameless = [name for name in match.unknown if not name]
    images = [name for name in match.unknown if _LIKE_DICOM_ID.match(name)]
    calibration = [name for name in match.unknown if name and not _LIKE_DICOM_ID.match(name)]
    for names, what in (
        (calibration, "(calibration)"),
        (images, "though they look like its ids: is the sheet whole, of the same version?"),
    ):
        if names:
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            result.notes.append(
                f"{rows[names].sum()} fixations of {len(names)} ids ({some}) are of no image of the master sheet {what}"
            )
    for name in nameless:
        line = ids.index[ids == name][0]
        detail = f"{path}: line {line}, column 'DICOM_ID': empty, here and in {rows[name] - 1} more rows"
        result.exclusions.append(Exclusion("", "fixations without image id", detail, is_fault=True))
    for name, images in match.ambiguous.items():
        line = ids.index[ids == name][0]
        some = ", ".join(images[:5]) + (f" and {len(images) - 5} more" if len(images) > 5 else "")
        detail = f"{path}: line {line}, column 'DICOM_ID': {name!r} is cut off and may be any of {some}"
        result.exclusions.append(Exclusion(name, "ambiguous image id", detail, is_fault=True))


def _parse_row(row: dict, path: Path, line: int) -> dict:
    """The part of a reading's fields that the master sheet gives."""

    def where(column: str) -> str:
        return f"{path}: line {line}, column {column!r}:"

    path_in_mimic = check_relative_path(row["path"], where("path"))
    if PurePosixPath(path_in_mimic).stem != row["dicom_id"]:
        raise UserError(f"{where('path')} {row['path']!r} is not the image of dicom_id {row['dicom_id']!r}")
    return {
        "image_id": check_id(row["dicom_id"], where("dicom_id")),
        "study_id": check_id(row["study_id"], where("study_id")),
        "subject_id": check_id(row["patient_id"], where("patient_id")),
        "image_path": path_in_mimic,
        "labels": {label: parse_bool(row[label], path, line, label) for label in LABELS},
    }
