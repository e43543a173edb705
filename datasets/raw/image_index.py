"""Finding the images of MIMIC-CXR by dicom_id, whatever directories the user's copy has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datasets.raw.walk import TREE_RECORD, Sources, same_content
from util.errors import UserError

# As published: MIMIC-CXR-JPG, 8-bit already and several times faster to read, and MIMIC-CXR.
PUBLISHED = (".jpg", ".dcm")
# Of files of the same content the first is taken.
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")
DICOM_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{8}){4}")  # as MIMIC-CXR has them


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
    for directory in (root.resolve(), *root.resolve().parents):
        if (directory / TREE_RECORD).exists():
            raise UserError(
                f"{root}: lies in a prepared tree ({directory / TREE_RECORD}), whose pictures are no originals; "
                "--images is the root of MIMIC-CXR-JPG or MIMIC-CXR"
            )
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
    candidates: dict[str, list[str]] = {}
    for directory, names in sources.walk():
        for name in names:
            stem, suffix = os.path.splitext(name)
            is_wanted = DICOM_ID.fullmatch(stem) if wanted is None else stem in wanted
            if is_wanted and suffix.lower() in SUFFIXES:
                candidates.setdefault(stem, []).append(f"{directory}/{name}")
    for image_id, paths in sorted(candidates.items()):
        paths.sort(key=lambda path: (SUFFIXES.index(os.path.splitext(path)[1].lower()), path))
        if len(paths) == 1 or same_content(paths):
            found.paths[image_id] = paths[0]
        else:
            found.ambiguous[image_id] = (
                f"{len(paths)} different files, none at the place that the data set names: {', '.join(paths)}; "
                "leave one"
            )
