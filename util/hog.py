"""Histograms of oriented gradients at several cell sizes, from one gradient pass.

Source: the target of LocalMIM (Wang et al., CVPR 2023) as CXR-MIM uses it, after Dalal and Triggs
(CVPR 2005), without block normalisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# A gradient component below this counts as exactly zero. In the units of a normalised image one gray
# level is 0.017 and float rounding leaves about 1e-7; without it, bins in flat areas are noise.
GRADIENT_TOLERANCE = 1e-5


class HOGPyramid(nn.Module):
    """HOG targets of an image at several cell sizes.

    Per channel: Sobel gradients (reflected border), unsigned angle in `nbins` bins, magnitude put in
    its bin, mean over the cell, L2 norm over the bins. The gradient is computed once; the cells of
    each size are pooled from those of the largest smaller size that divides it, which is exact since
    a coarse cell's mean is the mean of its fine cells.

    Args:
        nbins: orientation bins over 180 degrees.
        cell_sizes: side of a cell in pixels for each level, e.g. (4, 8, 16, 32); they must divide H and W.
    """

    def __init__(self, nbins: int, cell_sizes: Sequence[int]):
        super().__init__()
        self.nbins = nbins
        self.cell_sizes = tuple(cell_sizes)

    @torch.no_grad()
    def forward(self, img: Tensor) -> list[Tensor]:
        """Compute the pyramid, in float32 and without gradient.

        Args:
            img: [B, 3, H, W] normalised image, or [B, 1, H, W] gray: there one channel's histogram
                stands for all three. (A gray picture repeated on three channels and normalised per
                channel has three equal histograms, as each channel's gain cancels in the L2 norm.)

        Returns:
            For each cell size c, float [B, (H/c)*(W/c), 3*nbins], cells row-major, channels R, G, B.
            A cell without any gradient is all zero.
        """
        batch, channels = img.shape[:2]
        gx, gy = sobel(img.float().flatten(0, 1))  # [B*C, H, W]
        pooled = {}  # [B*C, nbins, H/c, W/c]
        for cell in sorted(set(self.cell_sizes)):
            fine = max((done for done in pooled if cell % done == 0), default=None)
            pooled[cell] = F.avg_pool2d(pooled[fine], cell // fine) if fine else self._histogram(gx, gy, cell)

        targets = []
        for cell in self.cell_sizes:
            hog = F.normalize(pooled[cell], dim=1, eps=1e-12)
            hog = hog.view(batch, channels * self.nbins, -1).transpose(1, 2)  # [B, cells, C*nbins]
            targets.append(hog if channels == 3 else hog.repeat(1, 1, 3))
        return targets

    def _histogram(self, gx: Tensor, gy: Tensor, cell: int) -> Tensor:
        """Mean gradient magnitude per bin and cell: [N, H, W] twice -> [N, nbins, H/cell, W/cell]."""
        magnitude = torch.hypot(gx, gy)
        bins = (torch.atan2(gy, gx) / math.pi * self.nbins).floor()
        bins = torch.where(bins < 0, bins + self.nbins, bins)  # opposite directions share a bin
        bins = torch.where(bins == self.nbins, 0, bins)  # exactly 180 degrees
        # Bin by bin, so that no [N, nbins, H, W] buffer is written and nothing is scattered.
        zero = magnitude.new_zeros(())  # a number here would be a kernel of its own on a GPU, for every bin
        planes = [F.avg_pool2d(torch.where(bins == b, magnitude, zero), cell) for b in range(self.nbins)]
        return torch.stack(planes, 1)


def sobel(img: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel gradients with a reflected border: [N, H, W] -> gx, gy [N, H, W].

    gx = [[1, 0, -1], [2, 0, -2], [1, 0, -1]] as cross-correlation, gy its transpose; computed in
    their separable form. Components below `GRADIENT_TOLERANCE` are set to 0.
    """
    padded = F.pad(img[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]  # [N, H+2, W+2]
    across = padded[:, :, :-2] - padded[:, :, 2:]  # [N, H+2, W]
    down = padded[:, :-2] - padded[:, 2:]  # [N, H, W+2]
    gx = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    gy = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    return F.hardshrink(gx, GRADIENT_TOLERANCE), F.hardshrink(gy, GRADIENT_TOLERANCE)
