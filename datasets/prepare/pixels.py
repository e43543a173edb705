"""From a radiograph and its heatmaps to the pixels that a tree stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets.fixations import heatmap_to_uint8
from datasets.prepare.units import Made, Unit
from datasets.raw.readings import Exclusion
from datasets.transforms import grid_size, resize_gray
from util.errors import UserError
from util.images import write_gray
from util.masking import otsu_foreground, significant_patches
from util.radiograph import radiograph_size, read_radiograph

PATCH_GRID = 14  # patches per side at 224 px


def make_image(unit: Unit, *, out: Path | None, options: Any) -> Made:
    """Write one image and its maps below `out`; with None, check all but the image's pixels.

    The first source of `unit` is the radiograph. Its task is a `datasets.prepare.mimic.MimicTask` or a
    `datasets.prepare.readings.ReadingsTask`: `stored` is the image's path in the tree, `ids` what is left out if it can't
    be used, and `heatmaps` gives (name, heatmap) of each entry. `options` are those of the tree.
    """
    made, task, image = Made(), unit.task, unit.sources[0]
    try:
        file_size = radiograph_size(image)
        size = scaled_size(file_size, options.size)
        heatmaps = task.heatmaps(unit.sources, file_size, size, options, made)
        if made.exclusions and not heatmaps:
            return made
        gray = None if out is None else resize_gray(read_radiograph(image, options.dicom_contrast), size)
    except UserError as error:
        named = {exclusion.id for exclusion in made.exclusions}
        for name in task.ids:
            if name not in named:
                made.exclusions.append(Exclusion(name, "image unusable", str(error), is_fault=True))
        return made
    pixels = {task.stored: gray}
    for name, heatmap in heatmaps:
        maps = attention_maps(heatmap)
        made.note.setdefault("significant", []).append(count_significant(maps[1]))
        pixels |= {f"attention/{name}.png": maps[0], f"foreground/{name}.png": maps[1]}
    made.files += pixels
    for name in pixels if out is not None else ():
        write_image(out / name, pixels[name])
    return made


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the short side `short_side`, aspect ratio kept; unchanged where that would
    enlarge, and for `short_side` 0."""
    return size if short_side == 0 else grid_size(*size, short_side)


def attention_maps(heatmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stored attention and foreground (0/255) of a heatmap [H, W] >= 0: uint8 [H, W] each."""
    attention = heatmap_to_uint8(heatmap)
    foreground = otsu_foreground(torch.from_numpy(attention)[None])[0].numpy()
    return attention, foreground * np.uint8(255)


def count_significant(foreground: np.ndarray) -> int:
    """Significant patches of 196 when the whole map, uint8 [H, W] 0/255, is seen at 224 x 224 px."""
    side = 16 * PATCH_GRID
    seen = Image.fromarray(foreground).resize((side, side), Image.Resampling.BOX)
    return int(significant_patches(torch.from_numpy(np.array(seen))[None] >= 128, 16).sum())


def write_image(path: Path, gray: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gray(path, gray)
