import math

import pytest
import torch
import torch.nn.functional as F

from util.hog import HOGPyramid

CELLS = (4, 8, 16, 32)
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def direct_hog(img, cell, nbins):
    """The plain way: every channel and cell size by itself, conv2d, atan2, scatter, avg_pool."""
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    weight = torch.stack([kernel, kernel.T])[:, None]
    channels = []
    for channel in img.unbind(1):
        gradient = F.conv2d(F.pad(channel[:, None], (1, 1, 1, 1), mode="reflect"), weight)
        gradient = torch.where(gradient.abs() < 1e-5, 0.0, gradient)
        gx, gy = gradient.unbind(1)
        bins = (torch.atan2(gy, gx) / math.pi * nbins).floor().long() % nbins
        planes = torch.zeros(len(img), nbins, *img.shape[2:]).scatter_(1, bins[:, None], torch.hypot(gx, gy)[:, None])
        channels.append(F.normalize(F.avg_pool2d(planes, cell), dim=1, eps=1e-12))
    return torch.cat(channels, 1).flatten(2).transpose(1, 2)


def gray_image(seed=0, batch=2, side=64):
    """A smooth random picture with values off every 8-bit tie, normalised per channel."""
    coarse = torch.rand(batch, 1, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    gray = F.interpolate(coarse, size=(side, side), mode="bicubic") + 0.05 * torch.rand(
        batch, 1, side, side, generator=torch.Generator().manual_seed(seed + 1)
    )
    return (gray - MEAN) / STD


@pytest.mark.parametrize("nbins", [9, 8])
def test_equals_the_direct_way_on_colour(nbins):
    img = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    targets = HOGPyramid(nbins, CELLS)(img)
    assert [tuple(target.shape) for target in targets] == [(2, (64 // cell) ** 2, 3 * nbins) for cell in CELLS]
    for cell, target in zip(CELLS, targets, strict=True):
        torch.testing.assert_close(target, direct_hog(img, cell, nbins), atol=1e-5, rtol=0)
    assert not torch.allclose(targets[0][..., :nbins], targets[0][..., nbins : 2 * nbins])  # the channels are their own


def test_one_channel_stands_for_three_on_gray_input():
    img = gray_image()
    one, three = HOGPyramid(9, CELLS)(img[:, :1]), HOGPyramid(9, CELLS)(img)
    for cell, a, b in zip(CELLS, one, three, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        torch.testing.assert_close(a, direct_hog(img, cell, 9), atol=1e-4, rtol=0)


def test_flat_areas_have_no_target_and_ties_are_exact():
    levels = torch.randint(0, 256, (1, 1, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    levels[..., :32, :] = 17
    levels[..., 40:52, :] = torch.arange(64, dtype=torch.uint8)  # a ramp: gy is exactly 0
    img = (levels.float() / 255 - MEAN) / STD
    fine = HOGPyramid(9, (4,))(img)[0].view(1, 16, 16, 3, 9)
    assert (fine[:, :7] == 0).all()
    assert (fine[0, 11, 1:-1, :, 0] == 1).all()  # a horizontal gradient is bin 0
    # R, G and B copies of one gray picture agree, where the published rule lets rounding decide
    torch.testing.assert_close(fine[..., 0, :], fine[..., 1, :], atol=1e-5, rtol=0)
    torch.testing.assert_close(fine[..., 0, :], fine[..., 2, :], atol=1e-5, rtol=0)


def test_cell_sizes_in_any_order_and_repeated():
    img = gray_image()
    mixed = HOGPyramid(9, (32, 4, 32, 16))(img)
    for cell, target in zip((32, 4, 32, 16), mixed, strict=True):
        torch.testing.assert_close(target, HOGPyramid(9, (cell,))(img)[0], atol=1e-5, rtol=0)
