"""The files at the root of a prepared tree: their names, reading them, and changing them whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets.prepare.origins import digest_of, key_of, read_line, read_lines
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write

LAYERS = ("prepare", "gaze")  # each is made from the one before it
STAGING, LOCK, REMOVING = ".making", ".prepare.lock", "prepare.removing"
# Trees of format 1 list neither their files nor their indexes.
OLD_FOLDERS = ("images", "files", "attention", "foreground")
OLD_INDEXES = ("reflacx.json", "mimic-cxr-jpg-cleanv4.json")


def record_file(root: Path, layer: str = LAYERS[0]) -> Path:
    return root / f"{layer}.json"


def origins_file(root: Path, layer: str) -> Path:
    return root / f"{layer}.origins"


def journal_files(root: Path, layer: str) -> list[Path]:
    return sorted([*root.glob(f"{layer}.journal"), *root.glob(f"{layer}-*.journal")])


def read_record(root: Path, layer: str = LAYERS[0]) -> dict[str, Any]:
    """The record of a layer; empty where there is none. Raises UserError where it is not of this program."""
    path = record_file(root, layer)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["options"].items()
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the record this script writes ({error}); choose another --out") from None
    return record


def refuse_foreign(root: Path, layer: str) -> None:
    """UserError unless a layer can be made here: in a tree of ours, or in nothing."""
    first = record_file(root).name
    if root.exists() and not root.is_dir():
        raise UserError(f"{root}: is not a directory; choose another --out")
    if layer != LAYERS[0]:
        below = root_files(root, LAYERS[LAYERS.index(layer) - 1])
        if not below or not (root / below[0]).exists():
            raise UserError(f"{root}: holds no finished tree of images (no {below[0] if below else first})")
    if (root / first).exists():
        return
    ours = (LOCK, STAGING, f"{TEMPORARY_PREFIX}{first}")
    names = os.listdir(root) if root.is_dir() else []
    if strangers := sorted(name for name in names if not name.startswith(ours)):
        raise UserError(
            f"{root}: not empty and not made by this script (no {first}, but {strangers[0]}); choose another --out"
        )


def differing_options(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "size 512 there, size 64 asked for", of the options that are not the same."""
    keys = [key for key in {**was, **now} if was.get(key) != now.get(key)]

    def told(options: Mapping[str, Any]) -> str:
        values = ((key, options.get(key)) for key in keys)
        texts = ((key, " ".join(map(str, v)) if isinstance(v, list) else v) for key, v in values)
        return ", ".join(f"{key} {'unset' if text is None else text}" for key, text in texts)

    return f"{told(was)} there, {told(now)} asked for"


def root_files(root: Path, layer: str) -> list[str]:
    """Names of the index and the tables of a layer, as its record tells."""
    record = read_record(root, layer)
    if not record:
        return []
    return list(record.get("root_files", OLD_INDEXES))


def finished_lines(root: Path, layer: str) -> dict[str, str]:
    """The lines of a layer's origins by key, in their order; none where the layer never was finished. UserError where
    a finished layer has not the list that this program left."""
    path, record = origins_file(root, layer), read_record(root, layer)
    # Killed while it finishes or is removed, a layer has no index, and origins and record may not fit.
    whole = record.get("finished") and any((root / name).exists() for name in root_files(root, layer)[:1])
    lines = {key_of(line): line for line in read_lines(path)} if path.exists() else {}
    if whole and record.get("origins") != digest_of(lines.values()):
        raise UserError(
            f"{path}: is away, damaged or changed, so it can't be told what the tree holds; --overwrite starts afresh"
        )
    return lines


def index_lines(entries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """An index as JSON, one entry a line."""
    before = "[\n"
    for entry in entries:
        yield f"{before}{json.dumps(entry, ensure_ascii=False)}"
        before = ",\n"
    yield "\n]\n"


def pretty_json(content: object) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def has_content(path: Path, parts: Iterable[str]) -> bool:
    """Whether a file consists of these parts, read side by side."""
    try:
        with open(path, "rb") as file:
            return all(file.read(len(data)) == data for data in map(str.encode, parts)) and not file.read(1)
    except FileNotFoundError:
        return False


def write_parts(path: Path, parts: Iterable[str]) -> None:
    with atomic_write(path) as file:
        for part in parts:
            file.write(part.encode())


def has_size(path: str, size: int) -> bool:
    try:
        return os.stat(path).st_size == size
    except OSError:
        return False


def same_files(one: Path, other: Path, names: Iterable[str]) -> bool:
    """Whether two directories have the same files of these names, byte for byte."""
    with contextlib.suppress(FileNotFoundError):
        return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)
    return False


def move_file(source: Path, target: Path) -> None:
    """Rename, also where a folder of the tree is a link to another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with open(source, "rb") as whole, atomic_write(target) as copy:
            shutil.copyfileobj(whole, copy)
        source.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder of ours with all that is in it; UserError where that can't be done."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{error.filename or path}: can't be removed ({error.strerror})") from error


def remove_files(root: Path, names: Iterable[str]) -> None:
    """Remove files below `root`, and the directories that are empty then; UserError where that can't be done."""
    directories = set()
    for name in names:
        path = root / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: can't be removed ({error.strerror})") from error
        directories.update(path.parents[: len(Path(name).parts) - 1])
    for directory in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):  # not empty
            directory.rmdir()


def begin_removing(root: Path, layer: str) -> None:
    """Note down all files of a layer and of those above it, and take their indexes away; `end_removing` removes
    them, now or after an interruption."""
    names: dict[str, None] = {}
    indexes: list[str] = []
    for own in LAYERS[LAYERS.index(layer) :]:
        record = read_record(root, own)
        indexes += root_files(root, own)
        lists = [*root.glob(f"{own}.origins"), *journal_files(root, own)]
        try:
            finished_lines(root, own)
            whole = True
        except (UserError, ValueError):
            whole = False
        for path in lists:
            try:
                for line in read_lines(path):
                    if line.startswith("["):
                        names.update(dict.fromkeys(read_line(line)[2]))
            except UserError:  # damaged: what it listed is in our folders
                whole = False
        if record and (record["options"].get("format") == 1 or not whole):
            for folder in OLD_FOLDERS:
                below = (path for path in (root / folder).rglob("*") if not path.is_dir())
                names.update(dict.fromkeys(str(path.relative_to(root)) for path in below))
        names.update(dict.fromkeys(path.name for path in lists))
        if own != layer:
            names[record_file(root, own).name] = None
    write_parts(root / REMOVING, (json.dumps(name) + "\n" for name in [*indexes, *names]))
    remove_files(root, indexes)


def end_removing(root: Path) -> None:
    """Remove what `begin_removing` noted down, if anything."""
    path = root / REMOVING
    if path.exists():
        with open(path, encoding="utf-8") as lines:
            remove_files(root, [json.loads(line) for line in lines])
        path.unlink()


def remove_temporaries(root: Path, names: Iterable[str]) -> None:
    """Remove what a killed process left of writing the files `names` at the root."""
    for name in names:
        for path in root.glob(f"{TEMPORARY_PREFIX}{name}-*"):
            path.unlink()
