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

A file's name holds a digest of what its content depends on: names, sizes and times of change (of the status, which no
copy or archive sets back) of the originals, and PREPROCESSING_VERSION.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np

from datasets.plane import Plane, open_plane
from datasets.transforms import grid_size, resize_gray
from datasets.tree import GazeTree, read_plane


def open_planes(tree: GazeTree, cache_dir: str | os.PathLike | None = None, *, build: bool = True) -> list[Plane]:
    """The planes of a tree's cache, for `tree.cache`, building what is missing or out of date.

    Safe to call from any number of processes at once: one builds, the others wait and use the result.

    Args:
        cache_dir: where the cache goes; each tree gets a directory of its own in it. Default: `.cache`
            in the tree.
        build: without it, the planes that are there.

    Raises:
        UserError: a missing or damaged original, a damaged cache, no place to write, disk full.
    """
    kind = Path(tree.index_file).stem
    place = hashlib.sha256(os.fsencode(tree.root.resolve())).hexdigest()[:8]
    directory = Path(cache_dir, f"{kind}-{place}") if cache_dir else tree.root / ".cache" / kind
    planes = []
    for role, files in zip(tree.roles, zip(*map(tree.entry_files, tree.entries))):
        name = f"{role.replace('image', 'gray')}-{tree.cache_size}"
        picture = partial(_picture, role, tree.cache_size)
        planes.append(open_plane(directory, name, files, picture, root=tree.root, build=build))
    return [plane for plane in planes if plane]


def _picture(role: str, cache_size: int, file: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """An entry's file at short side `cache_size`, see `read_plane`, and its native size."""
    native = read_plane(role, file)
    return resize_gray(native, grid_size(*native.shape, cache_size)), native.shape
