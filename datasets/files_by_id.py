"""Files by their ids: the files below a directory, for whatever is found by its name.

Not looked into are prepared trees (a directory that holds a prepare.json), hidden directories (caches among them),
`lost+found`, and the directories that the caller names; nor at hidden files, such as those that macOS leaves beside
others (`._x`).
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from util.errors import UserError

TREE_FILES = ("prepare.json", "prepare.origins", ".prepare.lock")  # a tree whose record was lost is a tree all the same


@dataclass
class FoundFiles:
    """`paths` by id, sorted; `ambiguous`: the different files of an id of which none was taken."""

    paths: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)


def files_below(root: Path, without: Iterable[Path] = (), *, but: str | None = None) -> Iterator[str]:
    """The path of each file, from the root, with "/" between its parts; a directory's own files come before those
    further below. Links to directories are followed, each directory is visited once.

    Args:
        without: directories (they need not exist) that are not looked into; the root itself can't be one of them.
        but: a file that marks a prepared tree whose files are wanted all the same.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: can't be listed ({error.strerror})") from None

    visited = {os.path.realpath(path) for path in without} - {os.path.realpath(root)}
    for path, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        own = os.path.realpath(path)
        if own in visited or (but not in files and not {*files}.isdisjoint(TREE_FILES)):
            folders.clear()
            continue
        visited.add(own)
        folders[:] = sorted(filter(_is_shown, folders))
        yield from (os.path.join(path, name).removeprefix(f"{root}/") for name in sorted(filter(_is_shown, files)))


def _is_shown(name: str) -> bool:
    return name[0] != "." and name != "lost+found"


def find_by_id(
    root: Path, files: Iterable[str], id_of: Callable[[str], str | None], suffixes: Sequence[str]
) -> FoundFiles:
    """The file of each id among `files` below the root: `id_of` a name without suffix is its id, None for any other file.

    Of several files of the same content the first is taken, by suffix and then by path; of different ones none.
    """
    candidates: dict[str, list[tuple[int, str]]] = {}
    for file in files:
        stem, suffix = os.path.splitext(os.path.basename(file))
        if suffix.lower() in suffixes and (own := id_of(stem)) is not None:
            candidates.setdefault(own, []).append((suffixes.index(suffix.lower()), f"{root}/{file}"))
    found = FoundFiles()
    for own, ranked in sorted(candidates.items()):
        first, *others = paths = [path for _, path in sorted(ranked)]
        if all(filecmp.cmp(first, path, shallow=False) for path in others):
            found.paths[own] = first
        else:
            found.ambiguous[own] = paths
    return found


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
