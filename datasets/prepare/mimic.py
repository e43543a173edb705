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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.prepare.heatmaps import find_heatmaps, heatmap_id, read_heatmap
from datasets.prepare.layout import Unit, origin_of, stamp
from datasets.prepare.making import TreeMaking
from datasets.prepare.work import Found, Made, PrepareReport, finish_tree, make_units
from datasets.raw.mimic_cxr import METADATA_NAME, find_images, find_metadata, ids_beginning, why_none
from datasets.raw.readings import Exclusion, first_of
from util.errors import UserError
from util.radiograph import MIMIC_CXR_JPG
from util.tables import check_id, read_table

# As datasets.mimic and datasets.build have them, which import torch.
INDEX, IMAGES_INDEX = "mimic-cxr-jpg-cleanv4.json", "images.json"
FRONTAL = ("AP", "PA")
_ID_COLUMNS = ("dicom_id", "subject_id", "study_id")
_VIEW_COLUMN = "ViewPosition"
_PLACE = re.compile(r"/p(\d+)/s(\d+)/[^/]+$")


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


class MimicTask(NamedTuple):
    """One image to store: what is known of it (`view` is "" if nothing says it), and where it and its heatmap are."""

    dicom_id: str
    subject_id: str
    study_id: str
    view: str
    image: str = ""
    heatmap: str | None = None

    @property
    def key(self) -> str:
        """Its place below files/, attention/ and foreground/, without suffix, as in MIMIC-CXR."""
        return f"p{self.subject_id[:2]}/p{self.subject_id}/s{self.study_id}/{self.dicom_id}"

    @property
    def stored(self) -> str:
        return f"files/{self.key}.jpg"

    @property
    def ids(self) -> list[str]:
        return [self.dicom_id]

    def heatmaps(self, file_size, size, options, made: Made) -> list[tuple[str, np.ndarray]]:
        """See `datasets.prepare.pixels.make_image`."""
        return [] if self.heatmap is None else [(self.key, read_heatmap(self.heatmap, size))]

    def unit(self, images: Path, heatmaps: Path | None) -> Unit:
        sources = (self.image,) if self.heatmap is None else (self.image, self.heatmap)
        stamps = tuple(map(stamp, sources))
        names = [source.removeprefix(f"{root}/") for source, root in zip(sources, (images, heatmaps))]
        return Unit(self.key, origin_of(self[:4], names, stamps), self, sources, stamps)

    def entry(self) -> dict[str, str]:
        return {
            "image_path": f"{self.key}.jpg",
            "study_id": self.study_id,
            "reflacx_id": self.dicom_id,
            "subject_id": self.subject_id,
            "dicom_id": self.dicom_id,
            "view": self.view,
            "source": "mimic",
        }


def prepare_mimic(
    images: Path,
    heatmaps: Path | None,
    out: Path,
    *,
    metadata: Path | None = None,
    views: Iterable[str] = FRONTAL,
    exclude: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> PrepareReport:
    """Build the MIMIC tree in `out`, or finish or check the one that is there: one entry per heatmap whose
    image is of one of the `views` (ViewPosition; "all" takes any); without `heatmaps`, the images of those views.

    `metadata` is mimic-cxr-2.0.0-metadata.csv, .gz or not; by default the one in `images`; for "all" views there
    need be none, subjects and studies are then those of the images' directories. `exclude` names dicom_ids and
    subject_ids to leave out, one a line. `options` are `size` and `dicom_contrast` of `MimicOptions`. Raises `UserError`
    where nothing sensible can be done; a single bad file is reported.
    """
    images, out = images.resolve(), out.resolve()
    heatmaps, metadata, exclude = (path and path.resolve() for path in (heatmaps, metadata, exclude))
    views = ("all",) if "all" in views else tuple(sorted({view.upper() for view in views}))
    excluded = read_excluded(exclude) if exclude else set()
    digest = f"{len(excluded)} ids ({origin_of(sorted(excluded))})" if exclude else None
    chosen = MimicOptions(views=views, exclude=digest, heatmaps=heatmaps is not None, **options)
    index = INDEX if chosen.heatmaps else IMAGES_INDEX
    with TreeMaking(out, asdict(chosen), index=index, overwrite=overwrite, dry_run=dry_run) as making:
        metadata = metadata or find_metadata(images)
        found = Found([], Counter())
        paths = {"images": images, "heatmaps": heatmaps, "metadata": metadata, "exclude": exclude}
        found.record = {name: path and str(path) for name, path in paths.items()}
        tasks = _find(images, heatmaps, out, metadata, views, excluded, found)
        found.units = sorted((task.unit(images, heatmaps) for task in tasks), key=lambda unit: unit.key)
        if not found.units:
            told = ", ".join(f"{name.removeprefix('- ')}: {n}" for name, n in found.counts.items())
            raise UserError(
                f"{images}: no image of view {' or '.join(views)} to make a tree of (<dicom_id>.jpg, .dcm): "
                f"{told or 'none found'}{first_of(found.exclusions)}"
            )
        make_units(making, found, chosen, workers)
        counted = {"entries": sum(1 for _ in making.notes())}
        return finish_tree(making, found, lambda: (unit.task.entry() for unit, _ in making.notes()), counted)


def _find(
    images: Path,
    heatmaps: Path | None,
    out: Path,
    metadata: Path | None,
    views: tuple[str, ...],
    excluded: set[str],
    found: Found,
) -> list[MimicTask]:
    """The images to store, joined with their heatmaps and metadata; counts and what is left out go into `found`."""
    maps, without = None, [out]
    if heatmaps is None:
        found.notes.append("images without heatmaps: scripts/predict_gaze.py makes them")
    else:
        given = find_heatmaps(heatmaps, without=without)
        maps = given.paths
        found.exclusions += [
            Exclusion(name, "several heatmaps", ", ".join(paths), is_fault=True)
            for name, paths in given.ambiguous.items()
        ]
        found.counts["images with heatmaps"] = len(maps) + len(given.ambiguous)
        without.append(heatmaps)
    if metadata is not None:
        tasks = _tasks_of_table(metadata, maps, views, found)
    elif "all" in views:
        wanted = None if maps is None else {heatmap_id(Path(path).stem): "" for path in maps.values()}
        place = find_images(images, wanted, without=without)
        tasks = _tasks_of_paths(place.paths, found)
    else:
        raise UserError(
            f"{images}: no {METADATA_NAME}.gz in it, which has the images' views; "
            "give its path with --metadata, or take any view with --views all"
        )
    tasks = _leave_out(tasks, excluded, found)
    if metadata is not None:
        wanted = {task.dicom_id: task.stored for task in tasks}
        place = find_images(images, wanted, without=without)
    for name in [*place.ambiguous] if wanted is None else wanted:
        several = name in place.ambiguous
        if several or (name not in place.paths and maps is not None):
            reason = "several images" if several else "image missing"
            found.exclusions.append(Exclusion(name, reason, why_none(images, name, place), is_fault=several))
        elif name not in place.paths:
            found.counts["- image missing"] += 1  # most of the table's, where somebody has a part of the images
    return [
        task._replace(image=place.paths[task.dicom_id], heatmap=maps and maps[task.dicom_id.casefold()])
        for task in tasks
        if task.dicom_id in place.paths
    ]


def read_excluded(path: Path) -> set[str]:
    """The dicom_ids and subject_ids of a file, one a line, in small letters."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: --exclude can't be read ({error})") from None
    ids = set()
    for number, line in enumerate(lines, start=1):
        if text := line.partition("#")[0].strip():
            check_id(text, f"{path}: line {number}: one dicom_id or subject_id a line, but")
            ids.add(re.sub(r"\.(jpe?g|png|dcm|dicom)$", "", text.casefold()))
    ids -= {"dicom_id", "subject_id"}  # a header
    if not ids:
        raise UserError(f"{path}: --exclude names no dicom_id or subject_id")
    return ids


def _leave_out(tasks: list[MimicTask], excluded: set[str], found: Found) -> list[MimicTask]:
    """The images without those of `excluded` ids and subjects."""
    if not excluded:
        return tasks
    kept, unused = [], set(excluded)
    for task in tasks:
        subject = task.subject_id.casefold()
        hit = excluded.intersection((task.dicom_id.casefold(), subject, f"p{subject}"))
        unused -= hit
        if not hit:
            kept.append(task)
    # A dicom_id that is cut off would be left out of nothing, and its image trained on.
    known = sorted(task.dicom_id.casefold() for task in kept)
    for name in unused:
        if not name.isdigit() and ids_beginning(name, known):
            raise UserError(f"--exclude: {name} is no image here, but the beginning of one's dicom_id: is it cut off?")
    found.counts["- of --exclude"] = len(tasks) - len(kept)
    if unused:
        named = ", ".join(sorted(unused)[:3])
        found.notes.append(f"--exclude: {len(unused)} of {len(excluded)} ids are of no image here: {named}")
    return kept


def _tasks_of_table(
    path: Path, maps: Mapping[str, str] | None, views: tuple[str, ...], found: Found
) -> list[MimicTask]:
    """The table's rows of `views`; of heatmaps' images if there are `maps`. Letter case does not count."""
    required = _ID_COLUMNS if "all" in views else (*_ID_COLUMNS, _VIEW_COLUMN)
    table = read_table(path, required).reindex(columns=[*_ID_COLUMNS, _VIEW_COLUMN], fill_value="")
    folded, view = table["dicom_id"].str.casefold(), table[_VIEW_COLUMN].str.upper()
    if (twice := folded.duplicated()).any():
        line = folded.index[twice][0]
        raise UserError(f"{path}: line {line}, column 'dicom_id': {table['dicom_id'][line]} appears twice")
    if unknown := {*views} - {"all", *FRONTAL, *view}:
        raise UserError(
            f"{path}: no row is of --views {' '.join(unknown)}; there are {', '.join(sorted({*view} - {''}))}"
        )
    if maps is not None:
        found.exclusions += [Exclusion(name, "not in the metadata", maps[name]) for name in maps.keys() - {*folded}]
        table = table[folded.isin([*maps])]
    if "all" not in views:
        n_all, table = len(table), table[view.isin(views)]
        found.counts["- other view"] = n_all - len(table)
    tasks = []
    for line, *cells in table.itertuples():
        try:
            for column, value in zip(_ID_COLUMNS, cells):
                check_id(value, f"{path}: line {line}, column {column!r}:")
            tasks.append(MimicTask(*cells))
        except UserError as error:
            found.exclusions.append(Exclusion(cells[0], "unusable row", str(error), is_fault=True))
    return tasks


def _tasks_of_paths(paths: Mapping[str, str], found: Found) -> list[MimicTask]:
    """Subject and study from MIMIC-CXR's own directories, p<subject>/s<study>/<dicom_id>."""
    tasks = []
    for name, path in paths.items():
        try:
            check_id(name, f"{path}: the name")
            if not (match := _PLACE.search(path)):
                raise UserError(f"{path}: not in p<subject>/s<study>/, and no metadata table has its subject")
            tasks.append(MimicTask(name, *match.groups(), ""))
        except UserError as error:
            found.exclusions.append(Exclusion(name, "subject not known", str(error), is_fault=True))
    return tasks
