"""REFLACX 1.0.0 as PhysioNet gives it, read into `Reading`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from datasets.raw.readings import (
    ELLIPSE_COLUMNS,
    Exclusion,
    Fixations,
    RawReadings,
    Reading,
    only_root,
    usable_fixations,
)
from util.errors import UserError
from util.tables import (
    bad_cells,
    check_id,
    check_relative_path,
    numeric_columns,
    parse_bool,
    read_header,
    read_table,
    table_file,
    to_numbers,
)

PHASES = (1, 2, 3)
SPLITS = ("train", "validate", "test")
DISCARDED = "eye tracking discarded"

# Label columns of the metadata and of the ellipse tables; certainty 0-5 in the metadata.
CERTAINTY_LABELS: Mapping[int, tuple[str, ...]] = {
    1: (
        "Airway wall thickening",
        "Atelectasis",
        "Consolidation",
        "Emphysema",
        "Enlarged cardiac silhouette",
        "Fibrosis",
        "Fracture",
        "Groundglass opacity",
        "Mass",
        "Nodule",
        "Pleural effusion",
        "Pleural thickening",
        "Pneumothorax",
        "Pulmonary edema",
        "Wide mediastinum",
    ),
    **dict.fromkeys(
        (2, 3),
        (
            "Abnormal mediastinal contour",
            "Acute fracture",
            "Atelectasis",
            "Consolidation",
            "Enlarged cardiac silhouette",
            "Enlarged hilum",
            "Groundglass opacity",
            "Hiatal hernia",
            "High lung volume / emphysema",
            "Interstitial lung disease",
            "Lung nodule or mass",
            "Pleural abnormality",
            "Pneumothorax",
            "Pulmonary edema",
        ),
    ),
}
BOOL_LABELS: Mapping[int, tuple[str, ...]] = {
    1: ("Support devices", "Quality issue"),
    2: ("Support devices",),
    3: ("Support devices",),
}
TEXT_LABELS: Mapping[int, tuple[str, ...]] = {1: (), 2: ("Other",), 3: ("Other",)}

_ID_COLUMNS = ("id", "split", "image", "dicom_id", "subject_id")
_SIZE_COLUMNS = ("image_size_x", "image_size_y")
METADATA_FILES = ("metadata_phase_*.csv", "metadata_phase_*.csv.gz")


@dataclass(frozen=True, kw_only=True)
class ReflacxReading(Reading):
    """A reading whose tables lie in main_data/<id>."""

    @property
    def directory(self) -> Path:
        return self.fixations_path.parent

    def load_fixations(self, *, screen_filter: bool = False) -> Fixations:
        path = self.fixations_path
        on_screen = REFLACX_SCREEN_COLUMNS if screen_filter else {}
        wanted = (*REFLACX_TIMES, *REFLACX_COLUMNS.values(), *on_screen.values())
        table = read_table(path, wanted)
        numbers = to_numbers(table, wanted)
        fixations = pd.DataFrame(fixation_columns(numbers), index=table.index)
        rules = {}
        if screen_filter:
            screen = {name: numbers[column] for name, column in on_screen.items()}
            rules["on the screen's button"] = on_the_button(fixations, screen)
            rules["outside of the image shown"] = off_the_image_shown(fixations)
        damaged = bad_cells(table, numbers)
        again = table.duplicated()  # times of its own tell each fixation from every other
        return usable_fixations(fixations, path, damaged=damaged, repeated=again, rules=rules)

    def load_ellipses(self) -> pd.DataFrame:
        path = table_file(self.directory / "anomaly_location_ellipses.csv")
        table = read_table(path, ELLIPSE_COLUMNS)
        ellipses = pd.DataFrame(numeric_columns(table, ELLIPSE_COLUMNS, path))
        for label in (*CERTAINTY_LABELS[self.phase], *BOOL_LABELS[self.phase], *TEXT_LABELS[self.phase]):
            if label in table.columns:
                marked = [parse_bool(cell, path, line, label) for line, cell in table[label].items()]
                ellipses[label] = np.array(marked, bool)
        return ellipses

    def load_chest_box(self) -> tuple[float, float, float, float]:
        path = table_file(self.directory / "chest_bounding_box.csv")
        columns = ELLIPSE_COLUMNS[:4]
        table = numeric_columns(read_table(path, columns), columns, path)
        if len(table["xmin"]) != 1:
            raise UserError(f"{path}: {len(table['xmin'])} boxes where one is expected")
        return tuple(float(table[column][0]) for column in columns)


def find_root(raw: Path) -> Path | None:
    """The directory that holds main_data/: `raw`, one below or one above it; None if none does. UserError if
    several do."""
    if raw.name == "main_data" and any(next(raw.glob(name), None) for name in METADATA_FILES):
        return raw.parent
    return only_root(raw, lambda root: any(next((root / "main_data").glob(name), None) for name in METADATA_FILES))


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
    seen: set[str] = set()
    for phase in PHASES:
        path = _metadata(root / "main_data", phase)
        if path.exists():
            _read_phase(path, phase, seen, result)
        else:
            result.notes.append(f"{path.name} is not there: no readings of phase {phase}")
    _note_unnamed(root / "main_data", seen, result)
    result.readings.sort(key=lambda reading: reading.id)
    result.exclusions.sort(key=lambda exclusion: exclusion.id)
    return result


def _note_unnamed(main_data: Path, seen: set[str], result: RawReadings) -> None:
    """Readings that are there but not in their phase's metadata would be lost without a word."""
    phases = [f"P{phase}" for phase in PHASES if _metadata(main_data, phase).exists()]
    names = [path.name for path in main_data.iterdir() if path.is_dir() and path.name[:2].upper() in phases]
    if unnamed := sorted(set(names) - seen):
        result.notes.append(
            f"{len(unnamed)} directories of {main_data} are of no reading in the metadata, e.g. {unnamed[0]}"
        )


def _metadata(main_data: Path, phase: int) -> Path:
    return table_file(main_data / f"metadata_phase_{phase}.csv")


def _read_phase(path: Path, phase: int, seen: set[str], result: RawReadings) -> None:
    labels = (*CERTAINTY_LABELS[phase], *BOOL_LABELS[phase], *TEXT_LABELS[phase])
    text = (*_ID_COLUMNS, *TEXT_LABELS[phase])
    required = (*_ID_COLUMNS, "eye_tracking_data_discarded", *_SIZE_COLUMNS, *labels)
    names = set(read_header(path, ("id",)))
    for other in PHASES:
        if not set(labels) <= names and set(CERTAINTY_LABELS[other]) <= names:
            raise UserError(f"{path}: has the label columns of phase {other}, not of phase {phase}")
    table = read_table(path, required, text=text)
    for line, row in zip(table.index, table[list(required)].to_dict("records")):
        name = row["id"]
        try:
            reading = _parse_row(row, path, line, phase)
            if name in seen:
                raise UserError(f"{path}: line {line}, column 'id': {name} appears a second time")
        except UserError as error:
            result.exclusions.append(Exclusion(name, "unusable metadata row", str(error), is_fault=True))
            continue
        finally:
            seen.add(name)
        if reading is None:
            result.exclusions.append(Exclusion(name, DISCARDED))
        else:
            result.readings.append(reading)


def _parse_row(row: dict, path: Path, line: int, phase: int) -> ReflacxReading | None:
    """The reading of one row of the metadata, None if its eye tracking was discarded."""

    def where(column: str) -> str:
        return f"{path}: line {line}, column {column!r}:"

    name = check_id(row["id"], where("id"))
    if name[:2] != f"P{phase}":
        raise UserError(f"{where('id')} {name!r} is no reading of phase {phase}: its ids begin with P{phase}")
    column = "eye_tracking_data_discarded"
    if parse_bool(row[column], path, line, column):
        return None
    if row["split"] not in SPLITS:
        raise UserError(f"{where('split')} {row['split']!r} is none of {', '.join(SPLITS)}")
    image = check_relative_path(row["image"], where("image"))
    study = PurePosixPath(image).parent.name
    if not (study.startswith("s") and study[1:].isalnum()):
        raise UserError(f"{where('image')} {image!r} does not end in s<study>/<dicom_id>.dcm")
    image_id = check_id(row["dicom_id"], where("dicom_id"))
    if PurePosixPath(image).stem != image_id:
        raise UserError(f"{where('image')} {image!r} is not the image of dicom_id {image_id!r}")
    width, height = size_xy = [_number(row[column], where(column)) for column in _SIZE_COLUMNS]
    if min(size_xy) < 1:
        raise UserError(f"{where(_SIZE_COLUMNS[0])} image size {width:g} x {height:g} is not positive")
    labels: dict[str, int | bool | str] = {}
    for label in CERTAINTY_LABELS[phase]:
        certainty = _number(row[label], where(label))
        if certainty not in range(6):
            raise UserError(f"{where(label)} certainty {row[label]!r} is not 0, 1, 2, 3, 4 or 5")
        labels[label] = int(certainty)
    for label in BOOL_LABELS[phase]:
        labels[label] = parse_bool(row[label], path, line, label)
    for label in TEXT_LABELS[phase]:
        labels[label] = row[label]
    return ReflacxReading(
        id=name,
        study_id=study[1:],
        subject_id=check_id(row["subject_id"], where("subject_id")),
        image_id=image_id,
        image_path=image,
        image_size=(round(height), round(width)),
        labels=labels,
        split=row["split"],
        phase=phase,
        source="reflacx",
        fixations_path=table_file(path.parent / name / "fixations.csv"),
    )


def _number(cell: object, where: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{where} {str(cell)!r} is not a finite number")
    return value
