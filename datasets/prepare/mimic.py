"""From MIMIC-CXR to the MIMIC tree of pretraining, with heatmaps made elsewhere, or images alone.

The tree (`out`), read by `datasets.mimic.Mimic` and by the published loader, beside what `datasets.prepare.making`
keeps in it:
- mimic-cxr-jpg-cleanv4.json: list of entries; written last, so that a tree with it is complete. `image_path` begins
  with p10/ and the like: the image is below files/, and the maps below attention/ and foreground/;
- files/pNN/p<subject>/s<study>/<dicom_id>.jpg, attention/ and foreground/pNN/p<subject>/s<study>/<dicom_id>.png;
  8-bit gray, all three of one size;
- prepare.json: options, versions, counts and every image left out, with the reason.

Without heatmaps the index is images.json, and there is no other until `scripts/predict_gaze.py` has made the heatmaps.

The images are JPG (quality 95): the source is JPG already, and at 512 px a PNG takes 2.4 times the
space (125 against 52 kB for a real film), which for 240,000 images matters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from datasets.prepare.heatmaps import find_heatmaps, read_heatmap
from datasets.prepare.layout import Unit, origin_of, stamp
from datasets.prepare.making import TreeMaking
from datasets.prepare.work import Found, Made, PrepareReport, finish_tree, make_units
from datasets.raw.ids import match_ids
from datasets.raw.image_index import METADATA_NAMES, find_images, find_metadata
from datasets.raw.readings import Exclusion
from datasets.raw.walk import resolved
from util.errors import UserError
from util.radiograph import MIMIC_CXR_JPG
from util.tables import check_id, read_table

# As datasets.mimic and datasets.build have them, which import torch.
INDEX, IMAGES_INDEX = "mimic-cxr-jpg-cleanv4.json", "images.json"
FRONTAL = ("AP", "PA")
_ID_COLUMNS = ("dicom_id", "subject_id", "study_id")
_VIEW_COLUMN = "ViewPosition"
_PLACE = re.compile(r"/p(?P<subject>\d+)/s(?P<study>\d+)/[^/]+$")


@dataclass(frozen=True)
class MimicOptions:
    """What decides the pixels and names in the tree. `size`: short side of the images, px, 0 = native;
    never enlarged. `views`: of the images taken, or all. `exclude`: digest of the ids left out. `heatmaps`: whether the
    tree has those of others. `dicom_contrast`: one of `util.radiograph.CONTRASTS`."""

    source: str = "mimic"
    size: int = 512
    views: tuple[str, ...] = FRONTAL
    exclude: str | None = None
    heatmaps: bool = True
    dicom_contrast: str = MIMIC_CXR_JPG


class Row(NamedTuple):
    """What is known of an image beside its dicom_id; `view` is "" where nothing tells it."""

    subject_id: str
    study_id: str
    view: str


class MimicTask(NamedTuple):
    """One image to store: what the metadata says of it, and where it and its heatmap are."""

    dicom_id: str
    subject_id: str
    study_id: str
    view: str
    image: str
    heatmap: str | None

    @property
    def key(self) -> str:
        """Its place below files/, attention/ and foreground/, without suffix."""
        return f"{study_directory(self.subject_id, self.study_id)}/{self.dicom_id}"

    @property
    def stored(self) -> str:
        return f"files/{self.key}.jpg"

    def heatmaps(self, file_size, size, options, made: Made) -> list[tuple[str, np.ndarray]]:
        """See `datasets.prepare.pixels.make_image`."""
        return [] if self.heatmap is None else [(self.key, read_heatmap(self.heatmap, size))]

    def left_out(self, error: UserError, made: Made) -> list[Exclusion]:
        return [Exclusion(self.dicom_id, "unreadable", str(error), is_fault=True)]


def study_directory(subject_id: str, study_id: str) -> str:
    """Where MIMIC-CXR keeps a study, below files/."""
    return f"p{subject_id[:2]}/p{subject_id}/s{study_id}"


def prepare_mimic(
    images: Path,
    heatmaps: Path | None,
    out: Path,
    *,
    metadata: Path | None = None,
    views: tuple[str, ...] = FRONTAL,
    exclude: Path | None = None,
    size: int = 512,
    dicom_contrast: str = MIMIC_CXR_JPG,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PrepareReport:
    """Build the MIMIC tree in `out`, or finish or check the one that is there: one entry per heatmap whose
    image is of one of the `views` (ViewPosition; "all" takes any); without `heatmaps`, the images of those views.

    `metadata` is mimic-cxr-2.0.0-metadata.csv, .gz or not; by default the one in `images`; for "all" views there
    need be none, subjects and studies are then those of the images' directories. `exclude` names dicom_ids and
    subject_ids to leave out, one a line. Raises `UserError` where nothing sensible can be done; a single bad file
    is reported.
    """
    images, out = resolved(images), resolved(out)
    heatmaps, metadata, exclude = (path and resolved(path) for path in (heatmaps, metadata, exclude))
    if size < 0:
        raise UserError(f"--size {size} is negative; 0 keeps the native size")
    views = ("all",) if "all" in views else tuple(sorted({view.upper() for view in views}))
    excluded = Excluded(exclude)
    options = MimicOptions(
        size=size, views=views, exclude=excluded.digest, heatmaps=heatmaps is not None, dicom_contrast=dicom_contrast
    )
    index = INDEX if heatmaps is not None else IMAGES_INDEX
    making = TreeMaking(out, asdict(options), index=index, overwrite=overwrite, dry_run=dry_run)
    with making:
        found = _find(images, heatmaps, out, metadata, views, excluded)
        make_units(making, found, options, workers)
        counted = {"entries": sum(1 for _ in making.notes())}
        return finish_tree(making, found, lambda: (_entry(unit.task) for unit, _ in making.notes()), counted)


def _find(
    images: Path, heatmaps: Path | None, out: Path, metadata: Path | None, views: tuple[str, ...], excluded: Excluded
) -> Found:
    """The images, joined with their heatmaps and metadata, those that are left out, and a unit for each of the rest."""
    maps: Mapping[str, str] | None = None
    exclusions: list[Exclusion] = []
    notes: list[str] = []
    counts: Counter = Counter()
    without = [out]
    if heatmaps is not None:
        given = find_heatmaps(heatmaps, without=without)
        maps, exclusions, notes = given.paths, given.exclusions, given.notes
        counts["images with heatmaps"] = len(maps) + len(exclusions)
        without.append(heatmaps)
    else:
        notes.append("images without heatmaps: scripts/predict_gaze.py makes them")
    wanted = None if maps is None else dict.fromkeys(maps, "")
    table = metadata or _find_metadata(images, needed="all" not in views)
    if table is not None:
        known = _read_metadata(table, views, notes)
        if maps is not None:
            maps = _as_the_table_writes(maps, known["dicom_id"], exclusions, notes)
        rows = _rows_of_table(table, known, maps, views, exclusions, counts)
        rows = excluded.leave_out(rows, counts)
        wanted = {name: f"files/{study_directory(*row[:2])}/{name}.jpg" for name, row in rows.items()}
        place = find_images(images, wanted, without=without)
    else:
        place = find_images(images, wanted, without=without)
        rows = excluded.leave_out(_rows_of_paths(place.paths, exclusions), counts)
    notes += [*place.notes, *excluded.notes()]
    for name in [*place.ambiguous] if wanted is None else wanted:
        if name in place.ambiguous:
            detail = f"{name}: {place.ambiguous[name]}"
            exclusions.append(Exclusion(name, "several images", detail, is_fault=True))
        elif name not in place.paths and maps is None:
            counts["- image missing"] += 1  # most of the table's, where somebody has a part of the images
        elif name not in place.paths:
            detail = f"no {name}.jpg, .png or .dcm under {images}"
            exclusions.append(Exclusion(name, "image missing", detail))
    units = [
        _unit(MimicTask(name, *row, place.paths[name], maps and maps[name]), images, heatmaps)
        for name, row in rows.items()
        if name in place.paths
    ]
    if not units:
        told = ", ".join(f"{name.removeprefix('- ')}: {n}" for name, n in counts.items())
        faults = "".join(f"; {e.id}: {e.reason}: {e.detail}" for e in exclusions[:3])
        raise UserError(
            f"{images}: no image of view {' or '.join(views)} to make a tree of (<dicom_id>.jpg, .dcm): "
            f"{told or 'none found'}{faults}"
        )
    units.sort(key=lambda unit: unit.key)
    record = {"images": images, "heatmaps": heatmaps, "metadata": table and resolved(table), "exclude": excluded.path}
    return Found(units, counts, exclusions, notes, {name: path and str(path) for name, path in record.items()})


def _unit(task: MimicTask, images: Path, heatmaps: Path | None) -> Unit:
    sources = (task.image,) if task.heatmap is None else (task.image, task.heatmap)
    stamps = tuple(map(stamp, sources))
    names = [source.removeprefix(f"{root}/") for source, root in zip(sources, (images, heatmaps))]
    return Unit(task.key, origin_of(task[:4], names, stamps), task, sources, stamps)


def _entry(task: MimicTask) -> dict[str, str]:
    return {
        "image_path": f"{task.key}.jpg",
        "study_id": task.study_id,
        "reflacx_id": task.dicom_id,
        "subject_id": task.subject_id,
        "dicom_id": task.dicom_id,
        "view": task.view,
        "source": "mimic",
    }


class Excluded:
    """The dicom_ids and subject_ids of a file, one a line, that are to be left out."""

    def __init__(self, path: Path | None):
        self.path, self.ids = path, set()
        self._unused: set[str] = set()
        if path is None:
            return
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: --exclude can't be read ({error})") from None
        for number, line in enumerate(lines, start=1):
            if text := line.partition("#")[0].strip():
                text = check_id(text, f"{path}: line {number}: one dicom_id or subject_id a line, but")
                text = re.sub(r"\.(jpe?g|png|dcm|dicom)$", "", text, flags=re.IGNORECASE)
                self.ids.add(text.casefold())
        self.ids -= {"dicom_id", "subject_id"}  # a header
        if not self.ids:
            raise UserError(f"{path}: --exclude names no dicom_id or subject_id")
        self._unused = set(self.ids)

    @property
    def digest(self) -> str | None:
        return None if self.path is None else f"{len(self.ids)} ids ({origin_of(sorted(self.ids))})"

    def leave_out(self, rows: dict[str, Row], counts: Counter) -> dict[str, Row]:
        kept = {}
        for name, row in rows.items():
            subject = row.subject_id.casefold()
            hit = self.ids.intersection((name.casefold(), subject, f"p{subject}"))
            self._unused -= hit
            if not hit:
                kept[name] = row
        names = (name for name in self._unused if not name.isdigit())
        cut_off = match_ids(names, rows, cut_off=True)
        for name, own in (*cut_off.found.items(), *((n, c[0]) for n, c in cut_off.ambiguous.items())):
            # Left out in silence, it would be trained on.
            raise UserError(f"{self.path}: {name} is no image here, but {own} begins like it: is it cut off?")
        if self.path is not None:
            counts["- of --exclude"] = len(rows) - len(kept)
        return kept

    def notes(self) -> list[str]:
        if not self._unused:
            return []
        named = ", ".join(sorted(self._unused)[:3])
        return [f"{self.path}: {len(self._unused)} of {len(self.ids)} ids are of no image here: {named}"]


def _find_metadata(images: Path, *, needed: bool) -> Path | None:
    found = find_metadata(images)
    if needed and found is None:
        raise UserError(
            f"{images}: no {METADATA_NAMES[0]} in it, which tells frontal from lateral views; "
            "give its path with --metadata, or take any view with --views all"
        )
    return found


def _read_metadata(path: Path, views: Sequence[str], notes: list[str]) -> pd.DataFrame:
    any_view = "all" in views
    required = _ID_COLUMNS if any_view else (*_ID_COLUMNS, _VIEW_COLUMN)
    table = read_table(path, required, text=required)
    twice = table["dicom_id"][table["dicom_id"].str.casefold().duplicated()]
    if not twice.empty:
        raise UserError(f"{path}: line {twice.index[0]}, column 'dicom_id': {twice.iloc[0]} appears twice")
    if not any_view:
        there = set(table[_VIEW_COLUMN].str.upper())
        if unknown := [view for view in views if view not in there and view not in FRONTAL]:
            named = ", ".join(sorted(there - {""}))
            notes.append(f"{path}: no row is of --views {' '.join(unknown)}; there are {named}")
    return table


def _as_the_table_writes(
    maps: Mapping[str, str], known: Collection[str], exclusions: list[Exclusion], notes: list[str]
) -> dict[str, str]:
    """The heatmaps by the ids of the table, which may write them in other letters."""
    match = match_ids(maps, known)
    named: dict[str, str] = {}
    for name, path in maps.items():
        own = match.found.get(name, name)
        if own in named:
            exclusions.append(Exclusion(own, "several heatmaps", f"{named[own]}, {path}", is_fault=True))
        else:
            named[own] = path
    for exclusion in exclusions:
        if exclusion.reason == "several heatmaps":
            named.pop(exclusion.id, None)
    if match.completed:
        notes.append(f"{len(match.completed)} heatmaps have ids in other letters than the metadata")
    return named


def _rows_of_table(
    path: Path,
    table: pd.DataFrame,
    maps: Mapping[str, str] | None,
    views: Sequence[str],
    exclusions: list[Exclusion],
    counts: Counter,
) -> dict[str, Row]:
    """The table's rows of `views` by dicom_id; of heatmaps' images where there are `maps`."""
    any_view = "all" in views
    view = table[_VIEW_COLUMN].fillna("").astype(str) if _VIEW_COLUMN in table else [""] * len(table)
    rows: dict[str, Row] = {}
    seen = set()
    for line, name, subject, study, own in zip(table.index, *(table[c] for c in _ID_COLUMNS), view):
        if maps is not None:
            if name not in maps:
                continue
            seen.add(name)
        if not any_view and own.upper() not in views:
            counts["- other view"] += 1
            continue
        try:
            for column, value in zip(_ID_COLUMNS, (name, subject, study)):
                check_id(value, f"{path}: line {line}, column {column!r}:")
            rows[name] = Row(subject, study, own)
        except UserError as error:
            exclusions.append(Exclusion(name, "unusable metadata row", str(error), is_fault=True))
    exclusions += (Exclusion(name, "not in the metadata", maps[name]) for name in (maps or {}) if name not in seen)
    return rows


def _rows_of_paths(paths: Mapping[str, str], exclusions: list[Exclusion]) -> dict[str, Row]:
    """Subject and study from MIMIC-CXR's own directories, p<subject>/s<study>/<dicom_id>."""
    rows = {}
    for name, path in paths.items():
        match = _PLACE.search(path)
        try:
            check_id(name, f"{path}: the name")
        except UserError as error:
            exclusions.append(Exclusion(name, "unusable name", str(error), is_fault=True))
            continue
        if match:
            rows[name] = Row(match["subject"], match["study"], "")
        else:
            detail = f"{path}: not in p<subject>/s<study>/, and no metadata table tells its subject"
            exclusions.append(Exclusion(name, "subject not known", detail, is_fault=True))
    return rows
