"""One plane of a cache: small uint8 pictures one after the other in a memory-mapped file, and a table of their places.

`NAME.npy` is uint8 [bytes of all pictures]. `NAME.table.npz` holds int64 [n, 6]: for each picture its offset, height,
width, native height, native width and the CRC-32 of its pixels; the zip format adds a CRC of its own. It is written
last, so that where it is, the plane is whole. One process builds while others that need the files wait on a lock,
which the kernel releases when its holder dies.

A cache is derived, so it is not mended: whoever finds it damaged names the file to delete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
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
PREPROCESSING_VERSION = 3

LOCK_FILE = "lock"
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)  # not there, or not for this user
ITEMS_AT_ONCE = 512  # bounds the memory that waiting results take

Item, Result = TypeVar("Item"), TypeVar("Result")
Picture = Callable[[Path], tuple[np.ndarray, tuple[int, int]]]


class Plane:
    """The pictures of one plane, read from its memory-mapped files.

    `plane[i]` is that of the i-th file, a uint8 [h, w] view, whose checksum is compared the first time that this object
    reads it; it raises UserError where they differ. Pickling holds no pixels: each process maps the files for itself.

    Attributes:
        table: int64 [n, 6]: offset, height, width, native height, native width, checksum.

    Args:
        path: of the pixels.
        rows: row of the table of each file.

    Raises:
        UserError: the table or a length is damaged; one of `ABSENT` if this user can read no such plane.
    """

    def __init__(self, path: Path, rows: np.ndarray):
        self.path, self.rows = path, rows
        try:
            # First: without it the plane is absent, whatever its table is.
            self._pixels = np.asarray(np.load(path, mmap_mode="r"))
            with np.load(_table_path(path)) as archive:
                self.table = archive["table"]
            offset, height, width, *_ = self.table[-1]
            if len(self._pixels) != offset + height * width:
                raise ValueError(f"{len(self._pixels)} bytes, expected {offset + height * width}")
        except ABSENT:
            raise
        except Exception as error:  # NumPy has a kind of its own for each kind of damage
            raise self._damaged(" ".join(str(error).split())) from None
        self._is_checked = np.zeros(len(self.table), bool)

    def __reduce__(self):
        return Plane, (self.path, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        row = self.rows[index]
        offset, height, width, *_, checksum = self.table[row].tolist()
        pixels = self._pixels[offset : offset + height * width]
        if not self._is_checked[row]:
            if zlib.crc32(pixels) != checksum:
                raise self._damaged(f"picture {row}")
            self._is_checked[row] = True
        return pixels.reshape(height, width)

    def native_size(self, indices) -> np.ndarray:
        """(height, width) of the original of one or several files, int64 [..., 2]."""
        return self.table[self.rows[indices], 3:5]

    def checksums(self, indices) -> np.ndarray:
        """CRC-32 of the pictures of several files, int64 [n]."""
        return self.table[self.rows[indices], 5]

    def check(self) -> None:
        """Read all pictures. Raises UserError as `plane[i]` does."""
        found = in_threads(self.__getitem__, range(len(self)))
        for _ in tqdm(found, f"checking {self.path.name}", len(self), delay=5, leave=False, disable=None):
            pass

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: the cache is damaged ({what}); delete this file, and the next run makes it anew"
        )


def open_plane(
    directories: Sequence[Path],
    name: str,
    files: Sequence[str | Path],
    picture: Picture,
    *,
    root: Path,
    advice: str = "",
    num_workers: int | None = None,
    build: bool = True,
) -> Plane | None:
    """The plane of these files from the first directory that has it, or else built in the first that can be written.

    Args:
        name: begins the name of the plane's file, and says what `picture` makes of a file.
        files: one that is there several times is held once.
        picture: file -> (picture, uint8 [h, w]; (height, width) of the original image).
        root: names below it are part of the digest, its own place is not.
        advice: end of the message about a file that can't be read.
        num_workers: threads that build; default all CPUs.
        build: without it, None if no directory has the plane.

    Raises:
        UserError: a damaged cache, an original that can't be read, no place to write, disk full.
    """
    row: dict[str, int] = {}
    rows = np.array([row.setdefault(os.fspath(file), len(row)) for file in files])
    file_name = f"{name}-{_digest(row, root, advice)}.npy"

    def find(places: Sequence[Path]) -> Plane | None:
        for place in places:
            with contextlib.suppress(*ABSENT):
                return Plane(place / file_name, rows)
        return None

    if (plane := find(directories)) is not None or not build:
        return plane
    directory = _first_writable(directories)
    with file_lock(directory / LOCK_FILE, what=f"the cache in {directory}", wait=True):
        if (plane := find([directory])) is not None:
            return plane  # another process has built it meanwhile
        # Of older versions, which processes that have them mapped keep, and of builders that were killed.
        for pattern in (f"{name}-*.np[yz]", f"{TEMPORARY_PREFIX}*"):
            for leftover in directory.glob(pattern):
                leftover.unlink(missing_ok=True)
        try:
            _build(directory / file_name, list(row), picture, num_workers)
        except UserError as error:
            raise UserError(f"{error}{advice}") from None
    return find([directory])


def _digest(files: Iterable[str], root: Path, advice: str) -> str:
    """Of all that the plane's content depends on, beside its name. Raises UserError for a missing original."""
    digest = hashlib.sha256(f"{PREPROCESSING_VERSION}\n".encode())
    for file in files:
        try:
            status = os.stat(file)
        except OSError as error:
            raise UserError(f"{file}: {str(error.strerror).lower()}{advice}") from None
        # The time of the status changes with the content too, and no archive or copy sets it back.
        line = f"{file.removeprefix(f'{root}{os.sep}')}\0{status.st_size} {status.st_ctime_ns}\n"
        digest.update(os.fsencode(line))
    return digest.hexdigest()[:20]


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """`map` on several threads (default: one for each CPU), for work that releases Python's lock, as
    decoding and resizing do. The first error ends it; what has not begun then is dropped."""
    with ThreadPoolExecutor(workers or available_cpus()) as pool:
        try:
            for start in range(0, len(items), ITEMS_AT_ONCE):
                yield from pool.map(function, items[start : start + ITEMS_AT_ONCE])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _build(path: Path, files: Sequence[str], picture: Picture, num_workers: int | None) -> None:
    """Append the pictures in order, by plain writes: under a memory map a full disk ends the process by a signal."""
    table: list[tuple[int, ...]] = []
    end = needed = 0
    try:
        with atomic_write(path) as file:
            _write_header(file, 0)
            pictures = in_threads(picture, files, num_workers)
            bar = tqdm(pictures, f"cache {path.name.partition('-')[0]}", len(files), unit="image", disable=None)
            for pixels, native_size in bar:
                needed = needed or pixels.size * len(files)
                if not table and needed > shutil.disk_usage(path.parent).free:
                    raise OSError(errno.ENOSPC, "too little room")
                content = pixels.tobytes()
                table.append((end, *pixels.shape, *native_size, zlib.crc32(content)))
                file.write(content)
                end += len(content)
            file.seek(0)
            _write_header(file, end)
        with atomic_write(_table_path(path)) as file:
            np.savez(file, table=np.array(table, np.int64))
    except OSError as error:
        why = str(error.strerror)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            why = f"the cache needs about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
        raise UserError(f"{path.parent}: {why}; name another place by --cache_dir, or pass --no_cache") from None


def _write_header(file, length: int) -> None:
    """NumPy's of uint8 [length], which takes the same room for every length."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (length,)})


def _first_writable(directories: Sequence[Path]) -> Path:
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / LOCK_FILE, "a"):
                return directory
        except OSError as error:
            reason = error.strerror
    raise UserError(
        f"{directories[-1]}: can't write the cache here ({reason}); name a place by --cache_dir, or pass --no_cache"
    )


def _table_path(path: Path) -> Path:
    return path.with_suffix(".table.npz")
