"""The folder of a data set, walked once: its tables by name, its images by id, wherever they are below."""

from __future__ import annotations

import filecmp
import fnmatch
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from util.errors import UserError

# In the order of preference if an image has several files: an 8-bit picture is read faster.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


class Folder:
    """Files below a directory, without hidden ones (`.cache`, `._x.png` of a Mac's archive)."""

    def __init__(self, root: Path, option: str = "--data_path"):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{option}: {root} is not a directory")

    @cached_property
    def files(self) -> list[str]:
        """Every file below, as a path from the root, parts separated by "/"."""
        found, pending, followed = [], [""], set()
        while pending:
            base = pending.pop()
            for entry in _entries(self.root / base):
                if not entry.is_dir():
                    found.append(base + entry.name)
                elif not entry.is_symlink() or (target := os.path.realpath(entry.path)) not in followed:
                    if entry.is_symlink():
                        followed.add(target)  # so that a circle ends
                    pending.append(f"{base}{entry.name}/")
        return sorted(found)

    def nearby(self, *patterns: str) -> list[Path]:
        """Files of the root itself whose name fits a pattern, letter case and ".gz" aside."""
        names = sorted(entry.name for entry in _entries(self.root) if entry.is_file())
        return [self.root / name for name in _fitting(names, patterns)]

    def table(self, *patterns: str, needed: bool = True) -> Path | None:
        """The file whose name fits a pattern, of several those nearest to the root. `UserError` if these are several, or
        if there is none that is `needed`."""
        found = self.nearby(*patterns)  # a table in the root itself is found without a walk through the images
        if not found:
            below = _fitting(self.files, patterns)
            depth = min((name.count("/") for name in below), default=0)
            found = [self.root / name for name in below if name.count("/") == depth]
        if len(found) > 1 or (needed and not found):
            names = " and ".join(str(path.relative_to(self.root)) for path in found)
            raise UserError(
                f"{self.root}: expected one {' or '.join(patterns)} in it or below, but it has {names or 'none'}; keep one "
                "of them there, or name the table by --csv"
            )
        return found[0] if found else None

    def images(self, names: Sequence[str], notes: list[str]) -> list[Path | None]:
        """The file of each name, None if it is missing.

        A name is an id, a file name or a path, with or without a suffix. An id is found in any directory below, the image
        of a path in the folder that it names (`_homes`). Of an image with several suffixes the one that is named is
        taken, else the first of `IMAGE_SUFFIXES`, and `notes` say so.

        Raises:
            UserError: two different files could be meant.
        """
        paths = [name.replace("\\", "/").removeprefix("./") for name in names]
        key = without_suffix
        if len(set(map(key, paths))) < len(set(paths)):  # 1.png and 1.jpg are two images here
            key = str
        result: list[Path | None] = [None] * len(names)
        wanted: dict[tuple[str, ...], dict[str, list[int]]] = {}  # folder, then image: its places
        for i, path in enumerate(paths):
            if PurePosixPath(path).is_absolute() or ".." in path.split("/"):
                result[i] = file if (file := self.root / names[i]).is_file() else None
            else:
                *above, image = key(path).split("/")
                wanted.setdefault(tuple(above), {}).setdefault(image, []).append(i)
        images = set().union(*wanted.values())
        here: dict[str, dict[str, list[str]]] = {}  # folder, then image: its files
        for file in self.files:
            above, _, image = key(file).rpartition("/")
            if image in images:
                here.setdefault(above, {}).setdefault(image, []).append(file)
        homes = _homes({own: set(places) for own, places in wanted.items() if own}, here, self.root.resolve().name)
        anywhere: dict[str, list[str]] = defaultdict(list)
        for found in here.values() if () in wanted else ():
            for image, files in found.items():
                anywhere[image] += files
        several = []
        for own, places in wanted.items():
            for image, rows in places.items():
                if not own:
                    files = anywhere[image]
                elif own in homes and image in here[homes[own][0]]:
                    files = [file for home in homes[own] for file in here[home].get(image, ())]
                else:
                    continue
                for i in rows if files else ():
                    result[i] = self.root / self._choose(names[i], files)
                if len(files) > 1:
                    several.append((files, result[rows[0]]))
        if several:
            files, chosen = several[0]
            notes.append(
                f"{len(several)} images are there more than once, e.g. {', '.join(files)}; "
                f"{chosen.relative_to(self.root)} and its like are read"
            )
        return result

    def _choose(self, name: str, files: list[str]) -> str:
        suffix = os.path.splitext(name)[1].lower()

        def rank(file: str) -> tuple[bool, int]:
            own = os.path.splitext(file)[1].lower()
            return own != suffix, IMAGE_SUFFIXES.index(own) if own in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)

        first = min(map(rank, files))
        chosen, *others = (file for file in files if rank(file) == first)
        for other in others:
            # The same picture copied to two places is no question; a mask of the same name would be.
            if not filecmp.cmp(self.root / chosen, self.root / other, shallow=False):
                raise UserError(
                    f"{self.root}: image {name!r} could be {chosen} or {other}; name the folder of the images by --images"
                )
        return chosen

    def missing_message(self, missing: Sequence[str], total: int) -> str:
        pictures = [name for name in self.files if name.lower().endswith(IMAGE_SUFFIXES)]
        there = f"{len(pictures)} image files are below it, e.g. {pictures[0]}" if pictures else "it has no image"
        return (
            f"{self.root}: {len(missing)} of {total} images are missing, e.g. {missing[0]!r} ({there}); "
            "name their folder by --images, or pass --skip_missing to go on without them"
        )


def without_suffix(name: str) -> str:
    """Ids may have dots of their own: only what is an image's suffix is cut off."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _homes(
    wanted: Mapping[tuple[str, ...], set[str]], here: Mapping[str, Mapping[str, object]], root_name: str
) -> dict[tuple[str, ...], list[str]]:
    """The folders here that a table's folders can be, the one with most of its images first.

    Leading directories of a table's folder may be missing or have another name here (CheXpert's begin with the root's own
    name). As few are left out as possible: once one is found, all that begin with the same directories keep them. The
    folder of the images itself is left out only where it is the root. None is a folder that the table names otherwise.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    pending, cut = list(wanted), 0
    while pending:
        tails = {own: own[cut:] for own in pending}
        images = [(tails[own], image) for own in pending for image in wanted[own]]
        if cut and len(set(images)) < len(images):
            break  # images are no longer told apart
        lengths = set(map(len, tails.values()))
        by_tail = defaultdict(list)
        for folder in here:
            parts = tuple(folder.split("/")) if folder else ()
            for length in lengths:
                if length <= len(parts) and (length or not parts):
                    by_tail[parts[len(parts) - length :]].append((folder, parts[: len(parts) - length]))
        named = {own[cut - 1] for own in wanted if len(own) >= cut > 0}
        settled = set()
        for own, tail in tails.items():
            fitting = []
            for folder, above in by_tail.get(tail, ()):
                last = above[-1] if above else root_name
                count = len(wanted[own] & here[folder].keys())
                if count and not (last in named and last != own[cut - 1]):
                    fitting.append((-count, len(folder), folder))
            if fitting:
                found[own] = [folder for *_, folder in sorted(fitting)]
                settled.add(own[: cut + 1])
        pending = [own for own in pending if len(own) > cut and own[: cut + 1] not in settled]
        cut += 1
    return found


def _fitting(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    wanted = [form for pattern in patterns for form in (pattern.lower(), f"{pattern.lower()}.gz")]
    last = ((name, name.rpartition("/")[2].lower()) for name in names)
    return [name for name, end in last if any(fnmatch.fnmatchcase(end, form) for form in wanted)]


def _entries(directory: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as entries:
            return [entry for entry in entries if not entry.name.startswith(".") and entry.name != "__MACOSX"]
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed ({error.strerror})") from None
