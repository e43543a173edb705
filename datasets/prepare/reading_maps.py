"""One image with all its readings: from the files of a raw data set to the files of a tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.prepare.entries import entry_id, stored_image
from datasets.prepare.pixels import attention_maps, count_significant, resize_gray, scaled_size, write_image
from datasets.prepare.work import Made
from datasets.raw.readings import MAX_BAD, Exclusion, Fixations, Reading
from util.errors import UserError
from util.gaze import fixation_heatmap, inside_image, merge_heatmaps
from util.radiograph import radiograph_size, read_radiograph


def make_image(task: tuple[str, list[Reading]], *, out: Path | None, options) -> Made:
    """Write one image and the maps of its readings below `out`; with None, check all but the image's pixels.

    `options` is `datasets.prepare.readings.Options`. The note has, for each entry, the ids of its readings
    ("used"), its significant patches and its fixations, "x,y,duration" a line, x and y in 0..1 of the image; and of all
    its readings how many fixations were left out by reason ("left_out"), and the damaged ones ("bad").
    """
    path, readings = Path(task[0]), task[1]
    made = Made(note={"used": [], "significant": [], "fixations": []})
    try:
        file_size = radiograph_size(path)
    except UserError as error:
        return _leave_out(made, readings, "image unreadable", error)
    out_size = scaled_size(file_size, options.size)

    mapped: list[tuple[Reading, Fixations, np.ndarray]] = []
    for reading in readings:
        with made.timed("heatmaps"):
            found = reading_gaze(
                reading,
                path,
                file_size,
                out_size,
                max_bad=options.max_bad_fixations,
                screen_filter=options.screen_filter,
            )
        if isinstance(found, Exclusion):
            made.exclusions.append(found)
            continue
        mapped.append((reading, *found))
        if options.readings == "one":
            break
    if not mapped:
        return made
    used = [reading for reading, _, _ in mapped]
    if options.readings == "merge" and len({reading.split for reading in used}) > 1:
        splits = ", ".join(f"{reading.id} {reading.split}" for reading in used)
        error = UserError(f"{splits}: to be merged, but of different splits; choose one with --split")
        return _leave_out(made, used, "splits differ", error)

    if out is not None:
        try:
            with made.timed("decoding"):
                gray = read_radiograph(path, options.dicom_contrast)
        except UserError as error:
            return _leave_out(made, used, "image unreadable", error)
        with made.timed("resizing"):
            gray = resize_gray(gray, out_size)
        with made.timed("writing images"):
            write_image(out / stored_image(used[0]), gray)
    made.files.append(stored_image(used[0]))
    left_out = sum((Counter(fixations.left_out) for _, fixations, _ in mapped), Counter())
    if left_out:
        made.note["left_out"] = dict(left_out)
        made.note["bad"] = [f"{reading.id}: {text}" for reading, fixations, _ in mapped for text in fixations.bad]
    for group in [mapped] if options.readings == "merge" else [[one] for one in mapped]:
        own = [reading for reading, _, _ in group]
        with made.timed("foreground"):
            attention, foreground = attention_maps(merge_heatmaps([heatmap for _, _, heatmap in group]))
        made.note["used"].append([reading.id for reading in own])
        made.note["significant"].append(count_significant(foreground))
        made.note["fixations"].append(
            "".join(
                _fixation_rows(fixations.table, reading.original_size(file_size)) for reading, fixations, _ in group
            )
        )
        for kind, pixels in (("attention", attention), ("foreground", foreground)):
            name = f"{kind}/{own[0].study_id}/{entry_id(own)}.png"
            made.files.append(name)
            if out is not None:
                with made.timed("writing maps"):
                    write_image(out / name, pixels)
    return made


def reading_gaze(
    reading: Reading,
    path: Path,
    file_size: tuple[int, int],
    out_size: tuple[int, int],
    *,
    max_bad: float = MAX_BAD,
    screen_filter: bool = False,
) -> tuple[Fixations, np.ndarray] | Exclusion:
    """Usable fixations of one reading, see `Reading.load_fixations`, and its gaze map, float64 [H, W] of `out_size`; or
    why there is none. Sizes are (height, width); the file may be a scaled copy, see `Reading.original_size`."""
    try:
        size = reading.original_size(file_size)
    except UserError as error:
        return Exclusion(reading.id, "image size differs", f"{path}: {error}", is_fault=True)
    try:
        found = replace(reading, image_size=size).load_fixations(max_bad=max_bad, screen_filter=screen_filter)
        lasting = found.table
        if lasting.empty:
            told = ", ".join(f"{reason}: {n}" for reason, n in found.left_out.items())
            detail = f"{reading.fixations_path}: none that can be used{told and f' ({told})'}"
            return Exclusion(reading.id, "no fixations", detail)
        if not inside_image(lasting, size).any():
            detail = f"{reading.fixations_path}: all {len(lasting)} lie outside the image"
            return Exclusion(reading.id, "all fixations outside", detail)
        return found, fixation_heatmap(lasting, size, out_size)
    except UserError as error:
        where = "" if str(reading.fixations_path) in str(error) else f"{reading.fixations_path}: "
        return Exclusion(reading.id, "unusable fixations", f"{where}{error}", is_fault=True)


def _fixation_rows(fixations: pd.DataFrame, size: tuple[int, int]) -> str:
    """x,y,duration of the fixations in the image, a line each; (0, 0) is the centre of the top left pixel."""
    own = fixations[inside_image(fixations, size)]
    x, y = (own["x"] + 0.5) / size[1], (own["y"] + 0.5) / size[0]
    return "".join(f"{a:.6f},{b:.6f},{c:.6g}\n" for a, b, c in zip(x, y, own["duration"]))


def _leave_out(made: Made, readings: Sequence[Reading], reason: str, error: UserError) -> Made:
    made.exclusions += [Exclusion(reading.id, reason, str(error), is_fault=True) for reading in readings]
    return made
