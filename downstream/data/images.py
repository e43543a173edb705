"""The images of the downstream evaluation, as published: longest side 256, padded, cropped, augmented.

Every view of an image is a function of (seed, view, index) and nothing else, so features of a view can be
computed once and kept, by any number of workers in any order.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from scipy.sparse import csr_array
from torch import Tensor
from torch.utils.data import Dataset

from datasets.plane import Plane, open_plane
from downstream.data.labelled import LabelledImages
from downstream.jobs import digest
from util.cli import finite_float
from util.errors import UserError
from util.images import read_intensities
from util.radiograph import add_dicom_contrast, is_dicom, read_dicom, read_dicom_by_maximum

SQUARE, CROP = 256, 224
CENTRE = -1  # the view of validation and tests
NORMALISATIONS = {  # mean and std of the three channels
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # published downstream evaluation
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # as the encoder was pretrained
}
MAXIMUM = {"maximum": "stored values by their maximum (published)"}
JITTER, JITTER_CHANCE, BLUR_CHANCE, FLIP_CHANCE = 0.4, 0.8, 0.5, 0.5
BLUR_SIGMA = (0.1, 2.0)
LOOKED_AT = 64  # files whose headers are read to say which options matter


@dataclass(frozen=True)
class Reading:
    """How files become 8-bit gray.

    Attributes:
        dicom_contrast: maximum (published: stored values by their maximum), or one of `util.radiograph`'s: window,
            minmax, mimic-cxr-jpg (equalised).
        intensity_max: what becomes 255 in 16-bit PNGs, 0 staying 0; None = each file's own range.
    """

    dicom_contrast: str = "maximum"
    intensity_max: float | None = None

    def read(self, path: Path) -> np.ndarray:
        """uint8 [H, W]. Raises `UserError` naming the file."""
        if is_dicom(path):
            if self.dicom_contrast == "maximum":
                return read_dicom_by_maximum(path)
            return read_dicom(path, self.dicom_contrast)
        gray = read_intensities(path)
        if gray.dtype == np.uint8:
            return gray
        low, high = (0, self.intensity_max) if self.intensity_max else (int(gray.min()), int(gray.max()))
        shifted = (np.arange(65536) - low).clip(0, high - low)
        table = np.rint(shifted * 255.0 / max(high - low, 1)).astype(np.uint8)
        return table[gray]


def fitted_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) with the longest side 256, the other cut to whole pixels."""
    longest = max(height, width)
    return max(1, height * SQUARE // longest), max(1, width * SQUARE // longest)


def area_resize(gray: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize by area: each pixel the mean of what it covers, as OpenCV's INTER_AREA. uint8 [H, W] -> size."""
    rows, columns = (_coverage(n, m) for n, m in zip(gray.shape, size, strict=True))
    small = rows @ gray.astype(np.float32)  # [h, W]
    return np.rint((columns @ small.T).T).astype(np.uint8)


@lru_cache(64)  # images of one data set have few sizes
def _coverage(n: int, m: int) -> csr_array:
    """[m, n]: the share that each of n pixels has in each of m."""
    edges, pixel = np.arange(m + 1) * (n / m), np.arange(n)
    share = np.minimum(pixel + 1, edges[1:, None]) - np.maximum(pixel, edges[:-1, None])
    return csr_array(np.where(share > 1e-9, share * (m / n), 0).astype(np.float32))


def pad_to_square(fitted: np.ndarray) -> np.ndarray:
    """uint8 [h, w] in the middle of black [256, 256]."""
    missing = [SQUARE - length for length in fitted.shape]
    return np.pad(fitted, [(n // 2, n - n // 2) for n in missing])


def draw_view(square: np.ndarray, rng: np.random.Generator, strong: bool) -> np.ndarray:
    """A training view: random crop of 224, with `strong` also brightness and contrast, blur and flip.

    The published saturation, hue and conversion to gray leave gray images as they are. uint8 [224, 224].
    """
    top, left = rng.integers(0, SQUARE - CROP + 1, 2)
    view = square[top : top + CROP, left : left + CROP]
    if not strong:
        return view
    # Every number is drawn whether it is used or not, so that one chance does not move the others.
    jitter, contrast_first, blur, flip = rng.random(4) < (JITTER_CHANCE, 0.5, BLUR_CHANCE, FLIP_CHANCE)
    brightness, contrast = rng.uniform(1 - JITTER, 1 + JITTER, 2)
    sigma = rng.uniform(*BLUR_SIGMA)
    values = view.astype(np.float32)
    for change in ("cb" if contrast_first else "bc") if jitter else "":
        values = values * brightness if change == "b" else contrast * values + (1 - contrast) * values.mean()
        values = np.clip(values, 0, 255)
    if blur:
        values = gaussian_filter(values, sigma, mode="mirror", truncate=3.0)
    if flip:
        values = values[:, ::-1]
    return np.rint(values).astype(np.uint8)


class Views(Dataset):
    """`views[index, view]` is uint8 [1, 224, 224]: view `CENTRE` the centre crop, 0, 1, ... training views.

    Args:
        seed: of the training views.
        plane: the decoded images, of `open_squares`; without it each view decodes its file again.
    """

    def __init__(
        self, images: LabelledImages, *, seed: int = 0, plane: Plane | None = None, reading: Reading | None = None
    ):
        self.files = images.files
        self.strong = images.strong_augmentation
        self.seed = seed
        self.plane = plane
        self.reading = reading or Reading()

    def __len__(self) -> int:
        return len(self.files)

    def square(self, index: int) -> np.ndarray:
        """The whole image: uint8 [256, 256]."""
        if self.plane is not None:
            return pad_to_square(self.plane[index])
        gray = self.reading.read(self.files[index])
        return pad_to_square(area_resize(gray, fitted_size(*gray.shape)))

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        index, view = place
        square = self.square(index)
        if view == CENTRE:
            start = (SQUARE - CROP) // 2
            crop = square[start : start + CROP, start : start + CROP]
        else:
            crop = draw_view(square, np.random.default_rng((self.seed, view, index)), self.strong)
        return torch.from_numpy(np.ascontiguousarray(crop))[None]


def open_squares(images: LabelledImages, cache_dir: str | os.PathLike, *, reading: Reading = Reading()) -> Plane:
    """The decoded images in one memory-mapped file below `cache_dir`, built on first use (`datasets.plane`).

    64 KiB an image at most: 7.0 GiB for ChestX-ray14, 12 GiB for CheXpert.

    Raises:
        UserError: images that can't be read, which are printed, no place to write, disk full.
    """
    squares, damaged = _decode(images, cache_dir, reading)
    if damaged:
        print("\n".join(damaged.values()), flush=True)
        raise UserError(
            f"{len(damaged)} of {len(images)} images are damaged (all are listed above), e.g. "
            f"{next(iter(damaged.values()))}; --skip_damaged leaves them out"
        )
    return squares


def leave_out_damaged(
    images: LabelledImages, cache_dir: str | os.PathLike, *, reading: Reading
) -> tuple[LabelledImages, list[str]]:
    """The images that can be read, the others' parts as they were; and what is wrong with those left out."""
    _, damaged = _decode(images, cache_dir, reading)
    places = [*damaged]
    sound = images.take([i for i in range(len(images)) if i not in damaged])
    tallies = images.tallies | {"damaged images": Counter(images.parts[places])}
    return replace(sound, damaged=tuple(images.files[i] for i in places), tallies=tallies), [*damaged.values()]


def _decode(images: LabelledImages, cache_dir: str | os.PathLike, reading: Reading) -> tuple[Plane, dict[int, str]]:
    """The decoded images, and what is wrong with those that can't be read, by their place. The file of the cache is the same
    whatever the split, and whatever is left out for damage."""
    files = sorted({*images.files, *images.damaged})
    # Another choice of files gets a directory of its own, so that two uses don't evict each other.
    root = Path(cache_dir, f"{images.name}-{digest([os.fspath(file) for file in files])[:8]}")
    name = f"fitted-{reading.dicom_contrast}-{reading.intensity_max}-{SQUARE}"
    plane = open_plane(root, name, files, partial(_fitted_picture, reading), root=root)
    places = pd.Index(files).get_indexer(images.files)
    damaged = {}
    for i in np.flatnonzero(plane.native_size[places, 0] == 0).tolist():
        damaged[i] = f"{images.files[i]}: was damaged when {plane.path} was made; delete that cache"
        try:
            reading.read(images.files[i])
        except UserError as error:
            damaged[i] = str(error)
    return Plane(plane.path, plane.rows[places]), damaged


def _fitted_picture(reading: Reading, file: str | Path) -> tuple[np.ndarray, tuple[int, int]]:
    """A damaged image is one black pixel of native size 0."""
    try:
        gray = reading.read(Path(file))
    except UserError:
        return np.zeros((1, 1), np.uint8), (0, 0)
    return area_resize(gray, fitted_size(*gray.shape)), gray.shape


def options_heeded(files: Sequence[Path]) -> list[str]:
    """Which options of `Reading` matter to these files, by the headers of some of them."""
    found = set()
    for path in files[:: len(files) // LOOKED_AT + 1]:
        with open(path, "rb") as file:
            head = file.read(26)
        if is_dicom(path):
            found.add("dicom_contrast")
        elif head.startswith(b"\x89PNG") and head[24] == 16:
            found.add("intensity_max")
    return sorted(found)


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of three channels: "half" (published downstream) or "imagenet" (as pretrained)."""
    return NORMALISATIONS[name]


def normalise(gray: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 1, H, W] -> float [B, 3, H, W]: scaled to 0..1, repeated and normalised."""
    scaled = gray.float().div_(255) if gray.dtype == torch.uint8 else gray / 255
    # Channel by channel into the result, without copies between, and with plain numbers: a tensor of them would be
    # copied to the GPU in every step, which waits for it.
    result = scaled.new_empty(len(gray), len(mean), *gray.shape[-2:])
    for channel, (centre, spread) in enumerate(zip(mean, std, strict=True)):
        torch.sub(scaled[:, 0], centre, out=result[:, channel]).div_(spread)
    return result


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `Reading` and of the cache, read back by `reading_from_args`."""
    group = parser.add_argument_group("image files")
    add_dicom_contrast(group, default=None, further=MAXIMUM)
    add = group.add_argument
    helped = "what becomes white in 16-bit PNGs (default: each file's own smallest to largest value)"
    # fmt: off
    add("--intensity_max", type=finite_float, help=helped)
    helped = "half: mean and std 0.5 (published); imagenet: as the encoder was pretrained"
    add("--normalisation", choices=NORMALISATIONS, help=helped)
    # fmt: on


def reading_from_args(args: argparse.Namespace) -> Reading:
    return Reading(args.dicom_contrast or "maximum", args.intensity_max)


def reading_as_trained(args: argparse.Namespace, trained: Mapping[str, object], name: str) -> Reading:
    """The options, but those that mattered to the images of a fine-tuned model (`trained`) as then.

    Raises:
        UserError: an option that asks for another value.
    """
    for option, value in trained.items():
        if (asked := getattr(args, option)) not in (None, value):
            raise UserError(
                f"--{option} {asked}: {name} was trained with {value}, and reads images as then; leave it out"
            )
    return replace(reading_from_args(args), **trained)
