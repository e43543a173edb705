"""HOG targets of a batch: twelve direct passes against one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import models_cxrmim
from scripts.benchmarks.timing import Report, Settings, alternate
from util.hog import GRADIENT_TOLERANCE, HOGPyramid

CELL_SIZES = (4, 8, 16, 32)
NBINS = 9


def direct_hog(img: Tensor, cell_sizes=CELL_SIZES, nbins: int = NBINS) -> list[Tensor]:
    """Baseline: one pass for each channel and cell size. [B, 3, H, W] -> list of [B, cells, 3*nbins]."""
    targets = []
    for cell in cell_sizes:
        channels = []
        for channel in range(3):
            x = F.pad(img[:, channel : channel + 1].float(), (1, 1, 1, 1), mode="reflect")
            kernel = x.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
            gradient = F.conv2d(x, torch.stack([kernel, kernel.T])[:, None])  # [B, 2, H, W]
            gradient = F.hardshrink(gradient, GRADIENT_TOLERANCE)
            magnitude = gradient.norm(dim=1, keepdim=True)
            angle = torch.atan2(gradient[:, 1], gradient[:, 0])[:, None]
            bins = (angle / torch.pi * nbins).floor().long() % nbins
            batch, _, height, width = magnitude.shape
            one_hot = magnitude.new_zeros(batch, nbins, height, width).scatter_(1, bins, magnitude)
            channels.append(F.normalize(F.avg_pool2d(one_hot, cell), dim=1, eps=1e-12))
        targets.append(torch.cat(channels, 1).flatten(2).transpose(1, 2))
    return targets


def noise_batch(settings: Settings, generator: torch.Generator) -> dict[str, Tensor]:
    """Made-up samples in the form of the data sets."""
    shape = (settings.batch_size, 224, 224)
    attention = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return {
        "img": torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)[:, None],
        "attention": attention,
        "foreground": (F.avg_pool2d(attention.float(), 33, 1, 16) > 127.5).to(torch.uint8),
    }


@torch.no_grad()
def measure_hog(report: Report, settings: Settings) -> None:
    """All targets of a batch of gray pictures: 12 direct passes against one."""
    model = models_cxrmim.cxrmim_vit_tiny_patch16().to(settings.device)
    batch = model.prepare_batch(noise_batch(settings, torch.Generator().manual_seed(0)))
    pyramid = HOGPyramid(NBINS, CELL_SIZES)
    times = alternate(
        lambda: direct_hog(batch["img"]), lambda: pyramid(batch["gray"]), settings.repeats, settings.device
    )
    note = f"{settings.batch_size} images of 224 px"
    report.compare("HOG targets of a batch", *times, at_least=10, note=note)
    report.equality["HOG, largest difference from 12 direct passes"] = max(
        (a - b).abs().max().item() for a, b in zip(direct_hog(batch["img"]), pyramid(batch["gray"]))
    )
