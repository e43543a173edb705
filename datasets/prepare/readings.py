"""From a raw gaze data set and MIMIC-CXR's images to the processed tree that pretraining reads.

The tree (`out`), beside what `datasets.prepare.store` keeps in it:
- reflacx.json: list of entries, see `entry`; written last, so that a tree with it is complete;
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

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from datasets.fixations import fixation_heatmap, inside_image, merge_heatmaps
from datasets.prepare.store import TreeMaking
from datasets.prepare.units import Made, Report, Unit, origin_of, stamp
from datasets.prepare.work import make_units
from datasets.raw.findings import merge_findings, unify
from datasets.raw.mimic_cxr import find_images, no_image
from datasets.raw.readings import Exclusion, Fixations, Reading
from datasets.raw.sources import read_raw
from util.errors import UserError
from util.radiograph import MIMIC_CXR_JPG

INDEX, FIXATIONS = "reflacx.json", "fixations.csv"


@dataclass(frozen=True)
class Options:
    """What decides the pixels and names in the tree; a tree is made with one set of them.

    `size`: short side of the stored images, px, 0 = native; never enlarged. `readings`: one (the
    first usable by id), each, or merge. `split`: of the readings taken, or all. `sigma`: EGD-CXR's Gaussian, px of
    the original image (REFLACX brings its own). `dicom_contrast`: one of `util.radiograph.CONTRASTS`.
    """

    source: str
    size: int = 512
    readings: str = "one"
    split: str = "all"
    sigma: float | None = None
    dicom_contrast: str = MIMIC_CXR_JPG


def prepare(
    raw: Path,
    images: Path,
    out: Path,
    *,
    sigma: float | None = None,
    metadata: Path | None = None,
    workers: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> Report:
    """Build the processed tree in `out`, or finish or check the one that is there; `options` are those of `Options`.

    Raises `UserError` where nothing sensible can be done; a single bad file or reading is reported.
    """
    # The record is the same from wherever it is run and however a path is spelt.
    raw, images, out = raw.resolve(), images.resolve(), out.resolve()
    gaze = read_raw(raw, images, sigma=sigma, metadata=metadata and metadata.resolve())
    chosen = Options(gaze.source, sigma=gaze.options.get("sigma"), **options)
    with TreeMaking(out, asdict(chosen), index=INDEX, overwrite=overwrite, dry_run=dry_run).running() as making:
        readings = gaze.of_split(chosen.split)
        record = {"raw": raw, "images": images, "metadata": gaze.options.get("metadata")}
        report = Report([], {"readings found": gaze.n_found}, [*gaze.exclusions], gaze.notes, record)
        hints = {reading.image_id: reading.image_path for reading in readings.values()}
        place = find_images(images, hints, without=[out])
        groups: dict[str, list[Reading]] = {}
        for reading in readings.values():
            groups.setdefault(reading.image_id, []).append(reading)
        for image_id, group in groups.items():
            if path := place.paths.get(image_id):
                sources = (path, *dict.fromkeys(str(reading.fixations_path) for reading in group))
                stamps = tuple(map(stamp, sources))
                origin = origin_of(path.removeprefix(f"{images}/"), stamps[0], [reading.origin() for reading in group])
                report.units.append(Unit(image_id, origin, ReadingsTask(group), sources, stamps))
            else:
                report.exclusions += [no_image(reading.id, image_id, place, images) for reading in group]
        make_units(making, report, chosen, workers)

        notes = [note for _, note in making.notes()]
        samples = [
            ([readings[name] for name in names], rows)
            for note in notes
            for names, rows in zip(note["used"], note["fixations"])
        ]
        samples.sort(key=lambda sample: entry_id(sample[0]))
        left_out = sum((Counter(note.get("left_out", {})) for note in notes), Counter())
        bad = sorted(text for note in notes for text in note.get("bad", ()))
        if bad:
            report.notes.append(f"{len(bad)} bad fixations were left out, listed in prepare.json, such as {bad[0]}")
        report.record["bad_fixations"] = bad
        mark = {"simulated": True} if gaze.simulated else {}
        n_other_split, n_used = len(gaze.readings) - len(readings), sum(len(group) for group, _ in samples)
        n_spare = gaze.n_found - len(report.exclusions) - n_other_split - n_used
        counted = {
            "- of another split": n_other_split,
            "- further readings of an image, not needed": n_spare,
            "readings used": n_used,
            "images": len(notes),
            "entries": len(samples),
            **{f"fixations left out: {reason}": n for reason, n in sorted(left_out.items())},
        }
        rows = (f"{entry_id(group)},{row}" for group, text in samples for row in text.splitlines())
        entries = (entry(group) | mark for group, _ in samples)
        return making.finish(entries, counted, **{FIXATIONS: chain(["reflacx_id,x,y,duration"], rows)})


# --- one image with all its readings ---------------------------------------------------------------


@dataclass(frozen=True)
class ReadingsTask:
    """One image to store: all its readings, in the order of their ids."""

    readings: list[Reading]

    @property
    def stored(self) -> str:
        return stored_image(self.readings[0])

    @property
    def ids(self) -> list[str]:
        return [reading.id for reading in self.readings]

    def heatmaps(self, sources, file_size, size, options, made: Made) -> list[tuple[str, np.ndarray]]:
        """See `datasets.prepare.pixels.make_image`; `options` are `Options`.

        The note has, for each entry, the ids of its readings ("used") and its fixations, "x,y,duration" a line, x and y
        in 0..1 of the image; and of all its readings how many fixations were left out by reason ("left_out"), and the
        damaged ones ("bad").
        """
        mapped, left_out, bad = [], Counter(), []
        for reading in self.readings:
            gaze = reading_gaze(reading, sources[0], file_size, size)
            if isinstance(gaze, Exclusion):
                made.exclusions.append(gaze)
                continue
            fixations, heatmap = gaze
            mapped.append((reading, _fixation_rows(fixations.table, reading.image_size), heatmap))
            left_out.update(fixations.left_out)
            bad += [f"{reading.id}: {text}" for text in fixations.bad]
            if options.readings == "one":
                break
        made.note |= {"used": [], "fixations": []} | ({"left_out": left_out, "bad": bad} if left_out else {})
        merged = []
        for group in [mapped] if options.readings == "merge" and mapped else [[one] for one in mapped]:
            readings, rows, heatmaps = zip(*group)
            if len(splits := {str(reading.split) for reading in readings}) > 1:
                raise UserError(
                    f"to be merged, but of the splits {' and '.join(sorted(splits))}; choose one with --split"
                )
            made.note["used"].append([reading.id for reading in readings])
            made.note["fixations"].append("".join(rows))
            merged.append((f"{readings[0].study_id}/{entry_id(readings)}", merge_heatmaps(heatmaps)))
        return merged


def reading_gaze(
    reading: Reading, path: str | os.PathLike, file_size: tuple[int, int], out_size: tuple[int, int]
) -> tuple[Fixations, np.ndarray] | Exclusion:
    """Usable fixations of one reading, see `Reading.load_fixations`, and its gaze map, float64 [H, W] of `out_size`; or
    why there is none. Sizes are (height, width); the image's file may be a scaled copy."""
    reason, where = "image size differs", path
    try:
        reading.check_copy(file_size)
        reason, where = "unusable fixations", reading.fixations_path
        found = reading.load_fixations()
        if inside_image(found.table, reading.image_size).any():
            return found, fixation_heatmap(found.table, reading.image_size, out_size)
    except UserError as error:
        named = "" if str(where) in str(error) else f"{where}: "
        return Exclusion(reading.id, reason, f"{named}{error}", is_fault=True)
    if found.table.empty:
        detail = f"{where}: none that can be used {dict(found.left_out) or ''}".rstrip()
        return Exclusion(reading.id, "no fixations", detail)
    return Exclusion(reading.id, "all fixations outside", f"{where}: all {len(found.table)} lie outside the image")


def _fixation_rows(fixations: pd.DataFrame, size: tuple[int, int]) -> str:
    """x,y,duration of the fixations in the image, a line each; (0, 0) is the centre of the top left pixel."""
    own = fixations[inside_image(fixations, size)]
    x, y = (own["x"] + 0.5) / size[1], (own["y"] + 0.5) / size[0]
    return "".join(f"{a:.6f},{b:.6f},{c:.6g}\n" for a, b, c in zip(x, y, own["duration"]))


# --- the entries -----------------------------------------------------------------------------------


def stored_image(reading: Reading) -> str:
    """Where a tree has the image of a reading."""
    return f"images/{reading.study_id}/{reading.image_id}.png"


def entry_id(readings: Sequence[Reading]) -> str:
    """`reflacx_id` of an entry: its reading's id; of several the first one's + how many more ("P101R000001+4")."""
    return readings[0].id if len(readings) == 1 else f"{readings[0].id}+{len(readings) - 1}"


def entry(readings: Sequence[Reading]) -> dict[str, Any]:
    """Entry of reflacx.json for one reading, or for several merged, in the order of their ids.

    `raw_ids` lists the readings. `labels` are the common findings of datasets/raw/findings.py. Of merged
    readings `phase` is the first one's.
    """
    first = readings[0]
    labels = [unify(reading.labels) for reading in readings]
    return {
        "image_path": stored_image(first),
        "study_id": first.study_id,
        "reflacx_id": entry_id(readings),
        "raw_ids": [reading.id for reading in readings],
        "dicom_id": first.image_id,
        "subject_id": first.subject_id,
        "phase": first.phase,
        "split": first.split,
        "source": first.source,
        "labels": labels[0] if len(labels) == 1 else merge_findings(labels),
    }
