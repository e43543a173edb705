"""What the files of a tree were made from: units, their origins, and the lines in which a tree keeps them.

A line is the JSON list [key, origin, {file: size}, note]; in the names of files `*` stands for the key, which keeps
377,000 lines at 70 MB. In a journal, origin null announces that the named files are about to be changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from util.errors import UserError

Stamp = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made or kept as a whole: an image with all that belongs to it.

    Attributes:
        key: names it; holds neither `*` nor `"`.
        origin: `origin_of` all that decides its files, beside the options of the tree.
        task: what its maker needs; for the caller's use.
        sources: files that may not change while it is made.
        stamps: of `sources`, as they were when `origin` was worked out.
    """

    key: str
    origin: str
    task: Any = None
    sources: tuple[str, ...] = ()
    stamps: tuple[Stamp, ...] = ()

    def changed_source(self) -> str | None:
        """A source that is not what it was, if any."""
        return next((source for source, was in zip(self.sources, self.stamps) if stamp(source) != was), None)


def stamp(source: str | os.PathLike) -> Stamp:
    """(size, time of change in ns) of a file; (-1, 0) where there is none."""
    try:
        status = os.stat(source)
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns


def origin_of(*parts: object) -> str:
    """Digest of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def write_line(key: str, origin: str | None, sizes: Mapping[str, int], note: Any) -> str:
    """A line, without its end."""
    files = {name.replace(key, "*"): size for name, size in sizes.items()}
    return json.dumps([key, origin, files, note], ensure_ascii=False, separators=(",", ":"))


def read_line(line: str) -> tuple[str, str | None, dict[str, int], Any]:
    """(key, origin, size by file, note)."""
    key, origin, files, note = json.loads(line)
    return key, origin, {name.replace("*", key): size for name, size in files.items()}, note


def key_of(line: str) -> str:
    """The key of a line, without reading the rest."""
    return line[2 : line.index('"', 2)]


def read_lines(path: Path) -> Iterator[str]:
    """The whole lines of a file; what a kill left of a last one is not told. Raises UserError where the file was
    changed by others."""
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            if not (line.startswith('["') and line.endswith("]\n")) and not line.startswith("{"):
                raise UserError(f"{path}: line {number} is not of this program; --overwrite starts afresh")
            yield line[:-1]


def origins_below(path: Path) -> dict[str, str]:
    """Key -> digest of a unit's line in a finished layer: a source of units in the layer above."""
    return {key_of(line): origin_of(line) for line in read_lines(path)}


def append_to(path: Path) -> IO[str]:
    """Open a file of lines to go on after its last whole one."""
    if path.exists():
        data = path.read_bytes()
        if whole := len(data) - (data.rfind(b"\n") + 1):
            os.truncate(path, len(data) - whole)
    return open(path, "a", encoding="utf-8")
