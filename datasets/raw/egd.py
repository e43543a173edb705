"""EGD-CXR 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from datasets.fixations import RECTANGLE
from datasets.raw.findings import LABELS
from datasets.raw.mimic_cxr import ids_beginning, read_sizes
from datasets.raw.readings import (
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    digest_of,
    find_root,
    label_checks,
    parse_rows,
    usable_fixations,
)
from util.errors import UserError
from util.tables import check_id, check_relative_path, read_table, to_numbers

DEFAULT_SIGMA = 150.0  # px of the original image, the data set's authors' own
_CHECKS = {
    **dict.fromkeys(("dicom_id", "study_id", "patient_id"), check_id),
    "path": check_relative_path,
    **label_checks("egd"),
}
_IDS = ("DICOM_ID", "SESSION_ID")
_NUMBERS = ("Time (in secs)", "X_ORIGINAL", "Y_ORIGINAL", "FPOGD")

find_egd_root = partial(find_root, pattern="master_sheet.csv")


@dataclass(frozen=True, kw_only=True)
class EgdReading(Reading):
    """A reading whose fixations were read with everybody else's from the one file of the data set: `rows` has `_IDS`
    and `_NUMBERS`, and the file's lines for an index."""

    rows: pd.DataFrame = field(repr=False, compare=False)
    sigma: float

    def fixations_origin(self) -> str:
        return f"{self.sigma} {digest_of(self.rows.to_csv().encode())}"

    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        """As `Reading.load_fixations`; fixations off the picture are left out, the picture was always shown whole."""
        numbers = self.rows[list(_NUMBERS)].astype(np.float64)
        _, x, y, duration = (numbers[name] for name in _NUMBERS)
        height, width = self.image_size
        whole = dict(zip(RECTANGLE, (-np.inf, -np.inf, np.inf, np.inf)))
        fixations = pd.DataFrame(
            {"x": x, "y": y, "duration": duration, "sigma_x": self.sigma, "sigma_y": self.sigma, **whole}
        )
        off = (x < 0) | (y < 0) | (x >= width) | (y >= height)
        return usable_fixations(numbers, fixations, self.fixations_path, {"off the picture": off})


def read_egd(raw: Path, *, sigma: float = DEFAULT_SIGMA, metadata: Path | None = None) -> RawReadings:
    """All readings of the raw data set, ordered by id; raises `UserError` for unusable tables.

    A reading is one image in one session, its id <dicom_id>-<session>. The data set has no angular
    resolution, hence `sigma`, px of the original image; it has no splits and no image sizes, which are those of
    `metadata`, MIMIC-CXR's table.
    """
    if metadata is None:
        raise UserError(
            f"{raw}: EGD-CXR does not say how large its images are; give MIMIC-CXR's table of metadata by --metadata, "
            "or --images with it"
        )
    result = RawReadings("egd", [])
    path = (find_egd_root(raw) or raw) / "master_sheet.csv"
    sheet = parse_rows(path, _CHECKS, partial(_fields, read_sizes(metadata)), result)

    path = path.with_name("fixations.csv")
    table = read_table(path, (*_IDS, *_NUMBERS))
    known = sorted({*sheet} | {exclusion.id for exclusion in result.exclusions})
    images = _image_ids(table["DICOM_ID"], known, path, result)
    rows = pd.concat([images, table["SESSION_ID"], to_numbers(table, _NUMBERS)], axis=1)
    for (image, session), own in rows[images.isin([*sheet])].groupby(list(_IDS)):
        reading = EgdReading(
            id=check_id(f"{image}-{session}", f"{path}: line {own.index[0]}, column 'SESSION_ID':"),
            source="egd",
            fixations_path=path,
            rows=own,
            sigma=sigma,
            **sheet[image],
        )
        result.readings.append(reading)
    for image in sorted({*sheet} - {*images}):
        result.exclusions.append(Exclusion(image, "no fixations", f"{path}: none of DICOM_ID {image}", is_fault=True))
    return result


def _image_ids(written: pd.Series, known: list[str], path: Path, result: RawReadings) -> pd.Series:
    """The image of each row of fixations: some ids of the published file are cut off at the end. None for an id of
    no image, and for one that may be of several, which is a fault."""
    fits = {name: [name] if name in known else ids_beginning(name, known) for name in written.unique()}

    def told(names: list[str]) -> str:
        return f"{written.isin(names).sum()} fixations of {len(names)} ids ({', '.join(map(repr, names[:3]))}, ...)"

    if cut := [name for name, images in fits.items() if len(images) == 1 and images != [name]]:
        result.notes.append(f"{told(cut)} that are cut off were taken for the only image that fits")
    if unknown := [name for name, images in fits.items() if not images]:
        result.notes.append(
            f"{told(unknown)} are of no image of the master sheet: calibration screens, if the sheet is whole and of the "
            "same version"
        )
    for name, images in fits.items():
        if len(images) > 1:
            detail = f"{path}: {told([name])} may be of any of {len(images)} images, such as {', '.join(images[:2])}"
            result.exclusions.append(Exclusion(name, "ambiguous image id", detail, is_fault=True))
    return written.map({name: images[0] for name, images in fits.items() if len(images) == 1})


def _fields(sizes: dict[str, tuple[int, int]], cell: Callable[[str], Any]) -> dict[str, Any]:
    """The part of a reading's fields that the master sheet gives."""
    path, image_id = cell("path"), cell("dicom_id")
    if PurePosixPath(path).stem != image_id:
        raise UserError(f"column 'path': {path!r} is not the image of dicom_id {image_id!r}")
    if image_id not in sizes:
        raise UserError(f"column 'dicom_id': {image_id} is not in the table of metadata, which has the images' sizes")
    return {
        "image_id": image_id,
        "study_id": cell("study_id"),
        "subject_id": cell("patient_id"),
        "image_path": path,
        "image_size": sizes[image_id],
        "labels": {label: cell(label) for label in LABELS["egd"]},
    }
