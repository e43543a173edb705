"""The file that holds one plane of a cache: small uint8 pictures one after the other, behind a table.

Header (magic, number of pictures, CRC-32 of the table), table (a row of int64 for each picture: offset, height, width,
native height, native width, CRC-32 of its pixels), pixels. The file is written aside and renamed when whole.

A cache is derived, so it heals itself. `open_plane` checks the table and every picture, in threads, and makes the
damaged pictures anew from their originals, in place, after one line that says which; without a whole table, or where
the file is of an earlier version of this program, all of them. In place, so that processes that have the file mapped
are healed as well; a process killed on the way leaves what the next one heals.

One process builds or mends while others that need the file wait on a lock, which the kernel releases when its holder
dies. Files of older content are removed once no process has them open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.tree import in_threads
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write
from util.locks import file_lock

# To be raised with every change of what a cached picture holds.
PREPROCESSING_VERSION = 1

MAGIC = b"CXRMIM\0\2"
HEADER = struct.Struct("<8sqq")  # magic, number of pictures, CRC-32 of the table
OFFSET, HEIGHT, WIDTH, NATIVE_HEIGHT, NATIVE_WIDTH, CHECKSUM = range(6)  # columns of the int64 table
PICTURES_AT_ONCE = 64  # whose checksums are one task
LONG_CHECK = 5  # s, after which a check shows its progress
NAMED = 3  # damaged pictures that a message names
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
    """The pictures of one plane, read from its memory-mapped file.

    `plane[i]` is a uint8 [h, w] view of the file. Pickling holds the path alone: each process maps the
    file for itself, on first use.
    """

    def __init__(self, path: Path):
        self.path = path
        self._table: np.ndarray | None = None
        self._bytes: np.ndarray | None = None

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def open(self) -> None:
        """Map the file. Raises FileNotFoundError, or UserError where its table or its length is damaged."""
        with open(self.path, "rb") as file:
            # Held as long as the file is mapped, so that nobody removes it before other processes have
            # opened it. Where there are no locks nobody gets the one to remove it either.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # removed between opening and locking
                raise FileNotFoundError(self.path)
            table = _read_table(file.fileno(), self.path)
            if os.fstat(file.fileno()).st_size != _pixels_end(table):
                raise UserError(f"{self.path}: the cache file is damaged; start again, which makes it anew")
            data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # a handle of its own keeps the lock
        self._bytes = np.frombuffer(data, np.uint8)
        # Not the one that was read: of 377,000 pictures it has 18 MB, which workers share in the mapped file.
        self._table = self._bytes[HEADER.size : _pixels_start(len(table))].view(np.int64).reshape(table.shape)

    @property
    def table(self) -> np.ndarray:
        """int64 [n, 6]: offset in the file, height, width, native height, native width, checksum."""
        if self._table is None:
            self.open()
        return self._table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> np.ndarray:
        offset, height, width = self.table[index, :3].tolist()
        return self._bytes[offset : offset + height * width].reshape(height, width)

    def native_sizes(self) -> np.ndarray:
        """(height, width) of the original files, int64 [n, 2]."""
        return self.table[:, NATIVE_HEIGHT:CHECKSUM]


@dataclass(frozen=True)
class Damage:
    """What is wrong with a plane's file.

    Attributes:
        reason: a text without the file's name.
        table: the file's, whole; None where there is none to go by.
        places: of the pictures that are not as they were written, by the table; none where only the length is wrong.
    """

    reason: str
    table: np.ndarray | None = None
    places: tuple[int, ...] = ()


def open_plane(
    directories: Sequence[Path], kind: PlaneKind, files: Sequence[Path], *, root: Path, num_workers: int | None = None
) -> Plane:
    """The plane of these files from the first directory that has it whole, or else mended or built in the first that
    can be written.

    Args:
        root: names below it are part of the digest, its own place is not.
        num_workers: threads that check and build; default all CPUs.
    """
    file_name = plane_file_name(kind, files, root)
    doubts = []
    for directory in directories:
        plane, damage = _open_whole(directory / file_name, files, num_workers)
        if plane is not None:
            return plane
        if damage is not None:
            doubts.append((directory, damage))
    directory = _first_writable(directories)
    path = directory / file_name
    with file_lock(directory / LOCK_FILE, what=f"the cache in {directory}", wait=True):
        plane, damage = _open_whole(path, files, num_workers)
        if plane is not None:
            return plane  # another process has built or mended it meanwhile
        for place, doubt in doubts:
            if place != directory:  # and can't be written: the same pictures come here
                _warn(place / file_name, doubt.reason, f"{path} replaces it")
        for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):  # of a builder that was killed
            leftover.unlink(missing_ok=True)
        if damage is None or not _mend(path, kind, files, damage, num_workers):
            if damage is not None:
                _warn(path, damage.reason, "it is built anew from the originals")
            _build(path, kind, files, num_workers)
        for other in directory.glob(f"{_stem(kind)}*.u8"):
            if other.name != file_name:
                _remove_unless_in_use(other)
        plane = Plane(path)
        plane.open()
        return plane


def plane_file_name(kind: PlaneKind, files: Sequence[Path], root: Path) -> str:
    """Says all that the plane's content depends on, by a digest. Raises UserError for a missing original."""
    digest = hashlib.sha256(json.dumps([PREPROCESSING_VERSION, kind.name, kind.size, len(files)]).encode())
    for file in files:
        try:
            status = os.stat(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file{kind.advice}") from None
        name_in_tree = os.fspath(file).removeprefix(f"{root}{os.sep}")
        digest.update(f"{name_in_tree}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode())
    return f"{_stem(kind)}{digest.hexdigest()[:20]}.u8"


def find_damage(path: Path, files: Sequence[Path], num_workers: int | None = None) -> Damage | None:
    """Read a plane's file whole, in threads, and check it; None where all is as it was written.

    Raises one of `ABSENT` where there is nothing that this user can read.
    """
    if path.is_dir():
        raise UserError(f"{path}: a directory where a file of the cache belongs; move it away")
    with open(path, "rb") as file:
        descriptor = file.fileno()
        try:
            table = _read_table(descriptor, path)
        except UserError as error:
            return Damage(str(error).removeprefix(f"{path}: "))
        except OSError as error:  # a disk that can't give these bytes
            return Damage(f"can't be read ({error.strerror})")

        def check(start: int) -> list[int]:
            some = range(start, min(start + PICTURES_AT_ONCE, len(table)))
            pixels = table[some, HEIGHT] * table[some, WIDTH]
            buffer = memoryview(bytearray(int(pixels.max())))
            return [i for i, n in zip(some, pixels) if not _is_whole(descriptor, table[i], buffer[:n])]

        starts = range(0, len(table), PICTURES_AT_ONCE)
        found = in_threads(check, starts, num_workers)
        told = tqdm(found, f"checking {path.name}", len(starts), delay=LONG_CHECK, leave=False, disable=None)
        places = tuple(place for some in told for place in some)
        if places:
            names = ", ".join(os.fspath(files[place]) for place in places[:NAMED])
            more = f" and {len(places) - NAMED} more" if len(places) > NAMED else ""
            return Damage(
                f"{len(places)} of {len(table)} cached pictures are damaged, those of {names}{more}", table, places
            )
        if os.fstat(descriptor).st_size != _pixels_end(table):
            return Damage("the cache file has bytes too many", table)
    return None


def _is_whole(descriptor: int, row: np.ndarray, buffer: memoryview) -> bool:
    """Whether a picture's pixels are those that were written."""
    try:  # not by the mapped file: where a disk can't give a byte, that would end the process
        return os.preadv(descriptor, [buffer], int(row[OFFSET])) == len(buffer) and zlib.crc32(buffer) == row[CHECKSUM]
    except OSError:
        return False


def _read_table(descriptor: int, path: Path) -> np.ndarray:
    """The table, whole. Raises UserError."""
    head = os.pread(descriptor, HEADER.size, 0)
    magic, count, checksum = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0)
    if magic != MAGIC or count < 1 or _pixels_start(count) > os.fstat(descriptor).st_size:
        raise UserError(f"{path}: not a cache file of this version of the program")
    data = os.pread(descriptor, _pixels_start(count) - HEADER.size, HEADER.size)
    if zlib.crc32(data) != checksum:
        raise UserError(f"{path}: the cache file's table is damaged")
    return np.frombuffer(data, np.int64).reshape(count, 6)


def _open_whole(path: Path, files: Sequence[Path], num_workers: int | None) -> tuple[Plane | None, Damage | None]:
    """The plane if it is there and whole; else what is wrong with it, None if it is not there."""
    try:
        if (damage := find_damage(path, files, num_workers)) is not None:
            return None, damage
        plane = Plane(path)
        plane.open()
        return plane, None
    except ABSENT:
        return None, None


def _warn(path: Path, reason: str, mend: str) -> None:
    print(f"warning: {path}: {reason}; {mend}", file=sys.stderr, flush=True)


def _build(path: Path, kind: PlaneKind, files: Sequence[Path], num_workers: int | None) -> None:
    """Write the whole plane; headers first, so that every picture has its place before it is decoded."""
    table = np.zeros((len(files), 6), np.int64)
    with _faults_told(path, kind, table):
        sizes = list(in_threads(kind.native_size, files, num_workers))
        table[:, NATIVE_HEIGHT], table[:, NATIVE_WIDTH] = np.transpose(sizes)
        for row in table:
            row[HEIGHT], row[WIDTH] = kind.stored_size(int(row[NATIVE_HEIGHT]), int(row[NATIVE_WIDTH]))
        pixels = table[:, HEIGHT] * table[:, WIDTH]
        table[:, OFFSET] = _pixels_start(len(files)) + np.cumsum(pixels) - pixels
        if _pixels_end(table) > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, "too little room")
        with atomic_write(path) as file:
            _write_pictures(file.fileno(), table, kind, files, range(len(files)), num_workers)


def _mend(path: Path, kind: PlaneKind, files: Sequence[Path], damage: Damage, num_workers: int | None) -> bool:
    """Make the damaged pictures of a plane anew, in place. False where that can't be done: it has to be built."""
    if damage.table is None:
        return False
    if not os.access(path, os.W_OK):  # another user's, in a directory that all may write
        return False
    table = damage.table.copy()
    with _faults_told(path, kind, table), open(path, "r+b") as file:
        _warn(path, damage.reason, "made anew from the originals")
        _write_pictures(file.fileno(), table, kind, files, damage.places, num_workers)
        os.ftruncate(file.fileno(), _pixels_end(table))
        os.fsync(file.fileno())
    return True


def _write_pictures(
    descriptor: int,
    table: np.ndarray,
    kind: PlaneKind,
    files: Sequence[Path],
    places: Sequence[int],
    num_workers: int | None,
) -> None:
    """Make the pictures at some places of the table, and write them, their checksums and the table."""

    def copy(place: int) -> None:
        offset, height, width, *native_size = table[place, :CHECKSUM].tolist()
        pixels = kind.picture(files[place], tuple(native_size), (height, width)).tobytes()
        table[place, CHECKSUM] = zlib.crc32(pixels)
        _write_at(descriptor, pixels, offset)

    copies = in_threads(copy, places, num_workers)
    for _ in tqdm(copies, f"cache of {kind.name}", total=len(places), unit="image", disable=None):
        pass
    _write_at(descriptor, HEADER.pack(MAGIC, len(table), zlib.crc32(table)) + table.tobytes(), 0)


@contextlib.contextmanager
def _faults_told(path: Path, kind: PlaneKind, table: np.ndarray):
    """What can go wrong while a plane is written, as UserErrors that say what to do."""
    try:
        yield
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
            f"{path.parent}: the cache needs {_pixels_end(table) / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            f"name another disk by --cache_dir, {kind.smaller}or pass --no_cache"
        ) from None


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:  # a disk that runs full writes a part, then fails
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


def _remove_unless_in_use(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while any process holds the plane open
        path.unlink()


def _stem(kind: PlaneKind) -> str:
    return f"{kind.name}-{kind.size}-"


def _pixels_start(count: int) -> int:
    return HEADER.size + count * 6 * 8


def _pixels_end(table: np.ndarray) -> int:
    return int(table[-1, OFFSET] + table[-1, HEIGHT] * table[-1, WIDTH])
