"""The folder of a data set, walked once: its tables by name, its images by id, wherever they are below."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from util.errors import UserError

# In the order of preference where an image is there as several: an 8-bit picture is read faster.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")

LOOKED_AT = 65536  # bytes at either end by which two files of one name are compared


class Folder:
    """Files below a directory; hidden ones (`.cache`, `._x.png` of a Mac's archive) are not there."""

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
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if not entry.is_dir():
                    found.append(base + entry.name)
                elif not entry.is_symlink() or (target := os.path.realpath(entry.path)) not in followed:
                    if entry.is_symlink():
                        followed.add(target)  # so that a circle ends
                    pending.append(f"{base}{entry.name}/")
        return sorted(found)

    def tables(self, *patterns: str) -> list[Path]:
        """Files whose name fits a pattern (letter case and ".gz" aside), those nearest to the root only."""
        # A table in the root itself is found without walking through the images.
        if found := self.nearby(*patterns):
            return found
        found = _fitting(self.files, patterns)
        depth = min((name.count("/") for name in found), default=0)
        return [self.root / name for name in found if name.count("/") == depth]

    def nearby(self, *patterns: str) -> list[Path]:
        """Files of the root itself whose name fits a pattern."""
        names = sorted(entry.name for entry in _entries(self.root) if entry.is_file())
        return [self.root / name for name in _fitting(names, patterns)]

    def table(self, *patterns: str) -> Path:
        """The one file whose name fits. `UserError` where there is none, or several."""
        found = self.tables(*patterns)
        if len(found) != 1:
            problem = "has none" if not found else f"has {', '.join(path.name for path in found)}"
            raise UserError(
                f"{self.root}: expected one {' or '.join(patterns)} in it or below, but it {problem}; "
                "name the table by --csv"
            )
        return found[0]

    def table_if_any(self, *patterns: str) -> Path | None:
        """The one file whose name fits, None where there is none. `UserError` where there are several."""
        found = self.tables(*patterns)
        if len(found) > 1:
            names = " and ".join(str(path.relative_to(self.root)) for path in found[:2])
            raise UserError(f"{self.root}: {names} could both be meant; keep one of them below it")
        return found[0] if found else None

    def images(self, names: Sequence[str], notes: list[str]) -> list[Path | None]:
        """The file of each name, None where there is none.

        A name is an id, a file name or a path, with or without a suffix. An id is found in any directory
        below, the image of a path in the folder that it names (`_match_paths`). Of an image that is there with
        several suffixes the one that is named is taken, else the first of `IMAGE_SUFFIXES`, and `notes` say so.

        Raises:
            UserError: two different files could be meant.
        """
        direct = {i: self.root / name for i, name in enumerate(names) if _is_elsewhere(name)}
        paths = [name.replace("\\", "/").removeprefix("./") for name in names]
        wanted = [_without_suffix(path) for path in paths]
        key = _without_suffix
        if len(set(wanted)) < len(set(paths)):  # 1.png and 1.jpg are two images here
            wanted, key = paths, str
        stems = {name.rpartition("/")[2] for name in wanted}
        files = [(key(file), file) for file in self.files if key(file).rpartition("/")[2] in stems]
        searched = {i: name for i, name in enumerate(wanted) if i not in direct}
        best = _match_paths(searched, files, self.root.resolve().name)
        several = 0
        result: list[Path | None] = []
        for i, name in enumerate(names):
            if i in direct:
                result.append(direct[i] if direct[i].is_file() else None)
            elif i in best:
                several += len(best[i]) > 1
                result.append(self.root / self._choose(name, best[i]))
            else:
                result.append(None)
        if several:
            first = next(i for i, files in best.items() if len(files) > 1)
            notes.append(
                f"{several} images are there more than once, e.g. {', '.join(best[first])}; "
                f"{result[first].relative_to(self.root)} and its like are read"
            )
        return result

    def _choose(self, name: str, files: list[str]) -> str:
        suffix = os.path.splitext(name)[1].lower()

        def rank(file: str) -> tuple[bool, int]:
            own = os.path.splitext(file)[1].lower()
            return own != suffix, IMAGE_SUFFIXES.index(own) if own in IMAGE_SUFFIXES else len(IMAGE_SUFFIXES)

        first = min(map(rank, files))
        chosen = [file for file in files if rank(file) == first]
        # The same picture copied to two places is no question; a mask of the same name would be.
        if len({_look(self.root / file) for file in chosen} if len(chosen) > 1 else ()) > 1:
            raise UserError(
                f"{self.root}: image {name!r} could be {chosen[0]} or {chosen[1]}; name the folder of the "
                "images by --images"
            )
        return chosen[0]


def missing_message(folder: Folder, lacking: Sequence[str], total: int) -> str:
    """What to say of images that are not there."""
    pictures = [name for name in folder.files if name.lower().endswith(IMAGE_SUFFIXES)]
    there = f"{len(pictures)} image files are below it, e.g. {pictures[0]}" if pictures else "it has no image"
    return (
        f"{folder.root}: {len(lacking)} of {total} images are not there, e.g. {lacking[0]!r} ({there}); "
        "name their folder by --images, or pass --skip_missing to go on without them"
    )


def _fitting(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    wanted = [form for pattern in patterns for form in (pattern.lower(), f"{pattern.lower()}.gz")]
    last = ((name, name.rpartition("/")[2].lower()) for name in names)
    return [name for name, end in last if end[:1] != "." and any(fnmatch.fnmatchcase(end, form) for form in wanted)]


def _match_paths(wanted: Mapping[int, str], files: Sequence[tuple[str, str]], root_name: str) -> dict[int, list[str]]:
    """Files by the place of the name.

    Leading directories of a path may be missing or have another name here (CheXpert's begin with the root's own name).
    As few are left out as possible: once an image is found, all paths that begin with the same directories keep them.
    The folder of the file itself is left out only where it is the root. Images of one folder in the table are in one
    folder here, which is none that the table names otherwise.
    """
    folders = {i: tuple(name.split("/")[:-1]) for i, name in wanted.items()}
    found: dict[int, list[str]] = {}
    names, cut = dict(wanted), 0
    # Names that are no longer different can't tell images apart.
    while names and (not cut or len(set(names.values())) == len(names)):
        matches = _match(names, files)
        if cut:
            named = {own[cut - 1] for own in folders.values() if len(own) >= cut}
            for i, places in list(matches.items()):
                for above in list(places):
                    last = above.rpartition("/")[2] or root_name
                    if (above and "/" not in names[i]) or last in named - {folders[i][cut - 1]}:
                        del places[above]
                if not places:
                    del matches[i]
        homes: dict[tuple[str, ...], Counter[str]] = {}
        for i, places in matches.items():
            if folders[i]:
                homes.setdefault(folders[i], Counter()).update(places.keys())
        home = {own: min(count, key=lambda above: (-count[above], len(above), above)) for own, count in homes.items()}
        for i, places in matches.items():
            if not folders[i] or home[folders[i]] in places:
                found[i] = [file for own in places.values() for file in own]
        settled = {folders[i][: cut + 1] for i in matches}
        names = {
            i: name.partition("/")[2]
            for i, name in names.items()
            if "/" in name and folders[i][: cut + 1] not in settled
        }
        cut += 1
    return found


def _match(names: Mapping[int, str], files: Sequence[tuple[str, str]]) -> dict[int, dict[str, list[str]]]:
    """Files whose path ends with a name, by the name's place and by what is above it in the path."""
    places: dict[str, list[int]] = {}
    for i, name in names.items():
        places.setdefault(name, []).append(i)
    lengths = sorted({name.count("/") + 1 for name in places})
    found: dict[int, dict[str, list[str]]] = {}
    for key, file in files:
        parts = key.split("/")
        for length in lengths:
            for place in places.get("/".join(parts[-length:]), ()) if length <= len(parts) else ():
                found.setdefault(place, {}).setdefault("/".join(parts[:-length]), []).append(file)
    return found


def _entries(directory: Path) -> list[os.DirEntry]:
    try:
        with os.scandir(directory) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"{directory}: cannot be listed ({error.strerror})") from None


def _look(path: Path) -> tuple[int, bytes]:
    """What tells two files apart without reading them whole: size, beginning and end."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(LOOKED_AT)
            file.seek(max(0, size - LOOKED_AT))
            return size, head + file.read()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None


def _without_suffix(name: str) -> str:
    # Ids may have dots of their own: only what is an image's suffix is cut off.
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _is_elsewhere(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts
