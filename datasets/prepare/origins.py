"""What the files of a tree were made from: units, their origins, and the lines in which a tree keeps them.

A line is the JSON list [key, origin, {file: size}, note]; in the names of files `*` stands for the key, which keeps
377,000 lines at 70 MB. In a journal, origin null announces that the named files are about to be changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from util.errors import UserError

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made or kept as a whole: an image with all that belongs to it.

    Attributes:
        key: names it; holds no `*`.
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
        """A source that is not what it was, if any. Its status may have changed (a link more, other rights):
        then it is only made anew by the next run."""
        both = zip(self.sources, self.stamps)
        return next((source for source, was in both if stamp(source)[:2] != was[:2]), None)


def stamp(source: str | os.PathLike) -> Stamp:
    """(size, time of change in ns, time of change of the status in ns) of a file; (-1, 0, 0) where there is none.

    Nobody can set the last one back: it tells a file that was put into another's place from an archive or a copy
    that keeps times."""
    try:
        status = os.stat(source)
    except OSError:
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def origin_of(*parts: object) -> str:
    """Digest of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def write_line(key: str, origin: str | None, sizes: Mapping[str, int], note: Any) -> str:
    """A line, without its end."""
    files = {name.replace(key, "*"): size for name, size in sizes.items()}
    return json.dumps([key, origin, files, note], ensure_ascii=False, separators=(",", ":"))


def read_line(line: str) -> tuple[str, str | None, dict[str, int], Any]:
    """(key, origin, size by file, note). UserError where it is damaged, which only a journal's can be here."""
    try:
        key, origin, files, note = json.loads(line)
        return key, origin, {name.replace("*", key): size for name, size in files.items()}, note
    except (ValueError, TypeError, AttributeError):
        raise UserError(
            f"a line of the tree's list of origins is damaged ({line[:80]}); --overwrite starts afresh"
        ) from None


def key_of(line: str) -> str:
    """The key of a line, without reading the rest."""
    end = line.index('"', 2)
    # Rare: a quote or a backslash in the key is written with a backslash.
    return read_line(line)[0] if "\\" in line[2:end] else line[2:end]


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


def digest_of(lines: Iterable[str]) -> str:
    """Of a whole list of origins."""
    digest = hashlib.blake2b(digest_size=10)
    for line in lines:
        digest.update(f"{line}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def read_journal(path: Path) -> tuple[dict[str, str | None], set[str], list[Any]]:
    """The last line on each key, None where it was not finished; the files of lines that no longer hold; versions of
    the programs that wrote it."""
    said: dict[str, str | None] = {}
    announced: dict[str, set[str]] = {}
    stale: set[str] = set()
    versions = []
    for line in read_lines(path):
        if line.startswith("{"):
            versions.append(json.loads(line)["versions"])
            continue
        key, origin, sizes, _ = read_line(line)
        if origin is None:
            announced.setdefault(key, set()).update(sizes)
            said.setdefault(key, None)
            continue
        if (before := said.get(key)) is not None:
            stale.update(read_line(before)[2])
        stale.update(announced.pop(key, set()) - sizes.keys())
        said[key] = line
    for key, names in announced.items():
        stale.update(names)
        said[key] = None
    return said, stale, versions


def append_to(path: Path) -> IO[str]:
    """Open a file of lines to go on after its last whole one."""
    if path.exists():
        data = path.read_bytes()
        if whole := len(data) - (data.rfind(b"\n") + 1):
            os.truncate(path, len(data) - whole)
    return open(path, "a", encoding="utf-8")
