"""Looking for files below a directory: each directory once, and never where no original can be.

No originals are looked for in prepared trees (a directory that holds a prepare.json), hidden directories (caches among
them), `lost+found`, and the places that the caller names; nor in files that macOS leaves beside others (`._x`).
What could not be looked at is counted and told, never passed over in silence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from util.errors import UserError

TREE_RECORD = "prepare.json"
# A tree whose record was lost is a tree all the same.
TREE_FILES = (TREE_RECORD, "prepare.origins", ".prepare.lock")
Identity = tuple[int, int]  # device and inode


def resolved(path: Path) -> Path:
    """Where a path leads, however it is spelt. UserError for links in a circle, and for a name that can't be written
    into the record of a tree."""
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: Python below 3.13, for links in a circle
        raise UserError(f"{path}: can't be followed ({error})") from None
    if not _is_utf8(str(path)):
        raise UserError(f"{ascii(str(path))[1:-1]}: its name is not UTF-8; rename it")
    return path


def refuse_inside_tree(root: Path, mend: str, *, but: str | None = None) -> None:
    """UserError where `root` is a prepared tree or lies in one; a tree with the file `but` does not count."""
    for directory in (root.resolve(), *root.resolve().parents):
        for name in TREE_FILES:
            if (directory / name).exists() and not (but and (directory / but).exists()):
                raise UserError(
                    f"{root}: lies in a prepared tree ({directory / name}), whose pictures are no originals; {mend}"
                )


class Sources:
    """The files below `root` that may be originals.

    `without`: directories (they need not exist) that hold none; the root itself can't be one of them. `but`: a file
    that tells of a prepared tree that its files are originals here.
    """

    def __init__(self, root: Path, without: Iterable[Path] = (), *, but: str | None = None):
        self._but = but
        self.root = os.fspath(root)
        own = identity(self.root)
        self._without = {found for path in without if (found := identity(path)) not in (None, own)}
        self._unreadable: dict[str, str] = {}
        self._counts = {"names that are not UTF-8": 0, "files that macOS left (._*)": 0}
        # Images of one study and subject are asked for one after the other.
        self.names: Callable[[str], frozenset[str]] = lru_cache(4096)(self._names)

    def notes(self) -> list[str]:
        """What was passed over, a line each."""
        notes = [f"{self.root}: {n} {what} passed over" for what, n in self._counts.items() if n]
        if self._unreadable:
            named = ", ".join(f"{path} ({why})" for path, why in sorted(self._unreadable.items())[:5])
            more = f" and {len(self._unreadable) - 5} more" if len(self._unreadable) > 5 else ""
            notes.append(f"{len(self._unreadable)} directories could not be looked into: {named}{more}")
        return notes

    def _names(self, directory: str) -> frozenset[str]:
        """Names in a directory below the root, asked for by its path from there; none if it holds no originals."""
        parent, _, name = directory.rpartition("/")
        if directory and (name.startswith(".") or name not in self.names(parent)):
            return frozenset()
        path = f"{self.root}/{directory}" if directory else self.root
        if directory and self._without and identity(path) in self._without:
            return frozenset()
        try:
            names = frozenset(os.listdir(path))
        except NotADirectoryError:
            return frozenset()
        except OSError as error:
            self._unreadable[path] = error.strerror or str(error)
            return frozenset()
        return frozenset() if self._is_tree(names) else names

    def walk(self) -> Iterator[tuple[str, list[str]]]:
        """(directory, names of its files, sorted) of all directories, links to directories followed."""
        seen: set[Identity | None] = {None, *self._without}
        pending = [self.root]
        while pending:
            directory = pending.pop()
            own = identity(directory)
            if own in seen:
                continue
            seen.add(own)
            files, below = [], []
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            below.append(entry.name)
                        else:
                            files.append(entry.name)
            except OSError as error:
                self._unreadable[directory] = error.strerror or str(error)
                continue
            if self._is_tree(frozenset(files)):
                continue
            yield directory, sorted(name for name in files if self._is_usable(name))
            below = [name for name in below if not name.startswith(".") and name != "lost+found"]
            pending += (f"{directory}/{name}" for name in sorted(below, reverse=True) if self._is_utf8(name))

    def _is_tree(self, names: frozenset[str]) -> bool:
        return not names.isdisjoint(TREE_FILES) and self._but not in names

    def _is_usable(self, name: str) -> bool:
        if name.startswith("._"):
            self._counts["files that macOS left (._*)"] += 1
            return False
        return self._is_utf8(name)

    def _is_utf8(self, name: str) -> bool:
        if not _is_utf8(name):
            self._counts["names that are not UTF-8"] += 1
        return _is_utf8(name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # its bytes can be neither printed nor written into an index
        return False
    return True


def identity(path: str | os.PathLike) -> Identity | None:
    """What tells one file or directory from another, however it is reached; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def same_content(paths: list[str]) -> bool:
    """Whether all files have the same bytes; False where one can't be read."""
    try:
        if len({os.stat(path).st_size for path in paths}) > 1:
            return False
        with open(paths[0], "rb") as file:
            first = file.read()
        return all(Path(path).read_bytes() == first for path in paths[1:])
    except OSError:
        return False
