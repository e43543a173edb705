"""Each plane of a tree decoded once: small uint8 pictures in a memory-mapped file per plane (`datasets.plane`).

A *plane* is one kind of file of a tree: gray, attention or foreground. Its pictures, scaled down to
short side `cache_size` (never up), lie one after the other in a single file, with a table of their
offsets and sizes beside it, so aspect ratios may differ. Files that entries share are held once. Readers map the
files; their pages belong to the kernel's page cache and are shared by all workers, ranks and jobs of a
node, whatever way the processes are started.

Size: cache_size**2 * 1.2 bytes for a radiograph of usual shape, 0.29 MiB at 512: 0.77 GiB a plane for
2,616 images. For the 377,000 images of MIMIC-CXR the same would be 110 GiB a plane, so pass
`cache_size=256`: 28 GiB a plane, of which the kernel keeps in memory what fits and reads the rest again;
crops then have half of the detail to draw from (at least 115 px enlarged to 224). Building reads the
originals once, on all CPUs; starting again costs one stat per original and reading the table. Nothing is
copied per rank or worker at any size.

A file's name holds a digest of everything its content depends on: names, sizes, and times of change (of content and
of status, which no copy or archive sets back) of the originals, `cache_size` and PREPROCESSING_VERSION.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.plane import ABSENT, CHECKSUM, NATIVE_HEIGHT, Plane, PlaneKind, open_plane, plane_file_name
from datasets.transforms import Box, crop_resize_flip, full_scale_foreground, grid_size
from datasets.tree import GazeTree, Problem, check_same_size
from util.errors import UserError
from util.images import image_size, read_gray, read_map

PLANES = ("gray", "attention", "foreground")  # in the order of datasets.tree.EntryFiles


def tree_plane(name: str, cache_size: int) -> PlaneKind:
    """The kind of a tree's plane: "gray", "attention" or "foreground" (whose 0/1 becomes 0/255)."""
    advice = " (run_pretrain.py --check_data lists every bad file)"
    stored_size = partial(grid_size, short_side=cache_size)
    return PlaneKind(
        name, cache_size, image_size, stored_size, partial(_tree_picture, name), advice, "a smaller --cache_size, "
    )


def _tree_picture(name: str, file: Path, native_size: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    native = read_gray(file) if name == "gray" else read_map(file)
    if native.shape != native_size:
        raise UserError(f"{file}: the file changed while it was read; start again")
    if name == "foreground":
        native = full_scale_foreground(native)
    return crop_resize_flip([native], Box(0, 0, *native_size), size)[0].numpy()


class TreeCache:
    """The cached planes of a tree, by sample."""

    def __init__(self, planes: list[Plane], positions: list[np.ndarray]):
        self.by_plane = list(zip(planes, positions))

    def planes(self, index: int) -> tuple[list[np.ndarray], tuple[int, int]]:
        """Like `GazeTree.read_planes`: uint8 [h, w] of each plane and the image's native (height, width)."""
        gray, positions = self.by_plane[0]
        native = gray.table[positions[index], NATIVE_HEIGHT:CHECKSUM].tolist()
        return [plane[positions[index]] for plane, positions in self.by_plane], tuple(native)

    def checksums(self, indices: Sequence[int]) -> bytes:
        """CRC-32 of each plane of some samples."""
        return b"".join(plane.table[positions[list(indices)], CHECKSUM].tobytes() for plane, positions in self.by_plane)


class _Column(NamedTuple):
    """A plane of a tree: its kind, each file once, the file of each sample and its place among those."""

    kind: PlaneKind
    unique: list[str]
    files: tuple[str, ...]
    positions: np.ndarray


def _columns(tree: GazeTree) -> list[_Column]:
    by_plane = list(zip(*map(tree.entry_files, tree.entries)))[: 3 if tree.preload else 2]
    columns = []
    for name, files in zip(PLANES, by_plane):
        unique = list(dict.fromkeys(files))
        place = {file: position for position, file in enumerate(unique)}
        positions = np.array([place[file] for file in files])
        columns.append(_Column(tree_plane(name, tree.cache_size), unique, files, positions))
    return columns


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
        UserError: a missing or damaged original, a damaged cache, planes of different sizes, no place to write, disk
            full.
    """
    directories = _directories(tree, cache_dir, fallback_dir)
    columns = _columns(tree)
    planes = [
        open_plane(directories, column.kind, column.unique, root=tree.root, num_workers=num_workers)
        for column in columns
    ]
    image = columns[0]
    image_sizes = planes[0].native_sizes()[image.positions]  # [n, 2]
    for plane, column in zip(planes[1:], columns[1:]):
        sizes = plane.native_sizes()[column.positions]
        for index in np.flatnonzero((sizes != image_sizes).any(1))[:1]:
            check_same_size(column.files[index], sizes[index], image.files[index], image_sizes[index])
    tree.cache = TreeCache(planes, [column.positions for column in columns])


def check_cache(
    tree: GazeTree, cache_dir: str | os.PathLike | None = None, *, fallback_dir: str | os.PathLike | None = None
) -> list[Problem]:
    """Read what `add_cache` would use of the cache, and change nothing: a line for each plane that is there, an error
    where it is damaged, or one that there is no cache yet.

    Raises:
        UserError: a missing original.
    """
    found = []
    for column in _columns(tree):
        name = plane_file_name(column.kind, column.unique, tree.root)
        for directory in _directories(tree, cache_dir, fallback_dir):
            plane = Plane(directory / name)
            try:
                plane.check()
            except ABSENT:
                continue
            except UserError as error:
                found.append(Problem("error", str(plane.path), str(error).removeprefix(f"{plane.path}: ")))
            else:
                found.append(
                    Problem("note", str(plane.path), f"{len(plane)} cached pictures, all as they were written")
                )
            break
    return found or [Problem("note", str(tree.root), "no cache of these settings yet, so none was checked")]


def _directories(
    tree: GazeTree, cache_dir: str | os.PathLike | None, fallback_dir: str | os.PathLike | None
) -> list[Path]:
    """Where the planes of a tree may be, in order of preference."""
    kind = Path(tree.index_file).stem
    name = f"{kind}-{hashlib.sha256(os.fsencode(tree.root.resolve())).hexdigest()[:8]}"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    own = tree.root / ".cache" / kind
    return [own] if fallback_dir is None else [own, Path(fallback_dir) / ".cache" / name]
