"""The files of a prepared tree: their names, and what is in them; see `datasets.prepare.making`."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from util.errors import UserError
from util.files import atomic_write

FORMAT = 3  # raised with every change of what the same sources become
LAYERS = ("prepare", "gaze")  # each is made from the one before it
STAGING, LOCK = ".making", ".prepare.lock"
FOLDERS = ("images", "files", "attention", "foreground")  # of ours, in a tree whose list of origins was lost
DECODER = json.JSONDecoder()
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


def origin_of(*parts: object) -> str:
    """Digest of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=10).hexdigest()


def read_record(root: Path, layer: str = LAYERS[0]) -> dict[str, Any]:
    """The record of a layer; empty if it was never finished. Raises UserError if it is not of this program."""
    path = root / f"{layer}.json"
    record = read_json(path)
    if record is not None and not (isinstance(record, dict) and isinstance(record.get("options"), dict)):
        raise UserError(f"{path}: not the record this script writes; choose another --out")
    return record or {}


def finished_lines(root: Path, layer: str) -> dict[str, str]:
    """The lines of a layer's origins by key, in their order; none if it was never finished. UserError if the list is
    not the one that the record tells of."""
    path, record = root / f"{layer}.origins", read_record(root, layer)
    if not record:
        return {}
    if not path.is_file() or digest_of(path) != record.get("origins"):
        raise UserError(
            f"{path}: is missing, damaged or changed, so it is not known what the tree holds; --overwrite starts afresh"
        )
    with open(path, encoding="utf-8") as lines:
        return {key_of(line): line.rstrip("\n") for line in lines}


def refuse_foreign(root: Path, layer: str) -> None:
    """UserError unless a layer can be made here: in a tree of ours, or in nothing."""
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is not a directory; choose another --out")
    if layer != LAYERS[0]:
        index = read_record(root).get("root_files", ["prepare.json"])[0]
        if not (root / index).exists():
            raise UserError(f"{root}: holds no finished tree of images (no {index})")
    if read_record(root) or (root / STAGING / LAYERS[0] / "commit").exists():
        return
    names = os.listdir(root) if root.is_dir() else []
    if strangers := sorted(name for name in names if not name.startswith((LOCK, STAGING))):
        raise UserError(
            f"{root}: not empty and not made by this script (no prepare.json, but {strangers[0]}); choose another --out"
        )


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
    return DECODER.raw_decode(line, 1)[0]


def files_of(line: str) -> list[str]:
    return list(read_line(line)[2])


def held_files(root: Path, layer: str) -> Iterator[str]:
    """All that earlier runs made of a layer; if its list was lost, all that is in our folders."""
    yield from (f"{layer}.origins", f"{layer}.json", *read_record(root, layer).get("root_files", []))
    try:
        for line in finished_lines(root, layer).values():
            yield from files_of(line)
    except UserError:
        for folder in FOLDERS:
            yield from (str(path.relative_to(root)) for path in (root / folder).rglob("*") if not path.is_dir())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the record this script writes ({error}); choose another --out") from None


def index_lines(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """An index as JSON, one entry a line."""
    before = "[\n"
    for entry in entries:
        yield f"{before}{json.dumps(entry, ensure_ascii=False)}"
        before = ",\n"
    yield "\n]\n"


def digest_of(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=10)
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def differing_options(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "size 512 there, size 64 asked for", of the options that are not the same."""
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]

    def told(options: Mapping[str, Any]) -> str:
        values = ((key, options.get(key)) for key in keys)
        texts = ((key, " ".join(map(str, v)) if isinstance(v, list) else v) for key, v in values)
        return ", ".join(f"{key} {'unset' if text is None else text}" for key, text in texts)

    return f"{told(was)} there, {told(now)} asked for"


def same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def write_parts(path: Path, parts: Iterable[str]) -> None:
    with atomic_write(path) as file:
        file.writelines(part.encode() for part in parts)


def remove_file(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: can't be removed ({error.strerror})") from error


def remove_folder(path: Path) -> None:
    """Remove a folder of ours with all that is in it."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{error.filename or path}: can't be removed ({error.strerror})") from error
