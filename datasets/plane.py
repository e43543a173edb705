"""One plane of a cache: small uint8 pictures one after the other in a memory-mapped file, and a table of their places.

`NAME.pixels` holds the bytes of all pictures, nothing else. `NAME.npz` holds int64 [n, 6]: for each picture its offset,
height, width, native height, native width and the CRC-32 of its pixels; the zip format adds a CRC of its own. It is
written last, so that where it is, the plane is whole. One process builds while others that need the files wait on a
lock, which the kernel releases when its holder dies.

A cache is derived, so it is not mended: whoever finds it damaged names the file to delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from util.cli import available_cpus
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, file_lock

# To be raised with every change of what a cached picture holds, or of how.
PREPROCESSING_VERSION = 4

LOCK_FILE = "lock"
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)  # not there, or not for this user
ITEMS_AT_ONCE = 512  # bounds the memory that waiting results take
ELSEWHERE = "; give another place with --cache_dir, or pass --no_cache"

Item, Result = TypeVar("Item"), TypeVar("Result")
Picture = Callable[[Path], tuple[np.ndarray, tuple[int, int]]]


class Plane:
    """The pictures of one plane, read from its memory-mapped files.

    `plane[i]` is that of the i-th file, a uint8 [h, w] view, whose checksum is compared the first time that this object
    reads it; it raises UserError where they differ. Pickling holds no pixels: each process maps the files for itself.

    Attributes:
        table: int64 [n, 6], a row per file: offset, height, width, native height, native width, checksum.
        native_size, checksums: columns of it, [n, 2] and [n].

    Args:
        path: of the pixels.
        rows: which row of the stored table each file has.

    Raises:
        UserError: the table or a length is damaged; one of `ABSENT` if this user can read no such plane.
    """

    def __init__(self, path: Path, rows: np.ndarray):
        self.path, self.rows = path, rows
        try:
            # First: without it the plane is absent, whatever its table is.
            self._pixels = np.asarray(np.memmap(path, mode="r"))
            with np.load(path.with_suffix(".npz")) as archive:
                table = archive["table"]
            offset, height, width, *_ = table[-1]
            if len(self._pixels) != offset + height * width:
                raise ValueError(f"{len(self._pixels)} bytes, expected {offset + height * width}")
        except ABSENT:
            raise
        except Exception as error:  # NumPy has a kind of its own for each kind of damage
            raise self._damaged(" ".join(str(error).split())) from None
        self.table = table[rows]
        self.native_size, self.checksums = self.table[:, 3:5], self.table[:, 5]
        self._is_checked = np.zeros(len(rows), bool)

    def __reduce__(self):
        return Plane, (self.path, self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        offset, height, width, *_, checksum = self.table[index].tolist()
        pixels = self._pixels[offset : offset + height * width]
        if not self._is_checked[index]:
            if zlib.crc32(pixels) != checksum:
                raise self._damaged(f"picture {self.rows[index]}")
            self._is_checked[index] = True
        return pixels.reshape(height, width)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: the cache is damaged ({what}); delete this file, and the next run makes it anew"
        )


def open_plane(
    directory: Path, name: str, files: Sequence[str | Path], picture: Picture, *, root: Path, build: bool = True
) -> Plane | None:
    """The plane of these files in a directory, built if it is not there.

    Args:
        name: begins the name of the plane's file, and says what `picture` makes of a file.
        files: one that is there several times is held once.
        picture: file -> (picture, uint8 [h, w]; (height, width) of the original image).
        root: names below it are part of the digest, its own place is not.
        build: without it, None if the directory has no such plane.

    Raises:
        UserError: a damaged cache, an original that can't be read, no place to write, disk full.
    """
    row: dict[str, int] = {}
    rows = np.array([row.setdefault(os.fspath(file), len(row)) for file in files])
    path = directory / f"{name}-{_digest(row, root)}.pixels"
    with contextlib.suppress(*ABSENT):
        return Plane(path, rows)
    if not build:
        return None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK_FILE).touch()
    except OSError as error:
        raise UserError(f"{directory}: can't write the cache here ({error.strerror}){ELSEWHERE}") from None
    with file_lock(directory / LOCK_FILE, what=f"the cache in {directory}", wait=True):
        with contextlib.suppress(*ABSENT):
            return Plane(path, rows)  # another process has built it meanwhile
        # Of older versions, which processes that have them mapped keep, and of builders that were killed.
        for pattern in (f"{name}-*", f"{TEMPORARY_PREFIX}*"):
            for leftover in directory.glob(pattern):
                leftover.unlink(missing_ok=True)
        _build(path, list(row), picture)
    return Plane(path, rows)


def _digest(files: Iterable[str], root: Path) -> str:
    """Of all that the plane's content depends on, beside its name. Raises UserError for a missing original."""
    digest = hashlib.sha256(f"{PREPROCESSING_VERSION}\n".encode())
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise UserError(f"{file}: {str(error.strerror).lower()}") from None
        # The time of the status changes with the content too, and no archive or copy sets it back.
        line = f"{file.removeprefix(f'{root}{os.sep}')}\0{status.st_size} {status.st_ctime_ns}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()[:20]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map` on a thread for each CPU, for work that releases Python's lock, as decoding and resizing do. The first
    error ends it; what has not begun then is dropped."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        for start in range(0, len(items), ITEMS_AT_ONCE):
            yield from pool.map(function, items[start : start + ITEMS_AT_ONCE])


def _build(path: Path, files: Sequence[str], picture: Picture) -> None:
    """Append the pictures in order, by plain writes: under a memory map a full disk ends the process by a signal."""
    table: list[tuple[int, ...]] = []
    end = needed = 0
    try:
        with atomic_write(path) as file:
            what = f"cache {path.name.partition('-')[0]}"
            for pixels, native_size in tqdm(in_threads(picture, files), what, len(files), unit="image", disable=None):
                if not table:
                    needed = pixels.size * len(files)
                    os.posix_fallocate(file.fileno(), 0, needed)  # a disk that is too small says so now
                content = pixels.tobytes()
                table.append((end, *pixels.shape, *native_size, zlib.crc32(content)))
                end += file.write(content)
            file.truncate(end)
        with atomic_write(path.with_suffix(".npz")) as file:
            np.savez(file, table=np.array(table, np.int64))
    except OSError as error:
        size = f"the cache needs about {needed / 2**30:.2f} GiB"
        raise UserError(f"{path.parent}: {error.strerror}; {size}{ELSEWHERE}") from None
