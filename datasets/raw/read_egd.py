"""EGD-CXR 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd

from datasets.raw.findings import LABELS
from datasets.raw.mimic_cxr import ids_beginning, read_sizes
from datasets.raw.readings import (
    Cell,
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    digest_of,
    parse_labels,
    parse_rows,
    usable_fixations,
)
from util.errors import UserError
from util.tables import check_id, read_table, to_numbers

DEFAULT_SIGMA = 150.0  # px of the original image, the data set's authors' own
_IDS = ("DICOM_ID", "SESSION_ID")
_NUMBERS = ("Time (in secs)", "X_ORIGINAL", "Y_ORIGINAL", "FPOGD")


@dataclass(frozen=True, kw_only=True)
class EgdReading(Reading):
    """A reading whose fixations were read with everybody else's from the one file of the data set: `rows` has `_IDS`
    and `_NUMBERS`, and the file's lines for an index."""

    rows: pd.DataFrame = field(repr=False, compare=False)
    sigma: float

    def fixations_origin(self) -> str:
        return f"{self.sigma} {digest_of(self.rows.to_csv().encode())}"

    def load_fixations(self) -> Fixations:
        """As `Reading.load_fixations`; fixations off the picture are left out, the picture was always shown whole."""
        numbers = self.rows[list(_NUMBERS)].astype(np.float64)
        fixations = numbers.set_axis(["time", "x", "y", "duration"], axis=1).assign(
            sigma_x=self.sigma, sigma_y=self.sigma, xmin=-np.inf, ymin=-np.inf, xmax=np.inf, ymax=np.inf
        )
        height, width = self.image_size
        on = fixations["x"].between(0, width, "left") & fixations["y"].between(0, height, "left")
        return usable_fixations(numbers, fixations, self.fixations_path, {"off the picture": ~on})


def read_egd(root: Path, *, sigma: float = DEFAULT_SIGMA, metadata: Path | None = None) -> RawReadings:
    """All readings of the raw data set, ordered by id; raises `UserError` for unusable tables.

    A reading is one image in one session, its id <dicom_id>-<session>. The data set has no angular
    resolution, hence `sigma`, px of the original image; it has no splits and no image sizes, which are those of
    `metadata`, MIMIC-CXR's table.
    """
    if metadata is None:
        raise UserError(
            f"{root}: EGD-CXR does not say how large its images are; give MIMIC-CXR's table of metadata with --metadata, "
            "or --images with it"
        )
    result = RawReadings([])
    path = root / "fixations.csv"
    make = partial(_reading, sizes=read_sizes(metadata), source="egd", sigma=sigma, fixations_path=path)
    sheet = parse_rows(
        root / "master_sheet.csv", ("dicom_id", "path", "study_id", "patient_id", *LABELS["egd"]), make, result
    )
    table = read_table(path, (*_IDS, *_NUMBERS))
    images = _image_ids(table["DICOM_ID"], sorted({*sheet} | {own.id for own in result.exclusions}), path, result)
    rows = pd.concat([images, table["SESSION_ID"], to_numbers(table, _NUMBERS)], axis=1)
    for (image, session), own in rows[images.isin([*sheet])].groupby(list(_IDS)):
        name = check_id(f"{image}-{session}", f"{path}: line {own.index[0]}, column 'SESSION_ID':")
        result.readings.append(sheet[image](id=name, rows=own))
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


def _reading(cell: Cell, *, sizes: dict[str, tuple[int, int]], **common: Any) -> Callable[..., EgdReading]:
    """What makes the readings of a row of the master sheet, given their `id` and `rows`."""
    image_id = cell("dicom_id", check_id)
    if PurePosixPath(cell("path")).stem != image_id:
        raise UserError(f"column 'path': {cell('path')!r} is not the image of dicom_id {image_id!r}")
    if image_id not in sizes:
        raise UserError(f"column 'dicom_id': {image_id} is not in the table of metadata, which has the images' sizes")
    return partial(
        EgdReading,
        image_id=image_id,
        study_id=cell("study_id", check_id),
        subject_id=cell("patient_id", check_id),
        image_path=cell("path"),
        image_size=sizes[image_id],
        labels=parse_labels(cell, "egd"),
        **common,
    )
