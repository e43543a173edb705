"""Data sets of radiographs with gaze: `build_dataset` makes one from any processed tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from datasets.cache import add_cache, check_cache
from datasets.check import check_tree
from datasets.mimic import Mimic
from datasets.reflacx import Reflacx
from datasets.tree import ConcatTrees, GazeTree, Problem, SampleError, read_index
from util.errors import UserError

__all__ = ["Mimic", "Problem", "Reflacx", "SampleError", "build_dataset", "check_data"]

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
    fallback_dir: str | os.PathLike | None = None,
    num_workers: int | None = None,
) -> GazeTree | ConcatTrees:
    """Data set over one or several processed trees, told apart by their index files.

    Args:
        data_path: directory of a tree, its index file, or a list of those.
        preload: read the stored foreground instead of the Otsu foreground of the cropped attention.
        augment: random crop and flip; without it, the resized centre square.
        use_cache: read from memory-mapped planes of short side `cache_size`, built on first use by
            `num_workers` threads (default: all CPUs), in `cache_dir`, by default `<tree>/.cache` or,
            where that can't be written, `fallback_dir`; see `datasets.cache`.

    Raises:
        UserError: see `GazeTree` and `datasets.cache.add_cache`.
    """
    trees = [
        tree_type(root, input_size, min_crop_ratio, seed, preload=preload, augment=augment, cache_size=cache_size)
        for tree_type, root in map(detect_tree, _paths(data_path))
    ]
    if use_cache:
        for tree in trees:
            add_cache(tree, cache_dir, fallback_dir=fallback_dir, num_workers=num_workers)
    return trees[0] if len(trees) == 1 else ConcatTrees(trees)


def check_data(
    data_path: DataPath,
    *,
    preload: bool = False,
    use_cache: bool = False,
    cache_dir: str | os.PathLike | None = None,
    cache_size: int = 512,
    fallback_dir: str | os.PathLike | None = None,
) -> list[Problem]:
    """Read every file of the trees and return every bad entry, or those of the index alone where it has some.

    With `use_cache` the caches that `build_dataset` would use with these settings are read and checked too: notes on
    those that are whole or not there, errors for damaged ones. Raises UserError for an unreadable index.
    """
    found = []
    for tree_type, root in detect_trees(data_path):
        index = root / tree_type.index_file
        problems = [
            Problem("error", f"{index}: {problem}") for problem in tree_type.entry_problems(read_index(index)).values()
        ]
        if not problems:
            tree = tree_type(root, preload=preload, cache_size=cache_size)
            problems = check_tree(tree)
            if use_cache and any(problem.severity == "error" for problem in problems):
                problems.append(Problem("note", f"{root}: its cache was not checked, for the errors above"))
            elif use_cache:
                problems += check_cache(tree, cache_dir, fallback_dir=fallback_dir)
        found += problems
    return found


def detect_tree(path: str | os.PathLike) -> tuple[type[GazeTree], Path]:
    """The kind of a tree and its root, by its index file. Raises UserError."""
    path = Path(path)
    for tree_type in TREE_TYPES:
        if path.name == tree_type.index_file and path.is_file():
            return tree_type, path.parent
    if not path.is_dir():
        raise UserError(f"--data_path: {path} is not a directory")
    found = [tree_type for tree_type in TREE_TYPES if (path / tree_type.index_file).exists()]
    if len(found) == 1:
        return found[0], path
    if not found and (path / IMAGES_INDEX).exists():
        raise UserError(
            f"--data_path: {path} has images but no heatmaps yet; scripts/predict_gaze.py --weights "
            f"output_dir/gaze/best.pth --tree {path} makes them"
        )
    names = " or ".join(tree_type.index_file for tree_type in TREE_TYPES)
    if not found:
        raise UserError(f"--data_path: {path} has no {names}; scripts/prepare_reflacx.py makes such a tree")
    raise UserError(f"--data_path: {path} has more than one index; name the file itself: {names}")


def detect_trees(data_path: DataPath) -> list[tuple[type[GazeTree], Path]]:
    """`detect_tree` of each path that a user names. Raises UserError if a tree is named twice."""
    paths = _paths(data_path)
    found = [detect_tree(path) for path in paths]
    indexes = [(root / tree_type.index_file).resolve() for tree_type, root in found]
    for path, index in zip(paths, indexes, strict=True):
        if indexes.count(index) > 1:
            raise UserError(f"--data_path: {path} is named twice; name each tree once")
    return found


def _paths(data_path: DataPath) -> list[str | os.PathLike]:
    return [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
