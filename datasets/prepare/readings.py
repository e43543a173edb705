"""From a raw gaze data set and MIMIC-CXR's images to the processed tree that pretraining reads.

The tree (`out`), beside what `datasets.prepare.making` keeps in it:
- reflacx.json: list of entries, see `datasets.prepare.entries`; written last, so that a tree with it is complete;
- images/<study_id>/<dicom_id>.png, attention/ and foreground/<study_id>/<reflacx_id>.png, 8-bit gray,
  all three of the same size (PNG for the images too: JPG of quality 95 takes two fifths of the room, but
  moves the finest HOG target of a real film by 10% of its energy);
- fixations.csv: reflacx_id, x, y (in 0..1 of the image), duration (s) of all fixations in the image, in the order
  of the entries;
- prepare.json: options, versions, counts and every reading left out, with the reason.

The unit of work is one image with all its readings; it is decoded once and no two processes write
the same file. Nothing depends on the number of processes or on where an earlier run stopped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets.prepare.entries import entry, entry_id, stored_image
from datasets.prepare.layout import Unit, origin_of, stamp
from datasets.prepare.making import TreeMaking
from datasets.prepare.reading_maps import ReadingsTask
from datasets.prepare.work import Found, PrepareReport, finish_tree, make_units
from datasets.raw.egd import DEFAULT_SIGMA, find_egd_root, read_egd
from datasets.raw.image_index import FoundImages, find_images, find_metadata
from datasets.raw.readings import Exclusion, RawReadings, Reading, is_simulated
from datasets.raw.reflacx import find_root, read_reflacx
from datasets.raw.walk import resolved
from util.errors import UserError
from util.radiograph import MIMIC_CXR_JPG

INDEX, FIXATIONS = "reflacx.json", "fixations.csv"

# Data set -> (whether a directory holds it, its reader). A further data set is one more line here.
SOURCES: dict[str, tuple[Callable[[Path], Path | None], Callable[..., RawReadings]]] = {
    "reflacx": (find_root, read_reflacx),
    "egd": (find_egd_root, read_egd),
}


@dataclass(frozen=True)
class Options:
    """What decides the pixels and names in the tree; a tree is made with one set of them.

    `size`: short side of the stored images, px, 0 = native; never enlarged. `readings`: one (the
    first usable by id), each, or merge. `split`: of the readings taken, or all. `sigma`: EGD-CXR's Gaussian, px of
    the original image (REFLACX brings its own). `dicom_contrast`: one of `util.radiograph.CONTRASTS`.
    `screen_filter`: without fixations on the
    screen beside the image.
    """

    source: str
    size: int = 512
    readings: str = "one"
    split: str = "all"
    sigma: float | None = None
    dicom_contrast: str = MIMIC_CXR_JPG
    screen_filter: bool = False


def detect_source(raw: Path) -> str:
    """Name of the data set that `raw` holds."""
    if not raw.is_dir():
        raise UserError(f"{raw}: no such directory; --raw is the root of the gaze data set")
    names = [name for name, (find, _) in SOURCES.items() if find(raw) is not None]
    if len(names) > 1:
        raise UserError(f"{raw}: holds {' and '.join(names)}; give the root of one of them as --raw")
    if names:
        return names[0]
    raise UserError(
        f"{raw}: neither REFLACX (main_data/metadata_phase_*.csv) nor EGD-CXR (master_sheet.csv) is here "
        "or one directory below"
    )


def prepare(
    raw: Path,
    images: Path,
    out: Path,
    *,
    source: str | None = None,
    size: int = 512,
    readings: str = "one",
    split: str = "all",
    sigma: float | None = None,
    metadata: Path | None = None,
    dicom_contrast: str = MIMIC_CXR_JPG,
    screen_filter: bool = False,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PrepareReport:
    """Build the processed tree in `out`, or finish or check the one that is there.

    Raises `UserError` where nothing sensible can be done; a single bad file or reading is reported.
    """
    # The record is the same from wherever it is run and however a path is spelt.
    raw, images, out = resolved(raw), resolved(images), resolved(out)
    metadata = metadata and resolved(metadata)
    source = source or detect_source(raw)
    if size < 0:
        raise UserError(f"--size {size} is negative; 0 keeps the native size")
    if screen_filter and source != "reflacx":
        raise UserError(f"--screen_filter needs REFLACX's columns of the screen, which {source} has not")
    reader_options = egd_options(source, sigma, metadata, images)
    options = Options(
        source,
        size,
        readings,
        split,
        dicom_contrast=dicom_contrast,
        screen_filter=screen_filter,
        sigma=reader_options.get("sigma"),
    )
    making = TreeMaking(out, asdict(options), index=INDEX, overwrite=overwrite, dry_run=dry_run)
    with making:
        raw_readings = SOURCES[source][1](raw, **reader_options)
        chosen = {reading.id: reading for reading in raw_readings.readings if split in ("all", reading.split)}
        found = _find(raw, images, out, split, raw_readings, chosen)
        make_units(making, found, options, workers)

        samples = sorted(
            (
                ([chosen[name] for name in group], text)
                for _, note in making.notes()
                for group, text in zip(note["used"], note["fixations"])
            ),
            key=lambda sample: entry_id(sample[0]),
        )
        if not overwrite:
            _refuse_other_readings(
                out, [group for group, _ in samples], chosen.keys() - {e.id for e in found.exclusions}
            )
        left_out, bad = _left_out_fixations(making)
        found.notes += _tell(bad)
        found.record |= {"metadata": (table := reader_options.get("metadata")) and str(table), "bad_fixations": bad}
        mark = {"simulated": True} if is_simulated(SOURCES[source][0](raw)) else {}
        n_other_split = len(raw_readings.readings) - len(chosen)
        n_used = sum(len(group) for group, _ in samples)
        n_spare = raw_readings.n_found - len(found.exclusions) - n_other_split - n_used
        return finish_tree(
            making,
            found,
            lambda: (entry(group) | mark for group, _ in samples),
            {
                "- of another split": n_other_split,
                "- further readings of an image, not needed": n_spare,
                "readings used": n_used,
                "images": len({stored_image(group[0]) for group, _ in samples}),
                "entries": len(samples),
                **{f"fixations left out: {reason}": n for reason, n in sorted(left_out.items())},
            },
            {FIXATIONS: lambda: _fixation_table(samples)},
        )


def _find(
    raw: Path, images: Path, out: Path, split: str, raw_readings: RawReadings, chosen: Mapping[str, Reading]
) -> Found:
    """The images of the readings, those that are left out, and a unit for each image that is there."""
    if not chosen:
        raise UserError(f"{raw}: {raw_readings.none_of(split)}")
    place = find_images(images, {r.image_id: r.image_path for r in chosen.values()}, without=[out])
    found = Found(
        _units(chosen.values(), place, images),
        {"readings found": raw_readings.n_found},
        [*raw_readings.exclusions, *without_image(chosen.values(), place, images)],
        [*raw_readings.notes, *place.notes],
        {"raw": str(raw), "images": str(images)},
    )
    if not found.units:
        raise UserError(
            f"{images}: holds none of the {len(chosen)} readings' images (<dicom_id>.jpg, .dcm)"
            f"{''.join(f'; {exclusion.detail}' for exclusion in found.exclusions if exclusion.is_fault)}"
        )
    return found


def egd_options(source: str, sigma: float | None, metadata: Path | None, images: Path | None) -> dict[str, Any]:
    """What `read_egd` is given; UserError for options that another data set has no need of."""
    if source == "egd":
        return {
            "sigma": DEFAULT_SIGMA if sigma is None else sigma,
            "metadata": metadata or (images and find_metadata(images)),
        }
    if sigma is not None:
        raise UserError(f"--sigma {sigma:g}: is for EGD-CXR; {source} brings its own angular resolution")
    if metadata is not None:
        raise UserError(f"--metadata {metadata}: is for EGD-CXR; {source} records the sizes of its images")
    return {}


def _refuse_other_readings(out: Path, groups: Sequence[Sequence[Reading]], usable: Collection[str]) -> None:
    """UserError where the finished tree has entries of `usable` readings that other readings take the place of now."""
    try:
        entries = json.loads((out / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no finished tree
        return
    now = {tuple(reading.id for reading in group): group[0].image_id for group in groups}
    for old in entries:
        if (ids := tuple(old["raw_ids"])) not in now and usable >= set(ids):
            others = ", ".join(name for own, image in now.items() if image == old["dicom_id"] for name in own)
            raise UserError(
                f"{out}: has image {old['dicom_id']} with reading {', '.join(ids)}, and is to have it with {others} now, "
                "which can be used or was added since; choose another --out, or --overwrite to make the tree afresh"
            )


def _left_out_fixations(making: TreeMaking) -> tuple[Counter, list[str]]:
    """How many fixations of the readings used were left out, by reason, and the damaged ones, each named."""
    left_out: Counter = Counter()
    bad: list[str] = []
    for _, note in making.notes():
        left_out.update(note.get("left_out", {}))
        bad += note.get("bad", [])
    return left_out, sorted(bad)


def _tell(bad: Sequence[str]) -> list[str]:
    more = f"; the other {len(bad) - 1} are listed in prepare.json" if len(bad) > 1 else ""
    return [f"{len(bad)} bad fixations were left out: {bad[0]}{more}"] if bad else []


def _units(chosen: Iterable[Reading], place: FoundImages, images: Path) -> list[Unit]:
    """One for each image that is there, with all its readings."""
    by_image: dict[str, list[Reading]] = {}
    for reading in chosen:
        if reading.image_id in place.paths:
            by_image.setdefault(reading.image_id, []).append(reading)
    units = []
    for image_id, group in by_image.items():
        path = place.paths[image_id]
        sources = (path, *dict.fromkeys(str(reading.fixations_path) for reading in group))
        stamps = tuple(map(stamp, sources))
        own = [reading.origin() for reading in group]
        origin = origin_of(path.removeprefix(f"{images}/"), stamps[0], own)
        units.append(Unit(image_id, origin, ReadingsTask(path, group), sources, stamps))
    return units


def without_image(chosen: Iterable[Reading], place: FoundImages, images: Path) -> Iterator[Exclusion]:
    """Readings whose images were not found, or found more than once."""
    for reading in chosen:
        if reading.image_id in place.ambiguous:
            detail = f"{reading.image_id}: {place.ambiguous[reading.image_id]}"
            yield Exclusion(reading.id, "several images", detail, is_fault=True)
        elif reading.image_id not in place.paths:
            yield Exclusion(reading.id, "image missing", f"no {reading.image_id}.jpg, .png or .dcm under {images}")


def _fixation_table(samples: Iterable[tuple[Sequence[Reading], str]]) -> Iterator[str]:
    yield "reflacx_id,x,y,duration\n"
    for group, text in samples:
        name = entry_id(group)
        yield from (f"{name},{line}\n" for line in text.splitlines())
