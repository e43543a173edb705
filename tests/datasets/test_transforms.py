"""datasets/transforms.py: equal to slow plain code, and random only as far as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from datasets.transforms import (
    Box,
    binary_foreground,
    centre_box,
    crop_resize_flip,
    full_scale_foreground,
    grid_size,
    random_crop_box,
    sample_rng,
    scale_box,
)


def bicubic_matrix(n_in: int, n_out: int) -> np.ndarray:
    """Antialiased bicubic resampling written down: Keys' kernel (a = -0.5), stretched when shrinking."""
    scale = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * scale
    x = np.abs((np.arange(n_in) + 0.5 - centres) / max(scale, 1.0))
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0))
    return matrix / matrix.sum(1, keepdims=True)


def plain_crop(plane: np.ndarray, box: Box, size: tuple[int, int], flip: bool) -> np.ndarray:
    """The same in float64, row and column sums and nothing else."""
    crop = plane[box.top : box.top + box.height, box.left : box.left + box.width].astype(np.float64)
    out = bicubic_matrix(box.height, size[0]) @ crop @ bicubic_matrix(box.width, size[1]).T
    return np.clip(out[:, ::-1] if flip else out, 0, 255)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "shape, box, size",
    [
        ((90, 70), Box(3, 5, 64, 61), (32, 32)),  # down
        ((40, 40), Box(10, 0, 20, 33), (32, 32)),  # up
        ((200, 50), Box(0, 0, 200, 50), (32, 64)),  # down and up, all of it
        ((32, 32), Box(0, 0, 32, 32), (32, 32)),  # as it is
    ],
)
def test_crop_equals_plain_code_within_one_level(flip, shape, box, size):
    """Of one to three planes; beside an edge the kernel rings, and 8-bit numbers must not wrap around."""
    # Noise soft enough that neither pass of the resizing has to clamp.
    noise = np.random.default_rng(0).integers(64, 192, (2, *shape), dtype=np.uint8)
    edge = np.zeros(shape, np.uint8)
    edge[:, 21:] = 255
    for planes in ([edge], [edge, noise[0]], [edge, *noise]):
        got = crop_resize_flip(planes, box, size, flip)
        assert got.dtype == torch.uint8 and got.shape == (len(planes), *size) and got.is_contiguous()
        for plane, result in zip(planes, got):
            assert np.abs(result.numpy() - plain_crop(plane, box, size, flip).round()).max() <= 1.0


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 900), width=st.integers(1, 900), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 2**31))
def test_box_lies_inside_and_keeps_its_promises(height, width, ratio, seed):
    box = random_crop_box(np.random.default_rng(seed), height, width, ratio)
    assert 0 <= box.top and box.top + box.height <= height and box.height >= 1
    assert 0 <= box.left and box.left + box.width <= width and box.width >= 1


def test_box_distribution_is_that_of_random_resized_crop():
    """Against torchvision's own, drawn from its own generator: areas, aspects and places alike."""
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    height, width, n = 614, 512, 3000
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = np.array([random_crop_box(sample_rng(0, 0, i), height, width, 0.2) for i in range(n)])
    for measure in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
        lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
        lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
    ):
        assert stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


def test_sizes_and_centred_boxes():
    """Pictures are scaled down only; where no crop fits, it is the largest centred box of an allowed aspect ratio."""
    for size, grid in (((3056, 2544), (615, 512)), ((400, 300), (400, 300))):
        assert grid_size(*size, 512) == grid and grid_size(*size[::-1], 512) == grid[::-1]
    for size, box in (((10, 1000), Box(0, 493, 10, 13)), ((1000, 9), Box(494, 0, 12, 9))):
        assert random_crop_box(np.random.default_rng(0), *size, 1.0) == box
    assert centre_box(10, 20) == Box(0, 5, 10, 10) and centre_box(21, 10) == Box(5, 0, 10, 10)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), height=st.integers(600, 4000), width=st.integers(600, 4000))
def test_scaled_box_covers_the_same_part(data, height, width):
    grid = grid_size(height, width, 512)
    box = random_crop_box(np.random.default_rng(data.draw(st.integers(0, 1000))), *grid, 0.2)
    native = scale_box(box, grid, (height, width))
    assert native.top + native.height <= height and native.left + native.width <= width
    edges, native_edges = (np.array([[b.top, b.left], [b.top + b.height, b.left + b.width]]) for b in (box, native))
    assert (np.abs(edges / grid * (height, width) - native_edges) < 0.5001).all()


def test_foreground_keeps_area_and_scale():
    """Half of full scale keeps a disc's area to 2%, at any offset; 0/1 and 0/255 files are alike."""
    y, x = np.mgrid[:600, :600]
    for offset in (0.0, 1.7, 3.3):
        disc = (np.hypot(y - 300 - offset, x - 310) < 150).astype(np.uint8)
        full = full_scale_foreground(disc)
        for other in (disc * np.uint8(255), full_scale_foreground(full)):
            np.testing.assert_array_equal(full, other)
        small = binary_foreground(crop_resize_flip([full], Box(0, 0, 600, 600), (64, 64)))
        assert small.unique().tolist() == [0, 1]
        assert abs(small.sum().item() * (600 / 64) ** 2 / disc.sum() - 1) < 0.02
