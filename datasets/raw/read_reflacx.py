"""REFLACX 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import pandas as pd

from datasets.fixations import RECTANGLE, REFLACX_COLUMNS, fixation_columns
from datasets.raw.findings import COMMON_FINDING, LABELS
from datasets.raw.readings import (
    Cell,
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    parse_labels,
    parse_rows,
    usable_fixations,
)
from util.errors import UserError
from util.tables import check_id, check_truth, check_whole, numeric_columns, read_table, to_numbers

PHASES = (1, 2, 3)
_DISCARDED = "eye_tracking_data_discarded"
_COLUMNS = ("id", "dicom_id", "subject_id", "split", "image", _DISCARDED, "image_size_x", "image_size_y")


@dataclass(frozen=True, kw_only=True)
class ReflacxReading(Reading):
    """A reading whose tables lie in main_data/<id>."""

    def load_fixations(self) -> Fixations:
        numbers = to_numbers(read_table(self.fixations_path, REFLACX_COLUMNS), REFLACX_COLUMNS)
        return usable_fixations(numbers, fixation_columns(numbers), self.fixations_path)

    def load_ellipses(self) -> pd.DataFrame:
        path, columns = self.fixations_path.with_name("anomaly_location_ellipses.csv"), (*RECTANGLE, "certainty")
        table = read_table(path, columns)
        labels = [label for label in LABELS[self.phase] if label in table]
        findings = pd.Series(index=table.index, dtype=object)
        for line, row in zip(table.index, table.to_dict("records")):
            marked = (own for own in labels if check_truth(row[own], f"{path}: line {line}, column {own!r}:"))
            findings[line] = list(dict.fromkeys(map(COMMON_FINDING.get, marked)))
        return numeric_columns(table, columns, path).assign(findings=findings)

    def load_chest_box(self) -> tuple[float, float, float, float]:
        path = self.fixations_path.with_name("chest_bounding_box.csv")
        boxes = numeric_columns(read_table(path, RECTANGLE), RECTANGLE, path).to_numpy()
        if len(boxes) != 1:
            raise UserError(f"{path}: {len(boxes)} boxes where one is expected")
        return tuple(boxes[0].tolist())


def read_reflacx(root: Path) -> RawReadings:
    """All readings of the raw data set whose main_data/ is in `root`, ordered by id; raises `UserError` for unusable
    metadata. Rows that cannot be used are exclusions.
    """
    result = RawReadings([])
    for phase in PHASES:
        path = root / "main_data" / f"metadata_phase_{phase}.csv"
        make = partial(_reading, phase, path.parent)
        for name, reading in parse_rows(path, (*_COLUMNS, *LABELS[phase]), make, result).items():
            if reading is None:
                result.exclusions.append(Exclusion(name, "eye tracking discarded"))
            else:
                result.readings.append(reading)
    result.readings.sort(key=lambda reading: reading.id)
    result.exclusions.sort(key=lambda exclusion: exclusion.id)
    return result


def _reading(phase: int, main_data: Path, cell: Cell) -> ReflacxReading | None:
    """The reading of one row of the metadata, None if its eye tracking was discarded."""
    name, image_id = cell("id", check_id), cell("dicom_id", check_id)
    if cell(_DISCARDED, check_truth):
        return None
    image = PurePosixPath(cell("image"))
    study = image.parent.name
    if image.stem != image_id or study[:1] != "s":
        raise UserError(
            f"column 'image': {str(image)!r} is not the image of dicom_id {image_id!r}, s<study>/<dicom_id>.dcm"
        )
    side = partial(check_whole, allowed=range(1, 100_000))
    return ReflacxReading(
        id=name,
        study_id=check_id(study[1:], "column 'image':"),
        subject_id=cell("subject_id", check_id),
        image_id=image_id,
        image_path=cell("image"),
        image_size=(cell("image_size_y", side), cell("image_size_x", side)),
        labels=parse_labels(cell, phase),
        split=cell("split", check_id),
        phase=phase,
        source="reflacx",
        fixations_path=main_data / name / "fixations.csv",
    )
