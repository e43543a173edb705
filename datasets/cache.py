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
from datasets.transforms import Box, crop_resize_flip, full_scale_foreground, grid_size
from datasets.tree import GazeTree, Problem, check_same_size
from util.errors import UserError
from util.images import read_gray, read_map

PLANES = ("gray", "attention", "foreground")  # in the order of datasets.tree.EntryFiles
ADVICE = " (run_pretrain.py --check_data lists every bad file)"


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
    planes = [_open(tree, role, cache_dir, fallback_dir, num_workers=num_workers) for role in range(tree.n_planes)]
    image_sizes, *other_sizes = (plane.native_size(slice(None)) for plane in planes)  # [n, 2] each
    for role, sizes in enumerate(other_sizes, start=1):
        for index in np.flatnonzero((sizes != image_sizes).any(1))[:1]:
            files = tree.files(index)
            check_same_size(files[role], sizes[index], files.image, image_sizes[index])
    tree.cache = planes


def check_cache(
    tree: GazeTree, cache_dir: str | os.PathLike | None = None, *, fallback_dir: str | os.PathLike | None = None
) -> list[Problem]:
    """Read what `add_cache` would use of the cache, and change nothing: a note for each plane that is there, an error
    for a damaged one, or a note that there is no cache yet."""
    found = []
    for role in range(tree.n_planes):
        try:
            if (plane := _open(tree, role, cache_dir, fallback_dir, build=False)) is not None:
                plane.check()
                text = f"{plane.path}: {len(plane.table)} cached pictures, all as they were written"
                found.append(Problem("note", text))
        except UserError as error:
            found.append(Problem("error", str(error)))
    return found or [Problem("note", f"{tree.root}: no cache of these settings yet, so none was checked")]


def _open(
    tree: GazeTree, role: int, cache_dir: str | os.PathLike | None, fallback_dir: str | os.PathLike | None, **options
) -> Plane | None:
    """One of the planes of a tree, see `open_plane`."""
    kind = Path(tree.index_file).stem
    own = f"{kind}-{hashlib.sha256(os.fsencode(tree.root.resolve())).hexdigest()[:8]}"
    directories = [tree.root / ".cache" / kind] if cache_dir is None else [Path(cache_dir, own)]
    if cache_dir is None and fallback_dir is not None:
        directories.append(Path(fallback_dir, ".cache", own))
    files = [tree.entry_files(entry)[role] for entry in tree.entries]
    name, size = PLANES[role], tree.cache_size
    picture = partial(_picture, name, size)
    return open_plane(directories, f"{name}-{size}", files, picture, root=tree.root, advice=ADVICE, **options)


def _picture(name: str, cache_size: int, file: Path) -> tuple[np.ndarray, tuple[int, int]]:
    """A file of plane `name` (0/1 of foregrounds becomes 0/255) at short side `cache_size`, and its native size."""
    native = read_gray(file) if name == "gray" else read_map(file)
    if name == "foreground":
        native = full_scale_foreground(native)
    size = grid_size(*native.shape, cache_size)
    return crop_resize_flip([native], Box(0, 0, *native.shape), size)[0].numpy(), native.shape
