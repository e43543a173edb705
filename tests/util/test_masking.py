import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_otsu

from util.masking import (
    MASKINGS,
    MaskRequest,
    at_random,
    by_attention,
    draw_mask,
    in_blocks,
    mask_cells,
    mask_generator,
    otsu_foreground,
    significant_patches,
)


def ask(foreground: torch.Tensor, patch_size: int = 16, *ratios: float, seed: int = 0) -> MaskRequest:
    """What a rule is asked for images with this foreground, [B, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return MaskRequest({"foreground": foreground, "attention": foreground}, patch_size, *ratios, generator=generator)


def grid(batch: int, height: int, width: int) -> torch.Tensor:
    """A foreground whose patches of 1 pixel are a grid."""
    return torch.zeros(batch, height, width)


def expected_counts(n_patches, n_significant, mask_ratio, clinical_ratio):
    """The counts of attention-controlled masking in plain Python: (masked significant, masked others)."""
    n_masked = int(n_patches * mask_ratio)
    significant = min(int(n_significant * clinical_ratio), n_masked)
    others = min(n_masked - significant, n_patches - n_significant)
    return n_masked - others, others


@st.composite
def grids(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    row = st.lists(st.booleans(), min_size=height * width, max_size=height * width)
    rows = draw(st.lists(row, min_size=1, max_size=4))
    return torch.tensor(rows).view(-1, height, width)


@settings(max_examples=150, deadline=None)
@given(grids(), st.floats(0, 0.999), st.floats(0, 1), st.integers(0, 2**31))
def test_counts_are_exact_for_any_grid_ratio_and_heatmap(significant, mask_ratio, clinical_ratio, seed):
    n_patches = significant[0].numel()
    foreground = significant.repeat_interleave(2, 1).repeat_interleave(2, 2)
    asked = ask(foreground, 2, mask_ratio, clinical_ratio, seed=seed)
    if not 0 < int(n_patches * mask_ratio) < n_patches:
        with pytest.raises(ValueError, match="mask_ratio"):
            by_attention(asked)
        return
    mask = by_attention(asked)
    assert mask.shape == (len(significant), n_patches)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    for row, flags in zip(mask.bool(), significant.flatten(1), strict=True):
        wanted = expected_counts(n_patches, int(flags.sum()), mask_ratio, clinical_ratio)
        assert (int((row & flags).sum()), int((row & ~flags).sum())) == wanted


def test_a_patch_is_significant_from_half_of_its_pixels_on():
    foreground = torch.zeros(1, 32, 16, dtype=torch.bool)
    foreground[0, :16].view(-1)[:128] = True
    foreground[0, 16:24] = True
    foreground[0, 16, 0] = False  # 127 pixels
    assert significant_patches(foreground, 16).tolist() == [[True, False]]


def test_full_scale_is_1_or_255_and_values_left_in_between_by_resizing_count_from_half():
    for values, dtype in [
        ([0.0, 0.49, 0.5, 1.0], torch.float32),
        ([0.0, 127.4, 127.5, 255.0], torch.float32),
        ([0, 127, 128, 255], torch.uint8),
        ([0, 0, 1, 1], torch.uint8),
    ]:
        foreground = torch.tensor([[values]], dtype=dtype).repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert significant_patches(foreground, 2).tolist() == [[False, False, True, True]]


def test_choice_is_uniform_inside_each_group():
    significant = torch.zeros(8, 8, dtype=torch.bool)
    significant[:, :3] = True  # 24 significant patches of 64
    foreground = significant.repeat_interleave(2, 0).repeat_interleave(2, 1)
    n_draws = 20000
    mask = by_attention(ask(foreground.expand(n_draws, -1, -1), 2))
    frequency = mask.mean(0)
    for group, n_chosen in ((significant.flatten(), 12), (~significant.flatten(), 36)):
        share = n_chosen / int(group.sum())
        sigma = (share * (1 - share) / n_draws) ** 0.5
        assert ((frequency[group] - share).abs() < 4.5 * sigma).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([np.uint8, np.float32]), st.integers(1, 3))
def test_otsu_is_that_of_scikit_image(seed, dtype, kind):
    rng = np.random.default_rng(seed)
    shape = (3, 17, 13)
    levels = {
        1: rng.integers(0, 256, shape),
        2: np.where(rng.random(shape) < 0.2, rng.integers(150, 256, shape), rng.integers(0, 60, shape)),
        3: rng.integers(0, 2, shape) * rng.integers(1, 256),
    }[kind].astype(np.uint8)
    attention = torch.from_numpy(levels if dtype == np.uint8 else levels.astype(np.float32) / 255)
    ours = otsu_foreground(attention)
    for image, foreground in zip(levels, ours.numpy(), strict=True):
        expected = image > threshold_otsu(image) if image.min() != image.max() else np.zeros_like(image, bool)
        np.testing.assert_array_equal(foreground, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 12), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_random_and_block_masks_have_exact_counts(height, width, mask_ratio, seed):
    n_patches = height * width
    if not 0 < int(n_patches * mask_ratio) < n_patches:
        return
    for rule in (at_random, in_blocks):
        mask = rule(ask(grid(3, height, width), 1, mask_ratio, seed=seed))
        assert mask.shape == (3, n_patches)
        assert mask.sum(1).tolist() == [int(n_patches * mask_ratio)] * 3


def test_blocks_are_blocks_and_lie_everywhere():
    def equal_neighbours(mask):
        rows = mask.view(-1, 14, 14)
        return (rows[:, 1:] == rows[:, :-1]).float().mean().item()

    asked = ask(grid(2000, 14, 14), 1, 0.5)
    blocks = in_blocks(asked)
    assert equal_neighbours(blocks) > 0.8
    assert equal_neighbours(at_random(asked)) == pytest.approx(0.5, abs=0.02)
    frequency = blocks.mean(0)
    assert 0.4 < frequency.min() and frequency.max() < 0.6  # corners too


def test_masks_repeat_with_the_generator_and_differ_between_steps_and_ranks():
    def draw(*key):
        return at_random(MaskRequest({"attention": grid(2, 14, 14)}, 1, generator=mask_generator(*key)))

    assert torch.equal(draw(0, 1, 2, 3), draw(0, 1, 2, 3))
    keys = [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4), (0, 2, 1, 3)]
    assert len({tuple(draw(*key).flatten().tolist()) for key in keys}) == len(keys)


def test_a_rule_that_masks_other_than_asked_is_an_error(monkeypatch):
    monkeypatch.setitem(MASKINGS, "planted", lambda ask: torch.ones(2, 16))
    with pytest.raises(RuntimeError, match="'planted': not 12 masked patches in each image, each 0 or 1"):
        draw_mask("planted", ask(grid(2, 64, 64)))


def test_a_mask_on_the_cells_of_a_scale_keeps_its_mean():
    mask = torch.rand(3, 1, 4, 6).round()
    for scale in (4.0, 2.0, 1.0, 0.5):
        cells = mask_cells(mask, scale)
        assert cells.shape == (3, 1, 4 * scale, 6 * scale)
        assert torch.equal(mask_cells(cells, 1 / scale), mask) or scale < 1
        assert torch.allclose(cells.mean((1, 2, 3)), mask.mean((1, 2, 3)))
