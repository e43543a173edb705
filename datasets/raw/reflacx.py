"""REFLACX 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from datasets.fixations import (
    REFLACX_COLUMNS,
    REFLACX_SCREEN_COLUMNS,
    REFLACX_TIMES,
    fixation_columns,
    off_the_image_shown,
    on_the_button,
)
from datasets.raw.findings import phase_labels
from datasets.raw.readings import (
    ELLIPSE_COLUMNS,
    Cells,
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    only_root,
    parse_rows,
    usable_fixations,
)
from util.errors import UserError
from util.tables import check_id, check_relative_path, numeric_columns, parse_bool, read_table, table_file, to_numbers

PHASES = (1, 2, 3)
SPLITS = ("train", "validate", "test")
DISCARDED = "eye tracking discarded"

# Label columns of the metadata and of the ellipse tables by phase; certainty 0-5 in the metadata.
CERTAINTY_LABELS = {phase: tuple(sorted(labels)) for phase, labels in phase_labels("certainty").items()}
BOOL_LABELS, TEXT_LABELS = phase_labels("yes/no"), phase_labels("text")

_ID_COLUMNS = ("id", "split", "image", "dicom_id", "subject_id")
_SIZE_COLUMNS = ("image_size_x", "image_size_y")
_DISCARDED_COLUMN = "eye_tracking_data_discarded"


@dataclass(frozen=True, kw_only=True)
class ReflacxReading(Reading):
    """A reading whose tables lie in main_data/<id>."""

    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        on_screen = REFLACX_SCREEN_COLUMNS if screen_filter else {}
        wanted = (*REFLACX_TIMES, *REFLACX_COLUMNS.values(), *on_screen.values())
        table = read_table(self.fixations_path, wanted)
        numbers = to_numbers(table, wanted)
        fixations = fixation_columns(numbers)
        rules = {}
        if screen_filter:
            screen = {name: numbers[column] for name, column in on_screen.items()}
            rules["on the screen's button"] = on_the_button(fixations, screen)
            rules["outside of the image shown"] = off_the_image_shown(fixations)
        return usable_fixations(table, numbers, fixations, self.fixations_path, rules)

    def load_ellipses(self) -> pd.DataFrame:
        path = self._table("anomaly_location_ellipses.csv")
        table = read_table(path, ELLIPSE_COLUMNS)
        ellipses = pd.DataFrame(numeric_columns(table, ELLIPSE_COLUMNS, path))
        for label in (*CERTAINTY_LABELS[self.phase], *BOOL_LABELS[self.phase], *TEXT_LABELS[self.phase]):
            if label in table.columns:
                marked = [parse_bool(cell, path, line, label) for line, cell in table[label].items()]
                ellipses[label] = np.array(marked, bool)
        return ellipses

    def load_chest_box(self) -> tuple[float, float, float, float]:
        path, columns = self._table("chest_bounding_box.csv"), ELLIPSE_COLUMNS[:4]
        boxes = np.transpose([*numeric_columns(read_table(path, columns), columns, path).values()])
        if len(boxes) != 1:
            raise UserError(f"{path}: {len(boxes)} boxes where one is expected")
        return tuple(boxes[0].tolist())

    def _table(self, name: str) -> Path:
        return table_file(self.fixations_path.parent / name)


def find_root(raw: Path) -> Path | None:
    """The directory that holds main_data/: `raw`, one below or one above it; None if none does. UserError if
    several do."""
    return only_root(raw.parent if raw.name == "main_data" else raw, lambda root: bool(_metadata_files(root)))


def _metadata_files(root: Path) -> dict[int, Path]:
    """The tables of metadata that are there, by phase."""
    paths = {phase: table_file(root / "main_data" / f"metadata_phase_{phase}.csv") for phase in PHASES}
    return {phase: path for phase, path in paths.items() if path.exists()}


def read_reflacx(raw: Path) -> RawReadings:
    """All readings of the raw data set, ordered by id; raises `UserError` for unusable metadata.

    `raw` holds main_data/ (or is it, or the directory above). Rows that cannot be used are
    exclusions; a phase whose metadata file is not there is noted.
    """
    root = find_root(raw)
    if root is None:
        raise UserError(
            f"{raw}: no main_data/metadata_phase_*.csv here or one directory below; "
            "--raw is the root of REFLACX 1.0.0 (reflacx-xray-localization/1.0.0)"
        )
    result = RawReadings("reflacx", [])
    files = _metadata_files(root)
    for phase in PHASES:
        if phase not in files:
            result.notes.append(f"metadata_phase_{phase}.csv is not there: no readings of phase {phase}")
            continue
        text = (*_ID_COLUMNS, *TEXT_LABELS[phase])
        required = (*text, _DISCARDED_COLUMN, *_SIZE_COLUMNS, *CERTAINTY_LABELS[phase], *BOOL_LABELS[phase])
        table = read_table(files[phase], required, text=text)
        rows = parse_rows(table, files[phase], "id", partial(_parse_row, phase), result)
        result.readings += [reading for reading in rows.values() if reading is not None]
        result.exclusions += [Exclusion(name, DISCARDED) for name, reading in rows.items() if reading is None]
    result.readings.sort(key=lambda reading: reading.id)
    result.exclusions.sort(key=lambda exclusion: exclusion.id)
    return result


def _parse_row(phase: int, cells: Cells) -> ReflacxReading | None:
    """The reading of one row of the metadata, None if its eye tracking was discarded."""
    where = cells.where
    name = check_id(cells["id"], where("id"))
    if name[:2] != f"P{phase}":
        raise UserError(f"{where('id')} {name!r} is no reading of phase {phase}: its ids begin with P{phase}")
    if cells.truth(_DISCARDED_COLUMN):
        return None
    if cells["split"] not in SPLITS:
        raise UserError(f"{where('split')} {cells['split']!r} is none of {', '.join(SPLITS)}")
    image = PurePosixPath(check_relative_path(cells["image"], where("image")))
    image_id = check_id(cells["dicom_id"], where("dicom_id"))
    study = image.parent.name
    if image.stem != image_id or study[:1] != "s":
        raise UserError(
            f"{where('image')} {cells['image']!r} is not the image of dicom_id {image_id!r}, s<study>/<dicom_id>.dcm"
        )
    width, height = (cells.number(column, range(1, 100_000)) for column in _SIZE_COLUMNS)
    return ReflacxReading(
        id=name,
        study_id=check_id(study[1:], where("image")),
        subject_id=check_id(cells["subject_id"], where("subject_id")),
        image_id=image_id,
        image_path=str(cells["image"]),
        image_size=(height, width),
        labels={
            **{label: cells.number(label, range(6)) for label in CERTAINTY_LABELS[phase]},
            **{label: cells.truth(label) for label in BOOL_LABELS[phase]},
            **{label: cells[label] for label in TEXT_LABELS[phase]},
        },
        split=cells["split"],
        phase=phase,
        source="reflacx",
        fixations_path=table_file(cells.path.parent / name / "fixations.csv"),
    )
