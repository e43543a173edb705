"""Saliency metrics: against NumPy, scikit-learn and scikit-image, and their bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu
from sklearn.metrics import roc_auc_score

from datasets.fixations import heatmap_to_uint8
from gaze import metrics as saliency

SHAPE = (12, 9)
FLAT = np.ones(SHAPE)


def random_maps(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    p, t = rng.random(SHAPE) + 0.01, rng.random(SHAPE) ** 3 + 0.01
    return (np.round(p * 4) + 1, np.round(t * 2)) if seed == 3 else (p, t)  # ties everywhere, zeros in the target


def random_fixations(seed: int, n: int = 15) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(100 + seed).integers(0, SHAPE, (n, 2)))


def auc(positives: np.ndarray, negatives: np.ndarray) -> float:
    labels = np.repeat([1, 0], [len(positives), len(negatives)])
    return roc_auc_score(labels, np.concatenate([positives, negatives]))


def close(value: float):
    return pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_their_definitions(seed):
    p, t = random_maps(seed)
    fixations, others = random_fixations(seed), random_fixations(seed + 50, n=23)
    at, elsewhere = (tuple(places.T.numpy()) for places in (fixations, others))
    density_p, density_t = p / p.sum(), t / t.sum()
    seen = density_t > 0
    free = np.ones(SHAPE, bool)
    free[at] = False
    expected = {
        "cc": np.corrcoef(p.ravel(), t.ravel())[0, 1],
        "kld": (density_t[seen] * np.log(density_t[seen] / density_p[seen])).sum(),
        "sim": np.minimum(density_p, density_t).sum(),
        "nss": ((p - p.mean()) / p.std())[at].mean(),
        "auc_judd": auc(p[at], p[free]),
        "auc_shuffled": auc(p[at], p[elsewhere]),
    }
    found = {name: metric(p, t) for name, metric in saliency.MAP_METRICS.items() if name in expected}
    found |= {name: metric(p, fixations, others) for name, metric in saliency.FIXATION_METRICS.items()}
    assert {name: float(value) for name, value in found.items()} == close(expected)
    both = np.stack([p, t])
    for metric in (saliency.cc, saliency.kld, saliency.sim):
        assert metric(both[:1], both[1:]).tolist() == [float(metric(p, t))]


def significant(values: np.ndarray, patch: int) -> np.ndarray:
    levels = heatmap_to_uint8(values)
    cells = (levels > threshold_otsu(levels)).reshape(values.shape[0] // patch, patch, -1, patch)
    return cells.sum((1, 3)) >= patch * patch // 2


@pytest.mark.parametrize("seed", range(3))
def test_patch_iou_equals_its_definition(seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :32]
    p, t = (
        np.exp(-((y - rng.uniform(18, 30)) ** 2 + (x - rng.uniform(10, 22)) ** 2) / 200) + 0.05 * rng.random(y.shape)
        for _ in range(2)
    )
    first, second = significant(p, 8), significant(t, 8)
    assert float(saliency.patch_iou(p, t, 8)) == (first & second).sum() / (first | second).sum()
    assert saliency.gaze_patches(p, 8).tolist() == first.ravel().tolist()


def test_equal_maps_and_chance():
    p, _ = random_maps(0)
    fixations, others = random_fixations(0), random_fixations(1)
    for value, expected in (
        (saliency.kld(p, 3 * p), 0),
        (saliency.sim(p, 3 * p), 1),
        (saliency.cc(p, 3 * p + 1), 1),
        (saliency.cc(FLAT, p), 0),
        (saliency.nss(FLAT, fixations), 0),
        (saliency.auc_judd(FLAT, fixations), 0.5),
        (saliency.auc_shuffled(FLAT, fixations, others), 0.5),
        (saliency.auc_shuffled(p, fixations, fixations), 0.5),
        (saliency.patch_iou(np.ones((32, 32)), np.ones((32, 32))), 1),  # neither has a patch
    ):
        assert float(value) == close(expected)
    assert saliency.auc_shuffled(p, fixations, others[:0]).isnan()


def test_kld_of_zero_prediction_is_infinite_and_half_a_level_mends_it():
    levels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert float(saliency.kld(levels, np.ones((4, 4)))) == math.inf
    assert 0 < float(saliency.kld(saliency.density_of_levels(levels), np.ones((4, 4)))) < 1


def test_loss_is_the_metric_and_has_the_softmax_gradient():
    p, t = random_maps(3)  # with zeros in the target: 0 ln 0 is 0
    logits = torch.from_numpy(p).requires_grad_()
    log_p = logits.flatten().log_softmax(0).view_as(logits)
    target = saliency.density(t)
    loss = saliency.log_kld(log_p, target)
    assert float(loss.detach()) == close(float(saliency.kld(log_p.detach().exp(), t)))
    loss.backward()
    assert torch.allclose(logits.grad, log_p.detach().exp() - target, atol=1e-12)


def test_density_on_another_grid():
    p = saliency.density(random_maps(3)[0])[None]
    assert torch.allclose(saliency.resize_density(p, SHAPE), p, atol=1e-15)
    flat = saliency.resize_density(torch.full((2, 4, 4), 0.7), (9, 5))
    assert torch.allclose(flat, torch.full((2, 9, 5), 1 / 45))


def test_fixation_pixels():
    x, y = np.array([0.0, 0.999, 1.0, 0.5]), np.array([0.0, 1.0, 0.26, 0.5])
    assert saliency.fixation_pixels(x, y, (4, 10)).tolist() == [[0, 0], [3, 9], [1, 9], [2, 5]]
