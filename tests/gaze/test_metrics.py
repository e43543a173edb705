"""Saliency metrics: against plain slow versions, against pysaliency, and their bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.fixations import heatmap_to_uint8
from gaze import metrics as saliency


def random_maps(seed: int, height: int = 12, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((height, width)) + 0.01, rng.random((height, width)) ** 3 + 0.01


def random_fixations(seed: int, n: int = 15, height: int = 12, width: int = 9) -> torch.Tensor:
    rng = np.random.default_rng(100 + seed)
    return torch.from_numpy(np.stack([rng.integers(0, height, n), rng.integers(0, width, n)], 1))


# Plain slow versions, in Python's own numbers.


def slow_density(values):
    total = sum(sum(row) for row in values.tolist())
    return [[value / total for value in row] for row in values.tolist()]


def slow_kld(p, t):
    p, t = slow_density(p), slow_density(t)
    pairs = [(a, b) for row_p, row_t in zip(p, t) for a, b in zip(row_p, row_t)]
    return math.fsum(0.0 if b == 0 else (b * math.log(b / a) if a else math.inf) for a, b in pairs)


def slow_sim(p, t):
    p, t = slow_density(p), slow_density(t)
    return math.fsum(min(a, b) for row_p, row_t in zip(p, t) for a, b in zip(row_p, row_t))


def slow_cc(p, t):
    a, b = p.flatten().tolist(), t.flatten().tolist()
    mean_a, mean_b = math.fsum(a) / len(a), math.fsum(b) / len(b)
    cov = math.fsum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    return cov / math.sqrt(math.fsum((x - mean_a) ** 2 for x in a) * math.fsum((y - mean_b) ** 2 for y in b))


def slow_nss(p, fixations):
    flat = p.flatten().tolist()
    mean = math.fsum(flat) / len(flat)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat))
    return math.fsum((p[r, c] - mean) / deviation for r, c in fixations.tolist()) / len(fixations)


def slow_auc(positives, negatives):
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in positives for b in negatives)
    return wins / (len(positives) * len(negatives))


def slow_judd(p, fixations):
    taken = {tuple(place) for place in fixations.tolist()}
    negatives = [p[r, c] for r in range(p.shape[0]) for c in range(p.shape[1]) if (r, c) not in taken]
    return slow_auc([p[r, c] for r, c in fixations.tolist()], negatives)


def slow_significant(values, patch):
    levels = heatmap_to_uint8(values)
    histogram = [int((levels == level).sum()) for level in range(256)]
    best, threshold = 0.0, 255
    for cut in range(256):
        low, high = histogram[: cut + 1], histogram[cut + 1 :]
        if not sum(low) or not sum(high):
            continue
        mean_low = sum(i * n for i, n in enumerate(low)) / sum(low)
        mean_high = sum((i + cut + 1) * n for i, n in enumerate(high)) / sum(high)
        variance = sum(low) * sum(high) * (mean_low - mean_high) ** 2
        if variance > best * (1 + 1e-12):
            best, threshold = variance, cut
    found = set()
    for row in range(values.shape[0] // patch):
        for column in range(values.shape[1] // patch):
            cell = levels[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            if (cell > threshold).sum() >= patch * patch // 2:
                found.add((row, column))
    return found


def slow_patch_iou(p, t, patch):
    first, second = slow_significant(p, patch), slow_significant(t, patch)
    return len(first & second) / len(first | second) if first | second else 1.0


@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_plain_slow_versions(seed):
    p, t = random_maps(seed)
    if seed == 3:  # ties everywhere, zeros in the target
        p, t = np.round(p * 4) + 1, np.round(t * 2)
    fixations, others = random_fixations(seed), random_fixations(seed + 50, n=23)
    assert float(saliency.kld(p, t)) == pytest.approx(slow_kld(p, t), abs=1e-12)
    assert float(saliency.sim(p, t)) == pytest.approx(slow_sim(p, t), abs=1e-12)
    assert float(saliency.cc(p, t)) == pytest.approx(slow_cc(p, t), abs=1e-12)
    assert float(saliency.nss(p, fixations)) == pytest.approx(slow_nss(p, fixations), abs=1e-12)
    assert float(saliency.auc_judd(p, fixations)) == pytest.approx(slow_judd(p, fixations), abs=1e-12)
    expected = slow_auc([p[r, c] for r, c in fixations.tolist()], [p[r, c] for r, c in others.tolist()])
    assert float(saliency.auc_shuffled(p, fixations, others)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_patch_iou_equals_plain_slow_version(seed):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :32]
    p, t = (
        np.exp(-((y - rng.uniform(18, 30)) ** 2 + (x - rng.uniform(10, 22)) ** 2) / 200) + 0.05 * rng.random(y.shape)
        for _ in range(2)
    )
    got = float(saliency.patch_iou(p, t, 8))
    assert got == pytest.approx(slow_patch_iou(p, t, 8), abs=1e-12)
    assert 0 < got < 1


def test_metrics_are_batched():
    pairs = [random_maps(seed) for seed in range(3)]
    p, t = (np.stack(maps) for maps in zip(*pairs))
    for name in ("cc", "kld", "sim"):
        metric = getattr(saliency, name)
        alone = torch.stack([metric(a, b) for a, b in pairs])
        assert torch.allclose(metric(p, t), alone, atol=1e-14), name
    wide = np.kron(p, np.ones((4, 4)))[:, :, :32], np.kron(t, np.ones((4, 4)))[:, :, :32]
    alone = torch.stack([saliency.patch_iou(a, b, 4) for a, b in zip(*wide)])
    assert torch.equal(saliency.patch_iou(*wide, 4), alone)


def test_equal_maps_and_chance():
    p, _ = random_maps(0)
    assert float(saliency.kld(p, 3 * p)) == pytest.approx(0, abs=1e-15)
    assert float(saliency.sim(p, 3 * p)) == pytest.approx(1)
    assert float(saliency.cc(p, 3 * p + 1)) == pytest.approx(1)
    flat = np.ones((12, 9))
    fixations, others = random_fixations(0), random_fixations(1)
    assert float(saliency.cc(flat, p)) == 0
    assert float(saliency.nss(flat, fixations)) == 0
    assert float(saliency.auc_judd(flat, fixations)) == 0.5
    assert float(saliency.auc_shuffled(flat, fixations, others)) == 0.5
    assert float(saliency.auc_shuffled(p, fixations, fixations)) == 0.5
    assert float(saliency.patch_iou(np.ones((32, 32)), np.ones((32, 32)))) == 1  # neither has a patch


def test_kld_of_zero_prediction_is_infinite_and_half_a_level_mends_it():
    target = np.ones((4, 4))
    levels = np.full((4, 4), 200, np.uint8)
    levels[0, 0] = 0
    assert float(saliency.kld(levels, target)) == math.inf
    assert 0 < float(saliency.kld(saliency.density_of_levels(levels), target)) < 1


@pytest.mark.parametrize(
    "values", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.array([[1.0, -1e-9]]), np.array([[1.0, np.inf]])]
)
def test_what_is_no_density_is_refused(values):
    with pytest.raises(ValueError, match="map"):
        saliency.density(values)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 50))
def test_bounds_and_invariance(seed, factor):
    p, t = random_maps(seed)
    fixations, others = random_fixations(seed), random_fixations(seed + 1)
    assert float(saliency.kld(p, t)) >= 0
    assert 0 <= float(saliency.sim(p, t)) <= 1 + 1e-12
    assert float(saliency.sim(p, t)) == pytest.approx(float(saliency.sim(t, p)))
    assert -1 - 1e-12 <= float(saliency.cc(p, t)) <= 1 + 1e-12
    for name, arguments in (("cc", (t,)), ("nss", (fixations,)), ("auc_judd", (fixations,))):
        metric = getattr(saliency, name)
        assert float(metric(p, *arguments)) == pytest.approx(float(metric(factor * p + 1, *arguments)))
    monotone = float(saliency.auc_shuffled(np.exp(p), fixations, others))
    assert monotone == float(saliency.auc_shuffled(p, fixations, others))
    assert 0 <= monotone <= 1


def test_loss_is_the_metric_and_has_the_softmax_gradient():
    p, t = random_maps(1)
    logits = torch.from_numpy(p).requires_grad_()
    log_p = logits.flatten().log_softmax(0).view_as(logits)
    target = saliency.density(t)
    loss = saliency.log_kld(log_p, target)
    assert float(loss.detach()) == pytest.approx(float(saliency.kld(log_p.detach().exp(), t)), abs=1e-12)
    loss.backward()
    assert torch.allclose(logits.grad, log_p.detach().exp() - target, atol=1e-12)
    assert float(saliency.log_kld(log_p.detach(), torch.zeros_like(target))) == 0  # 0 ln 0 is 0


def test_levels_are_those_that_trees_store():
    p, t = random_maps(5)
    both = saliency.to_levels(torch.from_numpy(np.stack([p, t])))
    assert np.array_equal(both[0].numpy(), heatmap_to_uint8(p))
    assert np.array_equal(both[1].numpy(), heatmap_to_uint8(t))
    assert not saliency.to_levels(torch.zeros(2, 3, 3)).any()


def test_density_on_another_grid():
    p = saliency.density(random_maps(3)[0])[None]
    large = saliency.resize_density(p, (50, 31))
    assert large.shape == (1, 50, 31) and float(large.sum()) == pytest.approx(1)
    assert torch.allclose(saliency.resize_density(p, (12, 9)), p, atol=1e-15)
    flat = saliency.resize_density(torch.full((2, 4, 4), 0.7), (9, 5))
    assert torch.allclose(flat, torch.full((2, 9, 5), 1 / 45))


def test_fixation_pixels():
    x, y = np.array([0.0, 0.999, 1.0, 0.5]), np.array([0.0, 1.0, 0.26, 0.5])
    pixels = saliency.fixation_pixels(x, y, (4, 10))
    assert pixels.tolist() == [[0, 0], [3, 9], [1, 9], [2, 5]]


@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_pysaliency(seed):
    pysaliency = pytest.importorskip("pysaliency")
    from pysaliency import metrics

    p, t = random_maps(seed)
    fixations, others = random_fixations(seed), random_fixations(seed + 9, n=30)
    assert float(saliency.cc(p, t)) == pytest.approx(metrics.CC(p, t), abs=1e-12)
    assert float(saliency.sim(p, t)) == pytest.approx(metrics.SIM(p, t), abs=1e-12)
    assert float(saliency.kld(p, t)) == pytest.approx(metrics.image_based_kl_divergence(p, t), abs=1e-12)
    assert float(saliency.kld(p, t)) == pytest.approx(metrics.MIT_KLDiv(p, t), abs=1e-12)
    rows, columns = fixations.T.numpy()
    assert float(saliency.nss(p, fixations)) == pytest.approx(metrics.NSS(p, columns, rows).mean(), abs=1e-12)

    # Two images with the same map; the second one's fixations are the first one's shuffled negatives.
    stimuli = pysaliency.Stimuli([np.zeros((12, 9, 3), np.uint8), np.ones((12, 9, 3), np.uint8)])
    both = torch.cat([fixations, others]).numpy()
    image = np.repeat([0, 1], [len(fixations), len(others)])
    train = pysaliency.Fixations.create_without_history(both[:, 1], both[:, 0], image)

    class Fixed(pysaliency.SaliencyMapModel):
        def _saliency_map(self, stimulus):
            return p

    model = Fixed()
    shuffled = model.AUCs(stimuli, train, nonfixations="shuffled")[: len(fixations)].mean()
    assert float(saliency.auc_shuffled(p, fixations, others)) == pytest.approx(shuffled, abs=1e-12)
    # The package's Judd AUC has the fixated pixels among the negatives; without them it is ours.
    uniform = model.AUCs(stimuli, train, nonfixations="uniform")[: len(fixations)].mean()
    everything = slow_auc([p[r, c] for r, c in fixations.tolist()], p.flatten().tolist())
    assert uniform == pytest.approx(everything, abs=1e-12)
    assert float(saliency.auc_judd(p, fixations)) != pytest.approx(uniform, abs=1e-6)
