"""Finding the images of MIMIC-CXR by dicom_id, whatever directories the user's copy has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from util.errors import UserError

# In the order of preference: MIMIC-CXR-JPG is 8-bit already and several times faster to read.
SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm")


def find_images(root: Path, hints: Mapping[str, str]) -> dict[str, Path]:
    """Paths of the images named by dicom_id, those that there are.

    `hints` maps each dicom_id to the path that its data set gives (relative, any suffix, may be
    empty). That path and its tails are tried below `root` first, which costs a few look-ups. If ids
    remain, the whole tree is walked once, links to directories included, without a look at the single
    files; time is linear in their number. Where an image is there more than once, the hinted place
    wins, then .jpg before .png before .dcm, then the alphabetically first path.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; --images is the root of MIMIC-CXR-JPG or MIMIC-CXR")
    found = {}
    for image_id, hint in hints.items():
        path = _try_hint(root, image_id, hint)
        if path is not None:
            found[image_id] = path
    remaining = set(hints) - set(found)
    if remaining:
        found.update(_walk(root, remaining))
    return found


def _try_hint(root: Path, image_id: str, hint: str) -> Path | None:
    directories = PurePosixPath(hint).parent.parts
    for start in range(len(directories)):
        base = root.joinpath(*directories[start:])
        for suffix in SUFFIXES if base.is_dir() else ():
            path = base / f"{image_id}{suffix}"
            if path.is_file():
                return path
    return None


def _walk(root: Path, wanted: set[str]) -> dict[str, Path]:
    best: dict[str, tuple[int, str]] = {}
    followed: set[str] = set()  # targets of links to directories, so that a circle ends
    pending = [str(root)]
    while pending:
        directory = pending.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    stem, suffix = os.path.splitext(entry.name)
                    if stem in wanted and suffix.lower() in SUFFIXES:
                        candidate = (SUFFIXES.index(suffix.lower()), entry.path)
                        best[stem] = min(best.get(stem, candidate), candidate)
                    elif entry.is_dir():
                        if entry.is_symlink():
                            target = os.path.realpath(entry.path)
                            if target in followed:
                                continue
                            followed.add(target)
                        pending.append(entry.path)
        except OSError as error:
            raise UserError(f"{directory}: cannot be listed ({error.strerror})") from error
    return {image_id: Path(path) for image_id, (_, path) in best.items()}
