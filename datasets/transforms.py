"""One random crop and flip for the planes of a sample, on uint8, from numbers anyone can draw again.

Crops are drawn in the pixels of the *grid*: the image scaled down to short side `cache_size` (see
`grid_size`), whether a cache is in use or not. Native files are cut at the same place to the nearest
pixel, so a sample hardly depends on where its pixels come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10


class Box(NamedTuple):
    """A rectangle in pixels, origin top left."""

    top: int
    left: int
    height: int
    width: int


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: a function of these three and nothing else."""
    return np.random.default_rng((seed, epoch, index))


def grid_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """(height, width) of an image scaled so that its short side is `short_side`; never enlarged."""
    short = min(height, width)
    if short <= short_side:
        return height, width
    return round(height * short_side / short), round(width * short_side / short)


def random_crop_box(rng: np.random.Generator, height: int, width: int, min_crop_ratio: float) -> Box:
    """Where RandomResizedCrop cuts (Szegedy et al. 2015, in torchvision's form).

    Area uniform in (min_crop_ratio, 1) of the image, log-uniform aspect ratio in (3/4, 4/3), uniform
    place; after 10 tries that don't fit, the largest centred box of an allowed aspect ratio.
    """
    for _ in range(CROP_TRIES):
        area = height * width * rng.uniform(min_crop_ratio, 1.0)
        aspect = math.exp(rng.uniform(math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(0, height - box_height + 1))
            left = int(rng.integers(0, width - box_width + 1))
            return Box(top, left, box_height, box_width)
    box_width = min(width, max(1, round(height * CROP_ASPECT[1])))
    box_height = min(height, max(1, round(width / CROP_ASPECT[0])))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def centre_box(height: int, width: int) -> Box:
    """The largest centred square: what is left of resizing the short side and cropping the centre."""
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def scale_box(box: Box, grid: tuple[int, int], size: tuple[int, int]) -> Box:
    """The box at the same place of the picture at another size (both (height, width)), rounded to pixels."""
    rows, columns = size[0] / grid[0], size[1] / grid[1]
    top, left = round(box.top * rows), round(box.left * columns)
    bottom, right = round((box.top + box.height) * rows), round((box.left + box.width) * columns)
    return Box(top, left, max(1, bottom - top), max(1, right - left))


def crop_resize_flip(planes: Sequence[np.ndarray], box: Box, size: tuple[int, int], flip: bool = False) -> Tensor:
    """Cut the same box out of planes of one size and resize it: bicubic, antialiased, on uint8.

    Args:
        planes: C arrays, uint8 [H, W].
        size: (height, width) of the result.

    Returns:
        uint8 [C, height, width]. The bicubic kernel's overshoot is clamped to 0..255.
    """
    # One interleaved (channels last) buffer: torch's vectorised uint8 kernel then resizes all planes in
    # one pass, about 5 times faster than Pillow and 3 times faster than plane by plane.
    crop = np.empty((box.height, box.width, len(planes)), np.uint8)
    for channel, plane in enumerate(planes):
        crop[..., channel] = plane[box.top : box.top + box.height, box.left : box.left + box.width]
    resized = torch.from_numpy(crop).permute(2, 0, 1)  # [C, h, w]
    if (box.height, box.width) != size:
        resized = resize(resized, list(size), InterpolationMode.BICUBIC, antialias=True)
    return (resized.flip(-1) if flip else resized).contiguous()


def resize_gray(gray: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A whole picture, uint8 [H, W], at (height, width) `size`; see `crop_resize_flip`."""
    return crop_resize_flip([gray], Box(0, 0, *gray.shape), size)[0].numpy()


def full_scale_foreground(foreground: np.ndarray) -> np.ndarray:
    """A stored foreground of 0/1 or 0/255 as 0..255, uint8 [H, W]."""
    return foreground * np.uint8(255) if foreground.max() <= 1 else foreground


def binary_foreground(resized: Tensor) -> Tensor:
    """0/1 from a foreground of 0..255 after resizing: uint8, 1 from half of full scale (METHOD: "counts
    from half").

    Why not nearest neighbour: at 224 px of a native radiograph it keeps one pixel in a hundred, so thin
    parts of the foreground come and go with the crop's offset. Antialiased resizing weighs all of them,
    and half of full scale keeps the area of a region with a smooth outline. Values stay gray in the
    cache and are cut once, at the end: cutting twice would move outlines.
    """
    return (resized >= 128).to(torch.uint8)
