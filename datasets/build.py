"""Data sets of radiographs with gaze: `build_dataset` makes one from any processed tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets.cache import open_planes
from datasets.mimic import Mimic
from datasets.reflacx import Reflacx
from datasets.tree import ConcatTrees, GazeTree
from util.errors import UserError

DataPath = str | os.PathLike | Sequence[str | os.PathLike]
TREE_TYPES = (Reflacx, Mimic)
IMAGES_INDEX = "images.json"  # of a tree whose heatmaps are still to be predicted


def build_dataset(
    data_path: DataPath,
    *,
    input_size: int = 224,
    min_crop_ratio: float = 0.2,
    seed: int = 0,
    preload: bool = False,
    augment: bool = True,
    use_cache: bool = True,
    cache_dir: str | os.PathLike | None = None,
    cache_size: int = 512,
) -> GazeTree | ConcatTrees:
    """Data set over one or several processed trees; the index file says of which kind each is.

    Args:
        data_path: directory of a tree, its index file, or a list of those.
        preload: read the stored foreground instead of the Otsu foreground of the cropped attention.
        augment: random crop and flip; without it, the resized centre square.
        use_cache: read from memory-mapped planes of short side `cache_size`, built on first use in `cache_dir`, by
            default `<tree>/.cache`; see `datasets.cache`.

    Raises:
        UserError: see `detect_trees`, `GazeTree` and `datasets.cache.open_planes`.
    """
    trees = [
        tree_type(root, input_size, min_crop_ratio, seed, preload=preload, augment=augment, cache_size=cache_size)
        for tree_type, root in detect_trees(data_path)
    ]
    if use_cache:
        for tree in trees:
            tree.cache = open_planes(tree, cache_dir)
    return trees[0] if len(trees) == 1 else ConcatTrees(trees)


def detect_tree(path: str | os.PathLike) -> tuple[type[GazeTree], Path]:
    """The kind of a tree and its root, by its index file. Raises UserError."""
    path = Path(path)
    if named := [(kind, path.parent) for kind in TREE_TYPES if path.name == kind.index_file and path.is_file()]:
        return named[0]
    found = [(kind, path) for kind in TREE_TYPES if (path / kind.index_file).exists()]
    if len(found) == 1:
        return found[0]
    names = " or ".join(kind.index_file for kind in TREE_TYPES)
    if found:
        raise UserError(f"--data_path: {path} has more than one index; name the file itself: {names}")
    if not path.is_dir():
        raise UserError(f"--data_path: {path} is not a directory")
    if (path / IMAGES_INDEX).exists():
        raise UserError(
            f"--data_path: {path} has images but no heatmaps yet; scripts/predict_gaze.py --weights "
            f"output_dir/gaze/best.pth --tree {path} makes them"
        )
    raise UserError(f"--data_path: {path} has no {names}; scripts/prepare_reflacx.py makes such a tree")


def detect_trees(data_path: DataPath) -> list[tuple[type[GazeTree], Path]]:
    """`detect_tree` of each path that a user names. Raises UserError if a tree is named twice."""
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else data_path
    found = [detect_tree(path) for path in paths]
    indexes = [(root / kind.index_file).resolve() for kind, root in found]
    for path, index in zip(paths, indexes):
        if indexes.count(index) > 1:
            raise UserError(f"--data_path: {path} is named twice; name each tree once")
    return found
