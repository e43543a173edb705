"""From a radiograph and a heatmap to the pixels that a tree stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets.transforms import Box, crop_resize_flip, grid_size
from util.gaze import heatmap_to_uint8
from util.images import write_gray
from util.masking import otsu_foreground, significant_patches

PATCH_GRID = 14  # patches per side at 224 px


def scaled_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) with the short side `short_side`, aspect ratio kept; unchanged where that would
    enlarge, and for `short_side` 0."""
    return size if short_side == 0 else grid_size(*size, short_side)


def resize_gray(gray: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] resized to (height, width) `size`, bicubic with antialiasing."""
    return crop_resize_flip([gray], Box(0, 0, *gray.shape), size)[0].numpy()


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
