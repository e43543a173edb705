"""MIMIC-CXR's images, found by dicom_id whatever directories the user's copy has, and its table of metadata."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from datasets.files_by_id import FoundFiles, check_originals, files_below, find_by_id
from datasets.raw.readings import Exclusion
from util.tables import numeric_columns, read_table

METADATA_NAME = "mimic-cxr-2.0.0-metadata.csv"  # published with .gz behind it
# In the order of preference, of files of the same content: MIMIC-CXR-JPG is 8-bit already and several times faster to
# read than MIMIC-CXR.
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")
DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}", re.IGNORECASE)  # as MIMIC-CXR has them, in small letters


def ids_beginning(name: str, known: Sequence[str]) -> Sequence[str]:
    """Those of the sorted `known` ids that begin with `name`, which may be cut off."""
    return known[bisect_left(known, name) : bisect_left(known, f"{name}\U0010ffff")]


def find_metadata(images: Path) -> Path | None:
    """MIMIC-CXR's table of metadata in the root of its images, if it is there."""
    return next(filter(Path.is_file, (images / METADATA_NAME, images / f"{METADATA_NAME}.gz")), None)


def read_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of the original images by dicom_id, as MIMIC-CXR's table of metadata has them."""
    table = read_table(path, ("dicom_id", "Rows", "Columns"))
    sizes = numeric_columns(table, ("Rows", "Columns"), path).astype(int)
    return dict(zip(table["dicom_id"], zip(sizes["Rows"].tolist(), sizes["Columns"].tolist())))


def find_images(root: Path, hints: Mapping[str, str] | None, *, without: Iterable[Path] = ()) -> FoundFiles:
    """The images named by dicom_id, those that there are; with `hints` None, all files whose names are dicom_ids.

    `hints` maps each dicom_id to the path that its data set gives (relative, any suffix, may be empty). A .jpg or .dcm
    at that place, or at a tail of it below `root`, is the image. For other ids the whole tree is walked, once; letter
    case does not count there. Prepared trees and the directories `without` hold no originals, see `datasets.files_by_id`.
    """
    check_originals(root, "--images is the root of MIMIC-CXR-JPG or MIMIC-CXR")
    files = files_below(root, without)
    if hints is None:
        return find_by_id(root, files, lambda stem: stem.lower() if DICOM_ID.fullmatch(stem) else None, SUFFIXES)
    at_place, others = {}, {}
    for image_id, hint in hints.items():
        if path := _at_place(root, hint, image_id):
            at_place[image_id] = path
        else:
            others[image_id.casefold()] = image_id
    found = find_by_id(root, files if others else (), lambda stem: others.get(stem.casefold()), SUFFIXES)
    found.paths |= at_place
    return found


def _at_place(root: Path, hint: str, image_id: str) -> str | None:
    """The image in the directory of `hint`, or in a tail of it, never outside of the root; costs no walk."""
    folders = [part for part in hint.split("/")[:-1] if part not in ("", "..")]
    places = ("/".join([str(root), *folders[start:], image_id]) for start in range(len(folders)))
    return next(filter(os.path.isfile, (place + suffix for place in places for suffix in (".jpg", ".dcm"))), None)


def no_image(name: str, image_id: str, found: FoundFiles, root: Path) -> Exclusion:
    """Why `name` is left out, whose image was not found below `root`, or found more than once."""
    if paths := found.ambiguous.get(image_id):
        told = (
            f"{image_id}: {len(paths)} different files, none at the place that the data set names: {', '.join(paths)}; "
            "leave one"
        )
        return Exclusion(name, "several images", told, is_fault=True)
    return Exclusion(name, "image missing", f"no {image_id}.jpg, .png or .dcm under {root}")
