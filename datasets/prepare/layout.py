"""The files of a prepared tree that say what is in it; see `datasets.prepare.making`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import UserError

FORMAT = 3  # raised with every change of what the same sources become
LAYERS = ("prepare", "gaze")  # each is made from the one before it
STAGING, LOCK = ".making", ".prepare.lock"
Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made or kept as a whole: an image with all that belongs to it.

    Attributes:
        key: names it; holds no `*`.
        origin: `origin_of` all that decides its files, beside the options of the tree.
        task: what its maker needs.
        sources: files that may not change while it is made.
        stamps: of `sources`, as they were when `origin` was computed.
    """

    key: str
    origin: str
    task: Any = None
    sources: tuple[str, ...] = ()
    stamps: tuple[Stamp, ...] = ()


def stamp(source: str | os.PathLike) -> Stamp:
    """(size, time of change in ns, time of change of the status in ns) of a file; (-1, 0, 0) if it is missing.

    Nobody can set the last one back: it reveals a file that replaced another with its old times kept."""
    try:
        status = os.stat(source)
    except OSError:
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def digest_of(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=10).hexdigest()


def origin_of(*parts: object) -> str:
    """Digest of anything that JSON can hold."""
    return digest_of(json.dumps(parts, sort_keys=True).encode())


def read_record(root: Path, layer: str = LAYERS[0]) -> dict[str, Any]:
    """The record of a layer; empty if it was never finished. Raises UserError if it is not of this program."""
    path = root / f"{layer}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record["options"], dict):
            raise TypeError
        return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not the record this script writes; choose another --out") from None


def finished_lines(root: Path, layer: str) -> dict[str, str]:
    """The lines of a layer's origins by key, in their order; none if it was never finished. UserError if the list is
    not the one that the record was written with."""
    path, record = root / f"{layer}.origins", read_record(root, layer)
    if not record:
        return {}
    content = path.read_bytes() if path.is_file() else b""
    if digest_of(content) != record.get("origins"):
        raise UserError(
            f"{path}: is missing, damaged or changed, so it is not known what the tree holds; "
            "restore it, or remove the tree and run again"
        )
    return {key_of(line): line for line in content.decode().split("\n")[:-1]}


def write_line(key: str, origin: str, sizes: Mapping[str, int], note: Any) -> str:
    """A line, without its end."""
    files = {name.replace(key, "*"): size for name, size in sizes.items()}
    return json.dumps([key, origin, files, note], ensure_ascii=False, separators=(",", ":"))


def read_line(line: str) -> tuple[str, str, dict[str, int], Any]:
    """(key, origin, size by file, note)."""
    key, origin, files, note = json.loads(line)
    return key, origin, {name.replace("*", key): size for name, size in files.items()}, note


def key_of(line: str) -> str:
    """The key of a line, without reading the rest."""
    return json.JSONDecoder().raw_decode(line, 1)[0]


def files_of(line: str) -> list[str]:
    return list(read_line(line)[2])
