"""One image with all its readings: from the files of a raw data set to heatmaps."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from datasets.fixations import fixation_heatmap, inside_image, merge_heatmaps
from datasets.prepare.entries import entry_id, stored_image
from datasets.prepare.work import Made
from datasets.raw.readings import Exclusion, Fixations, Reading
from util.errors import UserError


@dataclass(frozen=True)
class ReadingsTask:
    """One image to store, and all its readings, in the order of their ids."""

    image: str
    readings: list[Reading]

    @property
    def stored(self) -> str:
        return stored_image(self.readings[0])

    def heatmaps(self, file_size, size, options, made: Made) -> list[tuple[str, np.ndarray]] | None:
        """See `datasets.prepare.pixels.make_image`; `options` are `datasets.prepare.readings.Options`.

        The note has, for each entry, the ids of its readings ("used") and its fixations, "x,y,duration" a line, x and y
        in 0..1 of the image; and of all its readings how many fixations were left out by reason ("left_out"), and the
        damaged ones ("bad").
        """
        mapped: list[tuple[Reading, Fixations, np.ndarray]] = []
        for reading in self.readings:
            found = reading_gaze(reading, self.image, file_size, size, screen_filter=options.screen_filter)
            if isinstance(found, Exclusion):
                made.exclusions.append(found)
                continue
            mapped.append((reading, *found))
            if options.readings == "one":
                break
        groups = [mapped] if options.readings == "merge" and mapped else [[one] for one in mapped]
        made.note["used"] = [[reading.id for reading, _, _ in group] for group in groups]
        if not mapped:
            return None
        if len({reading.split for reading, _, _ in groups[0]}) > 1:
            splits = ", ".join(f"{reading.id} {reading.split}" for reading, _, _ in mapped)
            error = UserError(f"{splits}: to be merged, but of different splits; choose one with --split")
            made.exclusions += self.left_out(error, made, "splits differ")
            return None
        made.note["fixations"] = [
            "".join(
                _fixation_rows(fixations.table, reading.original_size(file_size)) for reading, fixations, _ in group
            )
            for group in groups
        ]
        left_out = sum((Counter(fixations.left_out) for _, fixations, _ in mapped), Counter())
        if left_out:
            made.note["left_out"] = dict(left_out)
            made.note["bad"] = [f"{reading.id}: {text}" for reading, fixations, _ in mapped for text in fixations.bad]
        return [
            (
                f"{group[0][0].study_id}/{entry_id([reading for reading, _, _ in group])}",
                merge_heatmaps([heatmap for _, _, heatmap in group]),
            )
            for group in groups
        ]

    def left_out(self, error: UserError, made: Made, reason: str = "image unreadable") -> list[Exclusion]:
        groups = made.note.get("used", [[reading.id for reading in self.readings]])
        return [Exclusion(name, reason, str(error), is_fault=True) for group in groups for name in group]


def reading_gaze(
    reading: Reading,
    path: str | os.PathLike,
    file_size: tuple[int, int],
    out_size: tuple[int, int],
    *,
    screen_filter: bool = False,
) -> tuple[Fixations, np.ndarray] | Exclusion:
    """Usable fixations of one reading, see `Reading.load_fixations`, and its gaze map, float64 [H, W] of `out_size`; or
    why there is none. Sizes are (height, width); the file may be a scaled copy, see `Reading.original_size`."""
    try:
        size = reading.original_size(file_size)
    except UserError as error:
        return Exclusion(reading.id, "image size differs", f"{path}: {error}", is_fault=True)
    try:
        found = replace(reading, image_size=size).load_fixations(screen_filter=screen_filter)
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
