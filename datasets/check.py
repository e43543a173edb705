"""Every file of a tree read, for `run_pretrain.py --check_data`: what is wrong with each entry."""

from __future__ import annotations

from functools import partial

from tqdm import tqdm

from datasets.plane import in_threads
from datasets.tree import EntryFiles, GazeTree, Problem, check_same_size
from util.errors import UserError
from util.images import read_gray, read_map

ALL_EQUAL = {
    "image": "all pixels are equal",
    "attention": "all-equal heatmap: no patch is significant",
    "foreground": "all-equal foreground: every patch is significant, or none",
}


def check_tree(tree: GazeTree) -> list[Problem]:
    """Read all files of a tree and return what is wrong with each entry, in the order of the index.

    A tree may do without a directory of foregrounds unless it was made with `preload`; where it has one, it should be
    whole.
    """
    roles = EntryFiles._fields[: 3 if (tree.root / "foreground").is_dir() else tree.n_planes]
    found = in_threads(partial(_check_entry, tree, roles), range(len(tree)))
    return [problem for own in tqdm(found, "checking files", len(tree), disable=None) for problem in own]


def _check_entry(tree: GazeTree, roles: tuple[str, ...], index: int) -> list[Problem]:
    files = tree.files(index)
    problems, image = [], None
    for role, file in zip(roles, files):
        where = f"(entry {index}, {role} of {tree.entries[index]['image_path']})"
        try:
            plane = read_gray(file) if role == "image" else read_map(file)
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
