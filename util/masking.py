"""Which patches are hidden from the encoder: by gaze, at random, or in blocks.

Everything here is a pure function on a batch: no loop over images, no host synchronisation, on the
device of its input, random only through the `generator` given. One convention throughout:
mask [B, L], row-major over the patch grid, 1 = masked (to be reconstructed), 0 = visible; every
image of a batch has the same number of masked patches, `masked_count(L, mask_ratio)`.

`MASKINGS` is the one list of rules: name -> function of a `MaskRequest` (docs/extend.md).

Source: CXR-MIM (Zhao et al., IPMI 2025), attention-controlled masking; block-wise masking as a
baseline after BEiT (Bao et al., ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MaskRequest:
    """All that a masking rule may look at. A rule returns float [B, L], 1 = masked, with exactly
    `n_masked` masked patches in each image; it draws from `generator` only.

    Attributes:
        batch: "img" float [B, 3, H, W] normalised, "attention" float [B, H, W] in 0..1, and maybe
            "foreground", for which see `foreground_of`.
        patch_size: p in pixels.
        mask_ratio, clinical_ratio: as on the command line.
        epoch, step: where training is, both from 0; a step is one forward pass of that epoch.
        generator: of this step's masks, on the device of the batch; None: torch's own.
    """

    batch: Mapping[str, Tensor]
    patch_size: int
    mask_ratio: float = 0.75
    clinical_ratio: float = 0.5
    epoch: int = 0
    step: int = 0
    generator: torch.Generator | None = None

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) of the patch grid, L = h * w."""
        height, width = self.batch["attention"].shape[-2:]
        return height // self.patch_size, width // self.patch_size

    @property
    def n_masked(self) -> int:
        return masked_count(math.prod(self.grid_size), self.mask_ratio)

    def random(self, n: int) -> Tensor:
        """Uniform random numbers in [0, 1): float [B, n]."""
        attention = self.batch["attention"]
        return torch.rand(len(attention), n, generator=self.generator, device=attention.device)


def masked_count(n_patches: int, mask_ratio: float) -> int:
    """Number of masked patches in every image: int(L * mask_ratio), 147 of 196 at 0.75.

    Raises:
        ValueError: if no patch would be masked, or none left visible.
    """
    n_masked = int(n_patches * mask_ratio)
    if not 0 < n_masked < n_patches:
        raise ValueError(
            f"mask_ratio {mask_ratio} masks {n_masked} of {n_patches} patches; "
            "choose one that leaves at least one masked and one visible patch"
        )
    return n_masked


def mask_generator(seed: int, epoch: int, step: int, rank: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Generator for the masks of one step: a function of (seed, epoch, step, rank) and nothing else,
    so that masks don't depend on the number of workers or on where a run was resumed."""
    state = np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state >> np.uint64(1)))  # manual_seed takes int64


def otsu_foreground(attention: Tensor) -> Tensor:
    """Split each heatmap at its own Otsu threshold.

    Args:
        attention: [B, H, W] gaze heatmap, float 0..1 or uint8 0..255; floats are quantised to 8 bits.

    Returns:
        Bool [B, H, W], true where the quantised heatmap exceeds the threshold that maximises the
        variance between the two classes (Otsu 1979; the first maximum, as scikit-image takes it).
        An all-equal heatmap has no foreground.
    """
    levels = attention if attention.dtype == torch.uint8 else (attention * 255).round().clamp(0, 255)
    levels = levels.flatten(1).long()  # [B, H*W]
    histogram = torch.zeros(len(levels), 256, dtype=torch.int64, device=levels.device)
    histogram.scatter_add_(1, levels, torch.ones_like(levels))  # integers: exact in any order
    counts = histogram.double()  # [B, 256]
    mass = counts * torch.arange(256, dtype=torch.float64, device=counts.device)
    n_low, mass_low = counts.cumsum(1), mass.cumsum(1)
    n_high, mass_high = n_low[:, -1:] - n_low, mass_low[:, -1:] - mass_low
    variance = n_low * n_high * (mass_low / n_low.clamp(min=1) - mass_high / n_high.clamp(min=1)) ** 2
    best, threshold = variance.max(1, keepdim=True)  # [B, 1]
    threshold = torch.where(best > 0, threshold, 255)
    return (levels > threshold).view(attention.shape)


def significant_patches(foreground: Tensor, patch_size: int) -> Tensor:
    """Patches of which at least half of the pixels (count >= p*p//2) are foreground.

    Args:
        foreground: [B, H, W] bool, uint8 0/1, uint8 0/255, float 0..1 or float 0..255. Full scale is
            1 for an image in which no value exceeds 1, else 255; a value left in between by resizing
            counts from half of full scale.
        patch_size: p, a divisor of H and W.

    Returns:
        Bool [B, L], L = (H/p) * (W/p), row-major.
    """
    batch, height, width = foreground.shape
    if foreground.dtype != torch.bool:
        full_scale = torch.where(foreground.flatten(1).amax(1) <= 1, 1.0, 255.0)  # [B]
        foreground = foreground >= 0.5 * full_scale[:, None, None]
    cells = foreground.view(batch, height // patch_size, patch_size, width // patch_size, patch_size)
    return (cells.sum((2, 4)) >= patch_size * patch_size // 2).flatten(1)


def foreground_of(batch: Mapping[str, Tensor]) -> Tensor:
    """A batch's "foreground"; where it has none, the Otsu foreground of its "attention"."""
    return batch["foreground"] if "foreground" in batch else otsu_foreground(batch["attention"])


def by_attention(ask: MaskRequest) -> Tensor:
    """Mask a fixed share of the patches that radiologists attended to, the rest elsewhere.

    Of an image's n_sig significant patches, floor(n_sig * clinical_ratio) are masked; the other
    masked ones come from the rest of the image, capped at how many there are, and whatever is still
    missing from the significant ones. Inside each group the choice is uniform (CXR-MIM, section on
    attention-controlled masking).
    """
    if not 0 <= ask.clinical_ratio <= 1:
        raise ValueError(f"clinical_ratio {ask.clinical_ratio} is not in [0, 1]")
    significant = significant_patches(foreground_of(ask.batch), ask.patch_size)  # [B, L]
    n_patches, n_masked = significant.shape[1], ask.n_masked
    n_significant = significant.sum(1, keepdim=True)  # [B, 1]
    # float64, so that the floor is the one Python's own numbers give
    from_significant = (n_significant.double() * ask.clinical_ratio).floor().long().clamp(max=n_masked)
    from_other = torch.minimum(n_masked - from_significant, n_patches - n_significant)
    from_significant = n_masked - from_other

    noise = ask.random(n_patches)
    # Order the significant patches of each image first, each group shuffled: noise is below 1.
    order = (noise + (~significant)).argsort(dim=1, stable=True)  # [B, L]
    rank = torch.arange(n_patches, device=order.device)
    chosen = torch.where(rank < n_significant, rank < from_significant, rank - n_significant < from_other)
    return torch.zeros_like(noise).scatter_(1, order, chosen.to(noise.dtype))


def at_random(ask: MaskRequest) -> Tensor:
    """Mask uniformly at random (MAE)."""
    return _mask_lowest(ask.random(math.prod(ask.grid_size)), ask.n_masked)


def in_blocks(ask: MaskRequest, n_blocks: int = 32) -> Tensor:
    """Mask rectangles of patches until the count is reached (after BEiT's block-wise masking).

    Rectangles of 1/12 to 1/3 of the grid's area with an aspect ratio of 0.3 to 1/0.3 (log-uniform)
    are laid at random places, one after the other; they may reach over the border, so that each covers
    any patch with equal probability. Patches are masked in the order in which they are first covered.
    The last rectangle is cut, row by row, where the count is full; should `n_blocks` of them not cover
    enough, the rest is random.
    """
    height, width = ask.grid_size
    n_patches, device = height * width, ask.batch["attention"].device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * ask.random(n_blocks)

    area = n_patches * uniform(1 / 12, 1 / 3)
    aspect = torch.exp(uniform(np.log(0.3), -np.log(0.3)))
    block_height = (area * aspect).sqrt().round().clamp(1, height)  # [B, n_blocks]
    block_width = (area / aspect).sqrt().round().clamp(1, width)
    top = (uniform(0, 1) * (height + block_height - 1)).floor() - (block_height - 1)
    left = (uniform(0, 1) * (width + block_width - 1)).floor() - (block_width - 1)
    place = torch.arange(n_patches, device=device)
    row, column = place // width, place % width  # of each patch
    down, right = row - top[..., None], column - left[..., None]  # [B, n_blocks, L], from a block's corner
    covered = (down >= 0) & (down < block_height[..., None]) & (right >= 0) & (right < block_width[..., None])
    first_block = torch.where(covered.any(1), covered.int().argmax(1), n_blocks)  # [B, L]
    within = place / n_patches  # row by row inside a block
    order = first_block + torch.where(first_block < n_blocks, within, ask.random(n_patches))
    return _mask_lowest(order, ask.n_masked)


def _mask_lowest(order: Tensor, n_masked: int) -> Tensor:
    """Float mask [B, L] with 1 at the `n_masked` places of each row that come first in `order`."""
    chosen = order.argsort(dim=1, stable=True)[:, :n_masked]
    return torch.zeros_like(order).scatter_(1, chosen, 1.0)


MASKINGS: dict[str, Callable[[MaskRequest], Tensor]] = {
    "attention": by_attention,
    "random": at_random,
    "block": in_blocks,
}


def draw_mask(masking: str, ask: MaskRequest) -> Tensor:
    """Masks [B, L] of the rule named `masking`, checked: a wrong number of masked patches is a RuntimeError; on a GPU, where
    reading it would make every step wait, a device-side assertion."""
    mask = MASKINGS[masking](ask)
    fits = ((mask == 1).sum(1) == ask.n_masked).all() & ((mask == 0) | (mask == 1)).all()
    torch._assert_async(fits, f"masking {masking!r}: not {ask.n_masked} masked patches in each image, each 0 or 1")
    return mask


def mask_cells(mask: Tensor, scale: float) -> Tensor:
    """A mask on the grid of cells of a scale: [B, 1, h, w] -> float [B, 1, h*scale, w*scale].

    Repeated where a patch has `scale` cells per side, averaged where a cell spans 1/scale patches.
    """
    if scale >= 1:
        return mask.repeat_interleave(round(scale), 2).repeat_interleave(round(scale), 3)
    return F.avg_pool2d(mask, round(1 / scale))
