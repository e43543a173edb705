"""Every file of a tree read, for `run_pretrain.py --check_data`: what is wrong with each entry."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from tqdm import tqdm

from datasets.build import DataPath, detect_trees
from datasets.plane import in_threads
from datasets.tree import EntryFiles, GazeTree, check_same_size, read_index, read_plane
from util.errors import UserError

ALL_EQUAL = {
    "image": "all pixels are equal",
    "attention": "all-equal heatmap: no patch is significant",
    "foreground": "all-equal foreground: every patch is significant, or none",
}


class Problem(NamedTuple):
    """One finding: severity is "error" or "warning"; the message begins with the file."""

    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


def check_data(data_path: DataPath, *, preload: bool = False) -> list[Problem]:
    """Read every file of the trees and return every bad entry, or those of the index alone where it has some. Raises
    UserError for an unreadable index."""
    found = []
    for tree_type, root in detect_trees(data_path):
        index = root / tree_type.index_file
        problems = [Problem("error", f"{index}: {problem}") for problem in tree_type.entry_problems(read_index(index))]
        found += problems or check_files(tree_type(root, preload=preload))
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
