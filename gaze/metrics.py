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

from datasets.fixations import heatmap_to_uint8
from util.masking import otsu_foreground, significant_patches

Map = Tensor | np.ndarray
TINY = 1e-300  # in the place of a deviation of 0: what is divided by it is 0 too


def density(values: Map) -> Tensor:
    """Maps >= 0, none of them zero everywhere, divided by their sums: float64 [..., H, W] of sum 1."""
    values = torch.as_tensor(values).double()
    return values / values.sum((-2, -1), keepdim=True)


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
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=TINY)


def sim(prediction: Map, target: Map) -> Tensor:
    """Similarity: the sum over pixels of the smaller of the two densities, 0 (disjoint) to 1 (equal)."""
    return torch.minimum(density(prediction), density(target)).sum((-2, -1))


def patch_iou(prediction: Map, target: Map, patch_size: int = 16) -> Tensor:
    """Overlap of the significant patches of two maps [H, W]: intersection over union, 0..1.

    What this method lives on: a patch is significant where at least half of it is foreground by the map's
    Otsu threshold (METHOD section 1; `util.masking`), each map quantised to 8 bits of its own maximum, as trees
    store them. 1 if neither map has a significant patch. H and W are multiples of `patch_size`; at
    224 x 224 there are 14 x 14 patches.
    """
    first, second = (gaze_patches(values, patch_size) for values in (prediction, target))  # [L]
    union = (first | second).sum()
    return (first & second).sum().double() / union if union else torch.ones(())


def gaze_patches(values: Map, patch_size: int) -> Tensor:
    """Significant patches of a map [H, W] >= 0, as trees store it: bool [L]; see `patch_iou`."""
    levels = heatmap_to_uint8(torch.as_tensor(values).double().numpy())
    return significant_patches(otsu_foreground(torch.from_numpy(levels)[None]), patch_size)[0]


def resize_density(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Densities [B, G, G] on another grid, bilinear: [B, height, width] of sum 1, in their dtype."""
    maps = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.sum((-2, -1), keepdim=True)


def fixation_pixels(x: Map, y: Map, size: tuple[int, int]) -> Tensor:
    """Pixels that hold fixations at fractions of the image (0 = left or top edge, 1 = right or bottom edge):
    int64 [n, 2], (row, column), on a grid of `size` (height, width)."""
    places = torch.stack([torch.as_tensor(values).double() for values in (y, x)], 1)
    sides = torch.tensor(size)
    return (places * sides).floor().long().minimum(sides - 1)


def nss(prediction: Map, fixations: Tensor, others: Tensor | None = None) -> Tensor:
    """Normalised scanpath saliency (Peters et al. 2005): the mean, over the fixations, of the prediction made
    zero-mean and of unit (population) variance over the image; 0 is chance. 0 for a constant prediction.

    Args:
        prediction: [H, W].
        fixations: int [n, 2], (row, column), see `fixation_pixels`; a pixel counts once per fixation in it.
        others: not used.
    """
    prediction = torch.as_tensor(prediction).double()
    return (prediction[fixations.unbind(1)] - prediction.mean()).mean() / prediction.std(correction=0).clamp(min=TINY)


def auc_judd(prediction: Map, fixations: Tensor, others: Tensor | None = None) -> Tensor:
    """Area under the ROC curve of the prediction as a classifier of fixations against all other pixels
    (Judd et al. 2009), 0.5 is chance: the chance that a fixation's value exceeds that of a pixel without
    fixation, ties counting half.

    Each fixation is a positive. The original code breaks ties by random noise; pysaliency's
    `AUC(nonfixations="uniform")` takes all pixels as negatives, those with fixations too.
    """
    prediction = torch.as_tensor(prediction).double()
    free = torch.ones_like(prediction, dtype=torch.bool)
    free[fixations.unbind(1)] = False
    return _auc(prediction[fixations.unbind(1)], prediction[free])


def auc_shuffled(prediction: Map, fixations: Tensor, others: Tensor) -> Tensor:
    """Shuffled AUC (Zhang et al. 2008): as `auc_judd`, but the negatives are fixations on other images, so that
    a map of the centre prior alone is at chance, 0.5.

    Args:
        others: int [m, 2], (row, column) of fixations on images of other subjects, on this map's grid. All are
            used: no random subset, as in pysaliency's `sAUC`. NaN without any.
    """
    prediction = torch.as_tensor(prediction).double()
    return _auc(prediction[fixations.unbind(1)], prediction[others.unbind(1)])


def _auc(positives: Tensor, negatives: Tensor) -> Tensor:
    """Mann-Whitney: share of the pairs in which the positive is larger, ties counting half."""
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    not_above = torch.searchsorted(ordered, positives, right=True)
    return (below + not_above).double().mean() / 2 / len(negatives)


MAP_METRICS = {"cc": cc, "kld": kld, "sim": sim, "patch_iou": patch_iou}  # of (prediction, target)
FIXATION_METRICS = {"nss": nss, "auc_judd": auc_judd, "auc_shuffled": auc_shuffled}  # of (prediction, own, others')
TITLES = {
    "cc": "CC",
    "kld": "KLD (less is better)",
    "sim": "SIM",
    "patch_iou": "patch IoU",
    "nss": "NSS",
    "auc_judd": "AUC-Judd",
    "auc_shuffled": "shuffled AUC",
}
