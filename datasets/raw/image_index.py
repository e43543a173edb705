"""Finding the images of MIMIC-CXR by dicom_id, whatever directories the user's copy has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets.raw.walk import Sources, refuse_inside_tree, same_content
from util.errors import UserError
from util.tables import numeric_columns, read_table

# As published: MIMIC-CXR-JPG, 8-bit already and several times faster to read, and MIMIC-CXR.
PUBLISHED = (".jpg", ".dcm")
# Of files of the same content the first is taken.
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")
METADATA_NAMES = ("mimic-cxr-2.0.0-metadata.csv.gz", "mimic-cxr-2.0.0-metadata.csv")
DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}", re.IGNORECASE)  # as MIMIC-CXR has them, in small letters


def find_metadata(images: Path) -> Path | None:
    """MIMIC-CXR's table of metadata in the root of its images, if it is there."""
    return next((images / name for name in METADATA_NAMES if (images / name).is_file()), None)


def read_sizes(path: Path) -> dict[str, tuple[int, int]]:
    """(height, width) of the original images by dicom_id, as MIMIC-CXR's table of metadata has them."""
    table = read_table(path, ("dicom_id", "Rows", "Columns"), text=("dicom_id",))
    sizes = numeric_columns(table, ("Rows", "Columns"), path)
    return dict(zip(table["dicom_id"], zip(*(sizes[name].astype(int).tolist() for name in ("Rows", "Columns")))))


@dataclass
class FoundImages:
    """`paths` by dicom_id; `ambiguous`: why none was taken of several; `notes` on what was passed over."""

    paths: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find_images(root: Path, hints: Mapping[str, str] | None, *, without: Iterable[Path] = ()) -> FoundImages:
    """The images named by dicom_id, those that there are; with hints None, all files whose names are dicom_ids.

    `hints` maps each dicom_id to the path that its data set gives (relative, any suffix, may be
    empty). That place and its tails are tried below `root` first, which costs a look into each study's
    directory; a .jpg or .dcm there is the image, .jpg first. If ids remain, the whole tree is walked once, links to
    directories included; time is linear in the number of files. An image that is found at several places then,
    with different contents, is ambiguous and not taken.

    Prepared trees, caches and the directories `without` are no sources, see `datasets.raw.walk`.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; --images is the root of MIMIC-CXR-JPG or MIMIC-CXR")
    refuse_inside_tree(root, "--images is the root of MIMIC-CXR-JPG or MIMIC-CXR")
    sources = Sources(root, without)
    found = FoundImages()
    for image_id, hint in (hints or {}).items():
        if (path := _at_its_place(sources, image_id, hint)) is not None:
            found.paths[image_id] = path
    if hints is None:
        _search(sources, None, found)
    elif len(found.paths) < len(hints):
        _search(sources, hints.keys() - found.paths.keys(), found)
    found.notes = sources.notes()
    return found


def _at_its_place(sources: Sources, image_id: str, hint: str) -> str | None:
    directories = PurePosixPath(hint).parent.parts
    for start in range(len(directories)):
        place = "/".join(directories[start:])
        names = sources.names(place)
        for suffix in PUBLISHED if names else ():
            for name in (f"{image_id}{suffix}", f"{image_id}{suffix.upper()}"):
                if name in names:
                    return f"{sources.root}/{place}/{name}"
    return None


def _search(sources: Sources, wanted: set[str] | None, found: FoundImages) -> None:
    """All of the `wanted`, or all that are named as MIMIC-CXR's are; letter case does not count."""
    by_folded: dict[str, set[str]] = {}
    for image_id in wanted or ():
        by_folded.setdefault(image_id.casefold(), set()).add(image_id)
    candidates: dict[str, list[str]] = {}
    for directory, names in sources.walk():
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES:
                continue
            if wanted is None:
                image_ids = {stem.lower()} if DICOM_ID.fullmatch(stem) else set()
            else:
                image_ids = {stem} if stem in wanted else by_folded.get(stem.casefold(), set())
            for image_id in image_ids:
                candidates.setdefault(image_id, []).append(f"{directory}/{name}")
    for image_id, paths in sorted(candidates.items()):
        paths.sort(key=lambda path: (SUFFIXES.index(os.path.splitext(path)[1].lower()), path))
        if len(paths) == 1 or same_content(paths):
            found.paths[image_id] = paths[0]
        else:
            found.ambiguous[image_id] = (
                f"{len(paths)} different files, none at the place that the data set names: {', '.join(paths)}; "
                "leave one"
            )
