"""From MIMIC-CXR to the MIMIC tree of pretraining, with heatmaps made elsewhere, or images alone.

The tree (`out`), read by `datasets.mimic.Mimic` and by the published loader, beside what `datasets.prepare.store`
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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets.prepare.heatmaps import find_heatmaps, heatmap_id, read_heatmap
from datasets.prepare.store import TreeMaking
from datasets.prepare.units import Made, Report, Unit, origin_of, stamp
from datasets.prepare.work import make_units
from datasets.raw.mimic_cxr import METADATA_NAME, find_images, find_metadata, ids_beginning, no_image
from datasets.raw.readings import Exclusion
from util.errors import UserError
from util.radiograph import MIMIC_CXR_JPG
from util.tables import check_id, read_table

# As datasets.mimic and datasets.build have them, which import torch.
INDEX, IMAGES_INDEX = "mimic-cxr-jpg-cleanv4.json", "images.json"
FRONTAL = ("AP", "PA")
_COLUMNS = ("dicom_id", "subject_id", "study_id", "ViewPosition")
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
    """One image to store; `view` is "" if nothing says it. The sources of its `Unit` are its file and its heatmap's."""

    dicom_id: str
    subject_id: str
    study_id: str
    view: str

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

    def heatmaps(self, sources, file_size, size, options, made: Made) -> list[tuple[str, np.ndarray]]:
        """See `datasets.prepare.pixels.make_image`."""
        return [(self.key, read_heatmap(path, size)) for path in sources[1:]]

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
) -> Report:
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
    index = INDEX if heatmaps else IMAGES_INDEX
    with TreeMaking(out, asdict(chosen), index=index, overwrite=overwrite, dry_run=dry_run).running() as making:
        metadata = metadata or find_metadata(images)
        record = {"images": images, "heatmaps": heatmaps, "metadata": metadata, "exclude": exclude}
        report = Report([], {}, record=record)
        maps, without = None, [out]
        if heatmaps is None:
            report.notes.append("images without heatmaps: scripts/predict_gaze.py makes them")
        else:
            given = find_heatmaps(heatmaps, without=without)
            maps = given.paths
            for name, several in given.ambiguous.items():
                report.exclusions.append(Exclusion(name, "several heatmaps", ", ".join(several), is_fault=True))
            report.counts["images with heatmaps"] = len(maps) + len(given.ambiguous)
            without.append(heatmaps)

        if metadata is not None:
            tasks = _leave_out(_tasks_of_table(metadata, maps, views, report), excluded, report)
            wanted = {task.dicom_id: task.stored for task in tasks}
            place = find_images(images, wanted, without=without)
        elif "all" in views:
            place = find_images(images, None, without=without)
            wanted = place.ambiguous if maps is None else maps
            tasks = _leave_out(_tasks_of_paths(place.paths, maps), excluded, report)
        else:
            raise UserError(
                f"{images}: no {METADATA_NAME}.gz in it, which has the images' views; "
                "give its path with --metadata, or take any view with --views all"
            )
        missing = [name for name in wanted if name not in place.paths]
        told = [name for name in missing if heatmaps or name in place.ambiguous]
        report.exclusions += [no_image(name, name, place, images) for name in told]
        if len(missing) > len(told):  # most of the table's, where somebody has a part of the images
            report.counts["- image missing"] = len(missing) - len(told)

        for task in sorted(tasks, key=lambda task: task.key):
            if image := place.paths.get(task.dicom_id):
                sources = {image: images} | ({maps[task.dicom_id.casefold()]: heatmaps} if heatmaps else {})
                stamps = tuple(map(stamp, sources))
                names = [source.removeprefix(f"{root}/") for source, root in sources.items()]
                report.units.append(Unit(task.key, origin_of(task, names, stamps), task, (*sources,), stamps))
        make_units(making, report, chosen, workers)
        tasks = [unit.task for unit, _ in making.notes()]
        return making.finish((task.entry() for task in tasks), {"entries": len(tasks)})


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
            ids.add(heatmap_id(text).casefold())
    ids -= {"dicom_id", "subject_id"}  # a header
    if not ids:
        raise UserError(f"{path}: --exclude names no dicom_id or subject_id")
    return ids


def _leave_out(tasks: list[MimicTask], excluded: set[str], report: Report) -> list[MimicTask]:
    """The images without those of `excluded` ids and subjects."""
    if not excluded:
        return tasks
    own = [f"{task.dicom_id} {task.subject_id} p{task.subject_id}".casefold().split() for task in tasks]
    kept = [task for task, ids in zip(tasks, own) if excluded.isdisjoint(ids)]
    unused = sorted(excluded.difference(*own))
    # A dicom_id that is cut off would be left out of nothing, and its image trained on.
    known = sorted(ids[0] for ids in own)
    if cut := [name for name in unused if not name.isdigit() and ids_beginning(name, known)]:
        raise UserError(f"--exclude: {cut[0]} is no image here, but the beginning of one's dicom_id: is it cut off?")
    report.counts["- of --exclude"] = len(tasks) - len(kept)
    if unused:
        named = ", ".join(unused[:3])
        report.notes.append(f"--exclude: {len(unused)} of {len(excluded)} ids are of no image here: {named}")
    return kept


def _tasks_of_table(
    path: Path, maps: Mapping[str, str] | None, views: tuple[str, ...], report: Report
) -> list[MimicTask]:
    """The table's rows of `views`; of heatmaps' images if there are `maps`. Letter case does not count."""
    required = _COLUMNS[:3] if "all" in views else _COLUMNS
    table = read_table(path, required).reindex(columns=_COLUMNS, fill_value="")
    folded, view = table["dicom_id"].str.casefold(), table["ViewPosition"].str.upper()
    if (twice := table[folded.duplicated()]).size:
        raise UserError(f"{path}: line {twice.index[0]}, column 'dicom_id': {twice.iloc[0, 0]} appears twice")
    if unknown := {*views} - {"all", *FRONTAL, *view}:
        known = ", ".join(sorted({*view} - {""}))
        raise UserError(f"{path}: no row has the view {' '.join(unknown)} of --views; there are {known}")
    if maps is not None:
        report.exclusions += [Exclusion(name, "not in the metadata", maps[name]) for name in maps.keys() - {*folded}]
        table = table[folded.isin([*maps])]
    if "all" not in views:
        n_all, table = len(table), table[view[table.index].isin(views)]
        report.counts["- other view"] = n_all - len(table)
    for column in _COLUMNS[:3]:
        for line, value in table[column].items():
            check_id(value, f"{path}: line {line}, column {column!r}:")
    return [MimicTask(*row) for row in table.itertuples(index=False)]


def _tasks_of_paths(paths: Mapping[str, str], maps: Mapping[str, str] | None) -> list[MimicTask]:
    """Subject and study from MIMIC-CXR's own directories, p<subject>/s<study>/<dicom_id>."""
    tasks = []
    for name in paths if maps is None else paths.keys() & maps.keys():
        if not (match := _PLACE.search(paths[name])):
            raise UserError(f"{paths[name]}: not in p<subject>/s<study>/, and no metadata table has its subject")
        tasks.append(MimicTask(name, *match.groups(), ""))
    return tasks
