"""Files by their ids: one index of the files below a directory, for whatever is found by its name.

Not looked into are prepared trees (a directory that holds a prepare.json), hidden directories (caches among them),
`lost+found`, and the directories that the caller names; nor at hidden files, such as those that macOS leaves beside
others (`._x`).
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from util.errors import UserError

TREE_FILES = {"prepare.json", "prepare.origins", ".prepare.lock"}  # a tree whose record was lost is a tree all the same


@dataclass
class FoundFiles:
    """`paths` by id, sorted; `ambiguous`: the different files of an id of which none was taken."""

    paths: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)


class FileIndex:
    """The files below `root`.

    Args:
        without: directories (they need not exist) that are not looked into; the root itself can't be one of them.
        but: a file that marks a prepared tree whose files are wanted all the same.
    """

    def __init__(self, root: Path, without: Iterable[Path] = (), *, but: str | None = None):
        self.root, self._but = os.fspath(root), but
        self._without = {os.path.realpath(path) for path in without} - {os.path.realpath(root)}
        # Images of one study and subject are asked for one after the other.
        self._listed: Callable[[str], tuple[set[str], set[str]]] = lru_cache(4096)(self._list)

    def _list(self, folder: str) -> tuple[set[str], set[str]]:
        """Names of the files and of the directories in a directory below the root."""
        parent, name = os.path.split(folder)
        path = os.path.join(self.root, folder)
        files, folders = set(), set()
        if (name and name not in self._listed(parent)[1]) or os.path.realpath(path) in self._without:
            return files, folders
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    (folders if entry.is_dir() else files).add(entry.name)
        except OSError as error:
            raise UserError(f"{path}: can't be listed ({error.strerror})") from None
        if files & TREE_FILES and self._but not in files:
            return set(), set()
        hidden = {name for name in files | folders if name[0] == "." or name == "lost+found"}
        return files - hidden, folders - hidden

    def files(self) -> Iterator[str]:
        """The path of each file, from the root, with "/" between its parts; a directory's own files come before those
        further below. Links to directories are followed, each directory is visited once."""
        seen, pending = set(), [""]
        while pending:
            folder = pending.pop()
            if (own := os.path.realpath(os.path.join(self.root, folder))) in seen:
                continue
            seen.add(own)
            files, below = self._listed(folder)
            yield from (os.path.join(folder, name) for name in sorted(files))
            pending += (os.path.join(folder, name) for name in sorted(below, reverse=True))

    def search(self, id_of: Callable[[str], str | None], suffixes: Sequence[str]) -> FoundFiles:
        """The file of each id, wherever it is: `id_of` a name without suffix is its id, None for any other file.

        Of several files of the same content the first is taken, by suffix and then by path; of different ones none.
        """
        candidates: dict[str, list[tuple[int, str]]] = {}
        for file in self.files():
            stem, suffix = os.path.splitext(os.path.basename(file))
            if suffix.lower() in suffixes and (own := id_of(stem)) is not None:
                candidates.setdefault(own, []).append((suffixes.index(suffix.lower()), f"{self.root}/{file}"))
        found = FoundFiles()
        for own, ranked in sorted(candidates.items()):
            first, *others = paths = [path for _, path in sorted(ranked)]
            if all(filecmp.cmp(first, path, shallow=False) for path in others):
                found.paths[own] = first
            else:
                found.ambiguous[own] = paths
        return found

    def at_place(self, folder: str, names: Sequence[str]) -> str | None:
        """The first of `names` in the directory that a data set gives, or in a tail of it, never outside of the root;
        costs no walk."""
        folder = folder.lstrip("/")
        while folder:
            for name in names:
                if name in self._listed(folder)[0]:
                    return f"{self.root}/{folder}/{name}"
            folder = folder.partition("/")[2]
        return None


def check_originals(root: Path, what: str, *, but: str | None = None) -> None:
    """UserError if `root` is no directory, or in a prepared tree; a tree with the file `but` does not count."""
    if not root.is_dir():
        raise UserError(f"{root}: no such directory; {what}")
    for directory in (root.resolve(), *root.resolve().parents):
        for name in TREE_FILES:
            if (directory / name).exists() and not (but and (directory / but).exists()):
                raise UserError(
                    f"{root}: lies in a prepared tree ({directory / name}), whose pictures are no originals; {what}"
                )
