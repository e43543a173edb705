"""How well one gaze map predicts another, and the fixations: the metrics of saliency prediction.

Definitions follow Bylinskii et al., "What do different evaluation metrics tell us about saliency models?"
(TPAMI 2019) and the MIT/Tuebingen benchmark, whose own code is the package `pysaliency`; each docstring says
where this differs. Map metrics take tensors or arrays [..., H, W] of any matching batch shape and return
[...]; fixation metrics take one map [H, W]. All are computed in float64, and on the CPU or a GPU alike.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from util.masking import otsu_foreground, significant_patches

Map = Tensor | np.ndarray

MAP_METRICS = ("cc", "kld", "sim", "patch_iou")
FIXATION_METRICS = ("nss", "auc_judd", "auc_shuffled")
METRICS = (*MAP_METRICS, *FIXATION_METRICS)
TITLES = dict(zip(METRICS, ("CC", "KLD", "SIM", "patch IoU", "NSS", "AUC-Judd", "shuffled AUC"), strict=True))
LOWER_IS_BETTER = frozenset({"kld"})


def density(values: Map) -> Tensor:
    """Maps divided by their sums: float64 [..., H, W], each >= 0 and of sum 1.

    Raises:
        ValueError: a value that is negative or not finite, or a map that is zero everywhere.
    """
    values = torch.as_tensor(values).double()
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise ValueError("a map has negative or not finite values; a density is 0 or more")
    total = values.sum((-2, -1), keepdim=True)
    if bool((total == 0).any()):
        raise ValueError("a map is zero everywhere")
    return values / total


def density_of_levels(levels: Map) -> Tensor:
    """The density that a stored 8-bit map stands for as a *prediction*: float64 [..., H, W], > 0, of sum 1.

    Half a level is added everywhere: what was rounded to level 0 had some density, and a prediction of exactly
    0 makes KLD infinite.
    """
    return density(torch.as_tensor(levels).double() + 0.5)


def log_kld(log_prediction: Tensor, target: Tensor) -> Tensor:
    """KLD of `kld` from the logarithm of the predicted density, in the dtype of its inputs: [...]. This is
    the training loss, so it can be differentiated in `log_prediction`."""
    return (torch.xlogy(target, target) - target * log_prediction).sum((-2, -1))


def kld(prediction: Map, target: Map) -> Tensor:
    """Kullback-Leibler divergence of the target density from the predicted one, in nats, >= 0, lower is better:
    sum of t (ln t - ln p), with 0 ln 0 = 0; infinite where p is 0 and t is not.

    Both maps are divided by their sums first. pysaliency's `image_based_kl_divergence` adds `minimum_value`
    (1e-20) to both maps and its `MIT_KLDiv` adds 2.2e-16 inside the quotient and the logarithm, which bounds
    the infinite case; on positive maps the three agree.
    """
    prediction, target = density(prediction), density(target)
    terms = torch.where(target > 0, target * (target.log() - prediction.log()), 0.0)
    return terms.sum((-2, -1))


def cc(prediction: Map, target: Map) -> Tensor:
    """Pearson's correlation of the two maps' pixels, -1..1; 0 where either map is constant.

    (pysaliency's `CC` is 0 for a constant prediction, and NaN for a constant target.)
    """
    a, b = (torch.as_tensor(values).double().flatten(-2) for values in (prediction, target))
    a, b = (values - values.mean(-1, keepdim=True) for values in (a, b))
    scale = a.norm(dim=-1) * b.norm(dim=-1)
    return torch.where(scale > 0, (a * b).sum(-1) / torch.where(scale > 0, scale, 1.0), 0.0)


def sim(prediction: Map, target: Map) -> Tensor:
    """Similarity: the sum over pixels of the smaller of the two densities, 0 (disjoint) to 1 (equal)."""
    return torch.minimum(density(prediction), density(target)).sum((-2, -1))


def patch_iou(prediction: Map, target: Map, patch_size: int = 16) -> Tensor:
    """Overlap of the significant patches of two maps: intersection over union, 0..1.

    What this method lives on: a patch is significant where at least half of it is foreground by the map's
    Otsu threshold (METHOD section 1; `util.masking`), each map quantised to 8 bits of its own maximum, as trees
    store them. 1 where neither map has a significant patch. H and W are multiples of `patch_size`; at
    224 x 224 there are 14 x 14 patches.
    """
    first, second = (gaze_patches(values, patch_size) for values in (prediction, target))  # [..., L]
    union = (first | second).sum(-1).double()
    return torch.where(union > 0, (first & second).sum(-1) / union.clamp(min=1), 1.0)


def gaze_patches(values: Map, patch_size: int) -> Tensor:
    """Significant patches of maps [..., H, W] >= 0, as trees store them: bool [..., L]; see `patch_iou`."""
    values = torch.as_tensor(values).double()
    maps = values.reshape(-1, *values.shape[-2:])
    levels = to_levels(maps)
    patches = significant_patches(otsu_foreground(levels), patch_size)  # [n, L]
    return patches.reshape(*values.shape[:-2], -1)


def to_levels(maps: Tensor) -> Tensor:
    """Maps >= 0 as trees store them: value / maximum * 255 to the nearest level (half up), uint8 [..., H, W].

    The tensor form of `datasets.fixations.heatmap_to_uint8`; a map of zeros stays one.
    """
    peak = maps.amax((-2, -1), keepdim=True)
    scaled = maps * (255.0 / torch.where(peak > 0, peak, 1.0))
    return (scaled + 0.5).floor().to(torch.uint8)


def resize_density(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Densities [B, G, G] on another grid, bilinear: [B, height, width] of sum 1, in their dtype."""
    if tuple(maps.shape[-2:]) != tuple(size):
        maps = F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.sum((-2, -1), keepdim=True)


def fixation_pixels(x: Map, y: Map, size: tuple[int, int]) -> Tensor:
    """Pixels that hold fixations at fractions of the image (0 = left or top edge, 1 = right or bottom edge):
    int64 [n, 2], (row, column), on a grid of `size` (height, width)."""
    x, y = (torch.as_tensor(values).double() for values in (x, y))
    rows = (y * size[0]).floor().long().clamp(0, size[0] - 1)
    columns = (x * size[1]).floor().long().clamp(0, size[1] - 1)
    return torch.stack([rows, columns], 1)


def nss(prediction: Map, fixations: Tensor) -> Tensor:
    """Normalised scanpath saliency (Peters et al. 2005): the mean, over the fixations, of the prediction made
    zero-mean and of unit (population) variance over the image; 0 is chance. 0 for a constant prediction.

    Args:
        prediction: [H, W].
        fixations: int [n, 2], (row, column), see `fixation_pixels`; a pixel counts once per fixation in it.
    """
    prediction = torch.as_tensor(prediction).double()
    values = _values(prediction, fixations) - prediction.mean()
    deviation = prediction.std(correction=0)
    return values.mean() / deviation if deviation > 0 else torch.zeros_like(deviation)


def auc_judd(prediction: Map, fixations: Tensor) -> Tensor:
    """Area under the ROC curve of the prediction as a classifier of fixations against all other pixels
    (Judd et al. 2009), 0.5 is chance: the chance that a fixation's value exceeds that of a pixel without
    fixation, ties counting half.

    Each fixation is a positive. The original code breaks ties by random noise; pysaliency's
    `AUC(nonfixations="uniform")` takes all pixels as negatives, those with fixations too.
    """
    prediction = torch.as_tensor(prediction).double()
    free = torch.ones(prediction.shape, dtype=torch.bool, device=prediction.device)
    free[fixations[:, 0], fixations[:, 1]] = False
    if not bool(free.any()):
        raise ValueError("every pixel has a fixation")
    return _auc(_values(prediction, fixations), prediction[free])


def auc_shuffled(prediction: Map, fixations: Tensor, others: Tensor) -> Tensor:
    """Shuffled AUC (Zhang et al. 2008): as `auc_judd`, but the negatives are fixations on other images, so that
    a map of the centre prior alone is at chance, 0.5.

    Args:
        others: int [m, 2], (row, column) of fixations on images of other subjects, on this map's grid. All are
            used: no random subset, as in pysaliency's `sAUC`.
    """
    prediction = torch.as_tensor(prediction).double()
    return _auc(_values(prediction, fixations), _values(prediction, others))


def _values(prediction: Tensor, fixations: Tensor) -> Tensor:
    if len(fixations) == 0:
        raise ValueError("no fixation")
    return prediction[fixations[:, 0], fixations[:, 1]]


def _auc(positives: Tensor, negatives: Tensor) -> Tensor:
    """Mann-Whitney: share of the pairs in which the positive is larger, ties counting half."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return (below + not_above).double().mean() / 2 / len(negatives)
