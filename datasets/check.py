"""Every file of a tree read, for `run_pretrain.py --check_data`: what is wrong with each entry."""

from __future__ import annotations

import os
from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from datasets.build import DataPath, detect_trees
from datasets.cache import open_planes
from datasets.plane import Plane, in_threads
from datasets.tree import EntryFiles, GazeTree, check_same_size, read_index, read_plane
from util.errors import UserError

ALL_EQUAL = {
    "image": "all pixels are equal",
    "attention": "all-equal heatmap: no patch is significant",
    "foreground": "all-equal foreground: every patch is significant, or none",
}


class Problem(NamedTuple):
    """One finding: severity is "error", "warning" or, where all is well, "note"; the message begins with the file."""

    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def check_data(
    data_path: DataPath,
    *,
    preload: bool = False,
    use_cache: bool = False,
    cache_dir: str | os.PathLike | None = None,
    cache_size: int = 512,
) -> list[Problem]:
    """Read every file of the trees and return every bad entry, or those of the index alone where it has some.

    With `use_cache` the planes of the cache that `build_dataset` would use with these settings are read too if no file is
    bad: a note for each that is whole, an error for a damaged one. Raises UserError for an unreadable index.
    """
    found = []
    for tree_type, root in detect_trees(data_path):
        index = root / tree_type.index_file
        problems = [Problem("error", f"{index}: {problem}") for problem in tree_type.entry_problems(read_index(index))]
        if not problems:
            tree = tree_type(root, preload=preload, cache_size=cache_size)
            problems = check_files(tree)
            if use_cache and not any(problem.severity == "error" for problem in problems):
                problems += check_cache(tree, cache_dir)
        found += problems
    return found


def check_files(tree: GazeTree) -> list[Problem]:
    """Read all files of a tree and return what is wrong with each entry, in the order of the index.

    A tree may do without a directory of foregrounds unless it was made with `preload`; where it has one, it should be
    whole.
    """
    roles = EntryFiles._fields if (tree.root / "foreground").is_dir() else tree.roles
    found = in_threads(partial(_check_entry, tree, roles), range(len(tree)))
    return [problem for own in tqdm(found, "checking files", len(tree), disable=None) for problem in own]


def _check_entry(tree: GazeTree, roles: tuple[str, ...], index: int) -> list[Problem]:
    files = tree.files(index)
    problems, image = [], None
    for role, file in zip(roles, files):
        where = f"(entry {index}, {role} of {tree.entries[index]['image_path']})"
        try:
            plane = read_plane(role, file)
            if role == "image":
                image = plane
            elif image is not None:
                check_same_size(file, plane.shape, files.image, image.shape)
        except UserError as error:
            problems.append(Problem("error", f"{error} {where}"))
            continue
        if plane.min() == plane.max():
            problems.append(Problem("warning", f"{file}: {ALL_EQUAL[role]} {where}"))
    return problems


def check_cache(tree: GazeTree, cache_dir: str | os.PathLike | None = None) -> list[Problem]:
    """Read the planes of a tree's cache that are there, and change nothing."""
    try:
        return [*map(_check_plane, open_planes(tree, cache_dir, build=False))]
    except UserError as error:
        return [Problem("error", str(error))]


def _check_plane(plane: Plane) -> Problem:
    try:
        for _ in in_threads(plane.__getitem__, range(len(plane.rows))):
            pass
    except UserError as error:
        return Problem("error", str(error))
    return Problem("note", f"{plane.path}: {len(plane.rows)} cached pictures, all as they were written")
