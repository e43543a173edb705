"""Each plane of a tree decoded once: small uint8 pictures in one memory-mapped file per plane.

A *plane* is one kind of file of a tree: gray, attention or foreground. Its pictures, scaled down to
short side `cache_size` (never up), lie one after the other in a single file, after a table of their
offsets and sizes, so aspect ratios may differ. Files that entries share are held once. Readers map the
file; its pages belong to the kernel's page cache and are shared by all workers, ranks and jobs of a
node, whatever way the processes are started.

Size: cache_size**2 * 1.2 bytes for a radiograph of usual shape, 0.29 MiB at 512: 0.77 GiB a plane for
2,616 images. For the 377,000 images of MIMIC-CXR the same would be 110 GiB a plane, so pass
`cache_size=256`: 28 GiB a plane, of which the kernel keeps in memory what fits and reads the rest again;
crops then have half of the detail to draw from (at least 115 px enlarged to 224). Building reads the
originals once, on all CPUs; starting again costs one stat per file. Nothing is copied per rank or
worker at any size.

A file's name holds a digest of everything its content depends on: names, sizes and modification times of
the originals, `cache_size` and PREPROCESSING_VERSION. It is written aside and renamed when whole. It holds
a checksum of each picture, and of its table: all are checked when a run starts, in threads, and a file that is damaged
is built anew after a line of warning. One
process builds while others that need it wait on a lock, which the kernel releases when its holder dies.
Files of older content are removed once no process has them open.
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from datasets.transforms import Box, crop_resize_flip, full_scale_foreground, grid_size
from datasets.tree import GazeTree, check_same_size, in_threads
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write
from util.images import image_size, read_gray
from util.locks import file_lock

# To be raised with every change of what a cached picture holds.
PREPROCESSING_VERSION = 1

MAGIC = b"CXRMIM\0\2"
HEADER = struct.Struct("<8sqq")  # magic, number of pictures, CRC-32 of the table
OFFSET, HEIGHT, WIDTH, NATIVE_HEIGHT, NATIVE_WIDTH, CHECKSUM = range(6)  # columns of the int64 table
PICTURES_AT_ONCE = 64  # whose checksums are one task
LOCK_FILE = "lock"
PLANES = ("gray", "attention", "foreground")  # in the order of datasets.tree.EntryFiles


class PlaneKind(NamedTuple):
    """How the files of a plane become its pictures.

    Attributes:
        name, size: begin the name of the plane's file; `name` says all that `size` doesn't.
        native_size: file -> (height, width) from its header.
        stored_size: (height, width) -> (height, width) of the picture.
        picture: file, native (height, width), stored (height, width) -> uint8 [stored size].
        advice: end of the message about a file that can't be read.
    """

    name: str
    size: int
    native_size: Callable[[Path], tuple[int, int]]
    stored_size: Callable[[int, int], tuple[int, int]]
    picture: Callable[[Path, tuple[int, int], tuple[int, int]], np.ndarray]
    advice: str = ""


def tree_plane(name: str, cache_size: int) -> PlaneKind:
    """The kind of a tree's plane: "gray", "attention" or "foreground" (whose 0/1 becomes 0/255)."""
    advice = " (run_pretrain.py --check_data lists every bad file)"
    stored_size = partial(grid_size, short_side=cache_size)
    return PlaneKind(name, cache_size, image_size, stored_size, partial(_tree_picture, name), advice)


def _tree_picture(name: str, file: Path, native_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    native = read_gray(file)
    if native.shape != native_size:
        raise UserError(f"{file}: the file changed while it was read; start again")
    if name == "foreground":
        native = full_scale_foreground(native)
    return crop_resize_flip([native], Box(0, 0, *native_size), size)[0].numpy()


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
        """Map the file. Raises FileNotFoundError, or UserError where it is not whole."""
        with open(self.path, "rb") as file:
            # Held as long as the file is mapped, so that nobody removes it before other processes have
            # opened it. Where there are no locks nobody gets the one to remove it either.
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 0:  # removed between opening and locking
                raise FileNotFoundError(self.path)
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEADER.size)
            magic, count, checksum = HEADER.unpack(head) if len(head) == HEADER.size else (b"", 0, 0)
            if size:
                data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)  # a handle of its own keeps the lock
        if magic != MAGIC or count < 1 or size < _pixels_start(count):
            raise UserError(f"{self.path}: not a cache file of this version of the program")
        data = np.frombuffer(data, np.uint8)
        table = data[HEADER.size : _pixels_start(count)].view(np.int64).reshape(count, 6)
        if zlib.crc32(table) != checksum or size != _pixels_end(table):
            raise UserError(f"{self.path}: the cache file is damaged")
        self._table, self._bytes = table, data

    @property
    def table(self) -> np.ndarray:
        """int64 [n, 5]: offset in the file, height, width, native height, native width."""
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

    def damaged(self, num_workers: int | None = None) -> list[int]:
        """Places of the pictures whose pixels are not those that were written; reads them all, in threads."""

        def check(start: int) -> list[int]:
            places = range(start, min(start + PICTURES_AT_ONCE, len(self)))
            return [i for i in places if zlib.crc32(self[i]) != int(self.table[i, CHECKSUM])]

        starts = range(0, len(self), PICTURES_AT_ONCE)
        return [place for found in in_threads(check, starts, num_workers) for place in found]


class TreeCache:
    """The cached planes of a tree, by sample."""

    def __init__(self, planes: list[Plane], positions: list[np.ndarray]):
        self.by_plane = list(zip(planes, positions))

    def planes(self, index: int) -> tuple[list[np.ndarray], tuple[int, int]]:
        """Like `GazeTree.read_planes`: uint8 [h, w] of each plane and the image's native (height, width)."""
        gray, positions = self.by_plane[0]
        native = gray.table[positions[index], NATIVE_HEIGHT:CHECKSUM].tolist()
        return [plane[positions[index]] for plane, positions in self.by_plane], tuple(native)


def add_cache(
    tree: GazeTree,
    cache_dir: str | os.PathLike | None = None,
    *,
    fallback_dir: str | os.PathLike | None = None,
    num_workers: int | None = None,
) -> None:
    """Let a tree read its planes from the cache, building what is missing or out of date.

    Safe to call from any number of processes at once: one builds, the others wait and use the result.

    Args:
        cache_dir: where the cache goes; each tree gets a directory of its own in it. Default: `.cache`
            in the tree, or, where that can't be written, `fallback_dir`.
        num_workers: threads that build; default all CPUs.

    Raises:
        UserError: a missing or damaged original, planes of different sizes, no place to write, disk full.
    """
    files = [tree.files(index) for index in range(len(tree))]
    columns = list(zip(*files))[: 3 if tree.preload else 2]
    directories = _directories(tree, cache_dir, fallback_dir)
    planes, positions = [], []
    for name, column in zip(PLANES, columns):
        unique = list(dict.fromkeys(column))
        place = {file: position for position, file in enumerate(unique)}
        positions.append(np.array([place[file] for file in column]))
        planes.append(
            open_plane(
                directories,
                tree_plane(name, tree.cache_size),
                unique,
                root=tree.root,
                num_workers=num_workers,
            )
        )
    image_sizes = planes[0].native_sizes()[positions[0]]  # [n, 2]
    for plane, column, position in zip(planes[1:], columns[1:], positions[1:]):
        sizes = plane.native_sizes()[position]
        for index in np.flatnonzero((sizes != image_sizes).any(1))[:1]:
            check_same_size(column[index], sizes[index], columns[0][index], image_sizes[index])
    tree.cache = TreeCache(planes, positions)


def open_plane(
    directories: Sequence[Path],
    kind: PlaneKind,
    files: Sequence[Path],
    *,
    root: Path,
    num_workers: int | None = None,
) -> Plane:
    """The plane of these files from the first directory that has it, or else built in the first that
    can be written.

    Args:
        root: names below it are part of the digest, its own place is not.
        num_workers: threads that build; default all CPUs.
    """
    stem = f"{kind.name}-{kind.size}-"
    file_name = f"{stem}{_digest(kind, files, root)}.u8"
    for directory in directories:
        if (plane := _open_existing(directory / file_name, num_workers)) is not None:
            return plane
    directory = _first_writable(directories)
    with file_lock(directory / LOCK_FILE, what=f"the cache in {directory}", wait=True):
        if (plane := _open_existing(directory / file_name, num_workers, quiet=True)) is not None:
            return plane  # another process has built it meanwhile
        for leftover in directory.glob(f"{TEMPORARY_PREFIX}*"):  # of a builder that was killed
            leftover.unlink(missing_ok=True)
        _build(directory / file_name, kind, files, num_workers)
        for other in directory.glob(f"{stem}*.u8"):
            if other.name != file_name:
                _remove_unless_in_use(other)
        plane = Plane(directory / file_name)
        plane.open()
        return plane


def _open_existing(path: Path, num_workers: int | None, *, quiet: bool = False) -> Plane | None:
    """The plane, if it is there and whole. A cache is derived, so what is damaged, or of an earlier version of this
    program, is built anew, after a line that says so."""
    plane = Plane(path)
    try:
        plane.open()
        damaged = plane.damaged(num_workers)
        if not damaged:
            return plane
        reason = (
            f"{path}: {len(damaged)} of {len(plane)} cached pictures are damaged, the first is {damaged[0]}"
        )
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # nothing there, or not for this user: the next place may do
    except UserError as error:
        reason = str(error)
    if not quiet:
        print(f"warning: {reason}; it is built anew from the originals", file=sys.stderr, flush=True)
    return None


def _build(path: Path, kind: PlaneKind, files: Sequence[Path], num_workers: int | None) -> None:
    """Write the whole plane; headers first, so that every picture has its place before it is decoded."""
    try:
        table = np.zeros((len(files), 6), np.int64)
        sizes = list(in_threads(kind.native_size, files, num_workers))
        table[:, NATIVE_HEIGHT], table[:, NATIVE_WIDTH] = np.transpose(sizes)
        for row in table:
            row[HEIGHT], row[WIDTH] = kind.stored_size(int(row[NATIVE_HEIGHT]), int(row[NATIVE_WIDTH]))
        pixels = table[:, HEIGHT] * table[:, WIDTH]
        table[:, OFFSET] = _pixels_start(len(files)) + np.cumsum(pixels) - pixels
        needed = _pixels_end(table)
        if needed > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, "too little room")

        def copy(index: int) -> None:
            offset, height, width, *native_size = table[index, :CHECKSUM].tolist()
            picture = kind.picture(files[index], tuple(native_size), (height, width))
            pixels = picture.tobytes()
            table[index, CHECKSUM] = zlib.crc32(pixels)
            _write_at(file.fileno(), pixels, offset)

        with atomic_write(path) as file:
            copies = in_threads(copy, range(len(files)), num_workers)
            for _ in tqdm(copies, f"cache of {kind.name}", total=len(files), unit="image", disable=None):
                pass
            header = HEADER.pack(MAGIC, len(files), zlib.crc32(table))
            _write_at(file.fileno(), header + table.tobytes(), 0)
    except UserError as error:
        raise UserError(f"{error}{kind.advice}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(path.parent).free
        raise UserError(
            f"{path.parent}: the cache needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
            "name another disk by --cache_dir, a smaller --cache_size, or pass --no_cache"
        ) from None


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    while data:  # a disk that runs full writes a part, then fails
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _digest(kind: PlaneKind, files: Sequence[Path], root: Path) -> str:
    """Digest of all that a plane's content depends on. Raises UserError for a missing file."""
    digest = hashlib.sha256(json.dumps([PREPROCESSING_VERSION, kind.name, kind.size, len(files)]).encode())
    for file in files:
        try:
            status = os.stat(file)
        except FileNotFoundError:
            raise UserError(f"{file}: no such file{kind.advice}") from None
        name_in_tree = os.fspath(file).removeprefix(f"{root}{os.sep}")
        digest.update(f"{name_in_tree}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def _directories(
    tree: GazeTree, cache_dir: str | os.PathLike | None, fallback_dir: str | os.PathLike | None
) -> list[Path]:
    """Where the planes of a tree may be, in order of preference."""
    kind = Path(tree.index_file).stem
    name = f"{kind}-{hashlib.sha256(str(tree.root.resolve()).encode()).hexdigest()[:8]}"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    own = tree.root / ".cache" / kind
    return [own] if fallback_dir is None else [own, Path(fallback_dir) / ".cache" / name]


def _first_writable(directories: Sequence[Path]) -> Path:
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / LOCK_FILE, "a"):
                return directory
        except OSError as error:
            reason = error.strerror
    raise UserError(
        f"{directories[-1]}: can't write the cache here ({reason}); "
        "name a place by --cache_dir, or pass --no_cache"
    )


def _remove_unless_in_use(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while any process holds the plane open
        path.unlink()


def _pixels_start(count: int) -> int:
    return HEADER.size + count * 6 * 8


def _pixels_end(table: np.ndarray) -> int:
    return int(table[-1, OFFSET] + table[-1, HEIGHT] * table[-1, WIDTH])
