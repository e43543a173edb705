"""Probes and folds: no subject on both sides, every image tested once, taps as they were trained."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from read_labelled import make_labelled
from sklearn.metrics import roc_auc_score

from downstream.data.images import normalisation
from downstream.data.partition import Rows, partitions
from downstream.data.splits import draw_folds
from downstream.encoders import read_candidates
from downstream.forward import outputs
from downstream.frozen import probe_scores, scaled
from models_cxrmim import CXRMIM
from util.errors import UserError
from util.export import export_backbone


@pytest.mark.parametrize("validate", [True, False])
def test_folds_test_every_image_once_and_never_share_a_subject(validate):
    images = make_labelled(np.random.default_rng(0).integers(0, 2, (60, 1)), subjects=np.arange(60) // 2)
    found, half = (partitions(images, share, seed=3, n_folds=5, validate=validate) for share in (1.0, 0.5))
    assert sorted(np.concatenate([rows.test for rows in found])) == list(range(60))
    for rows, fewer in zip(found, half, strict=True):
        subjects = [set(images.subjects[part]) for part in (rows.train, rows.valid, rows.test)]
        assert len(set.union(*subjects)) == sum(map(len, subjects)) == 30 and bool(len(rows.valid)) == validate
        assert set(fewer.train) < set(rows.train) and len(fewer.train) == round(len(rows.train) / 2)
        assert np.array_equal(fewer.test, rows.test)


@pytest.mark.parametrize(("n", "n_folds"), [(48, 40), (61, 7)])
def test_folds_share_every_kind_evenly_and_none_is_empty(n, n_folds):
    kinds, subjects = np.random.default_rng(0).integers(0, 3, n), np.arange(n).astype(str)
    folds, other = (draw_folds(kinds, subjects, n_folds, seed) for seed in (1, 2))
    counts = np.array([np.bincount(folds[kinds == kind], minlength=n_folds) for kind in range(3)])
    assert np.ptp(counts, axis=1).max() <= 2 and np.ptp(counts.sum(0)) <= 1 and counts.sum(0).min() > 0
    assert (folds != other).any()


def test_scores_know_nothing_of_the_tested_subject():
    """Features that name the subject help a leaky split to AUC 1, and a grouped one to chance."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 3)
    labels = rng.integers(0, 2, 40)[subjects].astype(float)
    features, aucs = np.eye(40)[subjects], []
    for grouped in (subjects, np.arange(120)):
        images = make_labelled(labels[:, None], subjects=grouped)
        scores = np.full(120, np.nan)
        for rows in partitions(images, 1.0, seed=0, n_folds=5, validate=False):
            values = scaled(features, rows.train, pixels=False, seed=0)
            scores[rows.test] = probe_scores(values, labels, images.subjects, rows, seed=0, name="l0")
        aucs.append(roc_auc_score(labels, scores))
    assert aucs[0] < 0.7 and aucs[1] > 0.95


def test_unknown_labels_and_lone_classes(capsys):
    values = np.random.default_rng(0).normal(size=(40, 3))
    labels = (values[:, 0] > 0).astype(float)
    labels[::5] = np.nan
    rows = Rows(np.arange(20), np.arange(20, 30), np.arange(30, 40))
    known = Rows(*(part[~np.isnan(labels[part])] for part in (rows.train, rows.valid)), rows.test)
    scores = partial(probe_scores, values, labels, np.arange(40).astype(str), seed=0, name="ours, Mass")
    assert np.array_equal(scores(rows), scores(known)) and len(scores(rows)) == 10
    labels[rows.train] = 0
    assert (scores(rows) == 0.5).all() and "ours, Mass: 20 images to train on" in capsys.readouterr().out


@pytest.mark.parametrize("pixels", [False, True])
def test_features_are_fitted_on_training_rows_only(pixels):
    values = np.random.default_rng(0).normal(size=(50, 9))
    moved = values + 100 * (np.arange(50) >= 40)[:, None]
    own, other = (scaled(features, np.arange(30), pixels=pixels, seed=0) for features in (values, moved))
    np.testing.assert_allclose(own[:40], other[:40])


def test_a_tap_is_its_blocks_and_random_weights_have_as_many(tmp_path):
    """What pretraining calls the tap's latent is what the encoder gives, and no baseline is deeper."""
    torch.manual_seed(0)
    model = CXRMIM(img_size=32, embed_dim=64, depth=3, num_heads=1, id_list=(0, 1), scale_list=(1.0, 0.5)).eval()
    state = {"model": model.state_dict(), "args": {"id_list": [0, 1]}, "metadata": {"num_heads": "1"}}
    torch.save(state, tmp_path / "c.pth")
    gray = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    batch = model.prepare_batch({"img": gray, "attention": torch.zeros(4, 32, 32)})
    with torch.no_grad():
        latents = model.forward_encoder(batch["img"], torch.zeros(4, model.num_patches))
    for tap, latent in enumerate(latents):
        export_backbone(tmp_path / "c.pth", tmp_path / "ours.pth", tap=tap)
        own, random = read_candidates([str(tmp_path / "ours.pth"), "random"], imagenet="")
        built = own.build().eval()
        assert len(built.blocks) == len(random.build().blocks) == tap + 1
        assert len(own.build(2, global_pool="avg").blocks) == len(built.blocks)
        found = outputs(built, gray, normalisation("imagenet"), torch.float32)
        np.testing.assert_allclose(found, torch.cat([latent[:, 0], latent[:, 1:].mean(1)], 1), atol=1e-5)


def test_random_weights_follow_their_seed(backbone):
    (own, random) = read_candidates([str(backbone), "random"], imagenet="")
    first, again, other = (random.build(seed=seed).pos_embed for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, own.build().pos_embed)


def test_names_are_checked(backbone):
    for texts, reason in [
        ([f"a\n={backbone}"], "expected NAME=FILE"),
        ([f"={backbone}"], "expected NAME=FILE"),
        (["random", "random"], "named twice"),
        (["random@no_vit"], "--weights random@no_vit: timm can't make it"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_candidates(texts, imagenet="")
    pixels, random = read_candidates(["pixels", "random@test_vit"], imagenet="")
    assert pixels.name == "pixels" and random.build().embed_dim == 64 and random.name == "random@test_vit"
