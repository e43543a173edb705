"""The files that hold one plane of a cache: small uint8 pictures one after the other, and the table of their places.

`NAME.npy` is uint8 [bytes of all pictures]. `NAME.table.npy` is int64 [n + 1, 6]: for each picture its offset, height,
width, native height, native width and the CRC-32 of its pixels; and a last row with that of the rows before. It is
written last, so that where it is, the plane is whole. One process builds while others that need the files wait on a
lock, which the kernel releases when its holder dies.

A cache is derived, so it is not mended: whoever finds it damaged names the file to delete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.tree import in_threads
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, file_lock

# To be raised with every change of what a cached picture holds, or of how.
PREPROCESSING_VERSION = 2

OFFSET, HEIGHT, WIDTH, NATIVE_HEIGHT, NATIVE_WIDTH, CHECKSUM = range(6)  # columns of the table
LOCK_FILE = "lock"
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)  # not there, or not for this user


class PlaneKind(NamedTuple):
    """How the files of a plane become its pictures.

    Attributes:
        name, size: begin the name of the plane's file; `name` says all that `size` doesn't.
        native_size: file -> (height, width) from its header.
        stored_size: (height, width) -> (height, width) of the picture.
        picture: file, native (height, width), stored (height, width) -> uint8 [stored size].
        advice: end of the message about a file that can't be read.
        smaller: what else makes room where the disk is full, e.g. "a smaller --cache_size, ".
    """

    name: str
    size: int
    native_size: Callable[[Path], tuple[int, int]]
    stored_size: Callable[[int, int], tuple[int, int]]
    picture: Callable[[Path, tuple[int, int], tuple[int, int]], np.ndarray]
    advice: str = ""
    smaller: str = ""


class Plane:
    """The pictures of one plane, read from its memory-mapped files.

    `plane[i]` is a uint8 [h, w] view, whose checksum is compared the first time that this object reads it; it raises
    UserError where they differ. Pickling holds the path alone: each process maps the files for itself, on first use.
    """

    def __init__(self, path: Path):
        self.path = path
        self._table: np.ndarray | None = None

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def open(self) -> None:
        """Map the files. Raises one of `ABSENT` where there is nothing that this user can read, UserError where the
        table or a length is damaged."""
        try:
            rows = np.asarray(np.load(_table_path(self.path), mmap_mode="r"))
            self._pixels = np.asarray(np.load(self.path, mmap_mode="r"))
        except ABSENT:
            raise
        except Exception as error:  # NumPy has a kind of its own for each kind of damage
            raise self._damaged(" ".join(str(error).split())) from None
        table = rows[:-1]
        if rows[-1, 0] != zlib.crc32(table):
            raise self._damaged("its table")
        if len(self._pixels) != _end(table):
            raise self._damaged(f"{len(self._pixels)} bytes, expected {_end(table)}")
        self._is_checked = np.zeros(len(table), bool)
        self._table = table

    @property
    def table(self) -> np.ndarray:
        """int64 [n, 6]: offset, height, width, native height, native width, checksum."""
        if self._table is None:
            self.open()
        return self._table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> np.ndarray:
        offset, height, width, *_, checksum = self.table[index].tolist()
        pixels = self._pixels[offset : offset + height * width]
        if not self._is_checked[index]:
            if zlib.crc32(pixels) != checksum:
                raise self._damaged(f"picture {index}")
            self._is_checked[index] = True
        return pixels.reshape(height, width)

    def native_sizes(self) -> np.ndarray:
        """(height, width) of the original files, int64 [n, 2]."""
        return self.table[:, NATIVE_HEIGHT:CHECKSUM]

    def check(self) -> None:
        """Read all. Raises as `open` and `plane[i]` do."""
        found = in_threads(self.__getitem__, range(len(self)))
        for _ in tqdm(found, f"checking {self.path.name}", len(self), delay=5, leave=False, disable=None):
            pass

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: the cache is damaged ({what}); delete this file, and the next run makes it anew"
        )


def open_plane(
    directories: Sequence[Path], kind: PlaneKind, files: Sequence[Path], *, root: Path, num_workers: int | None = None
) -> Plane:
    """The plane of these files from the first directory that has it, or else built in the first that can be written.

    Args:
        root: names below it are part of the digest, its own place is not.
        num_workers: threads that build; default all CPUs.

    Raises:
        UserError: a damaged cache, an original that can't be read, no place to write, disk full.
    """
    file_name = plane_file_name(kind, files, root)
    for directory in directories:
        if (plane := _existing(directory / file_name)) is not None:
            return plane
    directory = _first_writable(directories)
    path = directory / file_name
    with file_lock(directory / LOCK_FILE, what=f"the cache in {directory}", wait=True):
        if (plane := _existing(path)) is not None:
            return plane  # another process has built it meanwhile
        for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):  # of a builder that was killed
            leftover.unlink(missing_ok=True)
        _build(path, kind, files, num_workers)
        for other in directory.glob(f"{_stem(kind)}*.npy"):  # who has it mapped keeps it
            if other not in (path, _table_path(path)):
                other.unlink(missing_ok=True)
        return _existing(path)


def plane_file_name(kind: PlaneKind, files: Sequence[Path], root: Path) -> str:
    """Says all that the plane's content depends on, by a digest. Raises UserError for a missing original."""
    digest = hashlib.sha256(json.dumps([PREPROCESSING_VERSION, kind.name, kind.size, len(files)]).encode())
    prefix = f"{root}{os.sep}"
    for file in files:
        try:
            status = os.stat(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file{kind.advice}") from None
        name_in_tree = os.fspath(file).removeprefix(prefix)
        # With the time of the status, which no archive or copy sets back.
        digest.update(f"{name_in_tree}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode())
    return f"{_stem(kind)}{digest.hexdigest()[:20]}.npy"


def _existing(path: Path) -> Plane | None:
    plane = Plane(path)
    try:
        plane.open()
        return plane
    except ABSENT:
        return None


def _build(path: Path, kind: PlaneKind, files: Sequence[Path], num_workers: int | None) -> None:
    """Write the whole plane; headers first, so that every picture has its place before it is decoded."""
    rows = np.zeros((len(files) + 1, 6), np.int64)
    table = rows[:-1]
    try:
        sizes = list(in_threads(kind.native_size, files, num_workers))
        table[:, NATIVE_HEIGHT], table[:, NATIVE_WIDTH] = np.transpose(sizes)
        for row in table:
            row[HEIGHT], row[WIDTH] = kind.stored_size(int(row[NATIVE_HEIGHT]), int(row[NATIVE_WIDTH]))
        pixels = table[:, HEIGHT] * table[:, WIDTH]
        table[:, OFFSET] = np.cumsum(pixels) - pixels
        if _end(table) > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, "too little room")
        with atomic_write(path) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (_end(table),)}
            np.lib.format.write_array_header_1_0(file, header)
            file.flush()
            start = file.tell()

            def copy(place: int) -> None:
                offset, height, width, *native_size = table[place, :CHECKSUM].tolist()
                picture = kind.picture(files[place], tuple(native_size), (height, width)).tobytes()
                table[place, CHECKSUM] = zlib.crc32(picture)
                _write_at(file.fileno(), picture, start + offset)

            copies = in_threads(copy, range(len(files)), num_workers)
            for _ in tqdm(copies, f"cache of {kind.name}", total=len(files), unit="image", disable=None):
                pass
        rows[-1, 0] = zlib.crc32(table)
        with atomic_write(_table_path(path)) as file:
            np.save(file, rows)
    except UserError as error:
        raise UserError(f"{error}{kind.advice}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{error.filename or path}: {error.strerror}, so the cache can't be made; "
                "name another place by --cache_dir, or pass --no_cache"
            ) from None
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path.parent}: the cache needs {_end(table) / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            f"name another disk by --cache_dir, {kind.smaller}or pass --no_cache"
        ) from None


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Not by a memory map, where a disk that runs full ends the process by a signal."""
    while data:  # such a disk writes a part, then fails
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


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


def _stem(kind: PlaneKind) -> str:
    return f"{kind.name}-{kind.size}-"


def _table_path(path: Path) -> Path:
    return path.with_suffix(".table.npy")


def _end(table: np.ndarray) -> int:
    """Bytes of all pictures."""
    return int(table[-1, OFFSET] + table[-1, HEIGHT] * table[-1, WIDTH])
