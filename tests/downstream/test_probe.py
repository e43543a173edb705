"""Probes and folds: no subject on both sides, every image tested once, taps as they were trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from downstream.data.labelled import LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.data.splits import draw_folds
from downstream.encoders import Candidate, read_candidates
from downstream.forward import Encoder, network_input
from downstream.probe import principal_components, probe_scores, standardise
from models_cxrmim import CXRMIM
from util.errors import UserError


def made_up(labels: np.ndarray, subjects: np.ndarray, parts: np.ndarray | None = None) -> LabelledImages:
    n = len(labels)
    return LabelledImages(
        name="x",
        ids=[str(i) for i in range(n)],
        files=[Path(str(i)) for i in range(n)],
        subjects=subjects.astype(str),
        parts=np.full(n, "") if parts is None else parts,
        label_names=[f"l{j}" for j in range(labels.shape[1])],
        labels=labels.astype(np.float32),
    )


def folded_scores(images: LabelledImages, values: np.ndarray, n_folds: int = 5) -> np.ndarray:
    scores = np.full(len(images), np.nan)
    for rows in partitions(images, 1.0, seed=0, n_folds=n_folds, validate=False):
        scores[rows.test] = probe_scores(
            standardise(values, rows.train), images.labels[:, 0], images.subjects, rows, seed=0, say=print, name="l0"
        )
    return scores


@pytest.mark.parametrize("validate", [True, False])
def test_folds_test_every_image_once_and_never_share_a_subject(validate):
    rng = np.random.default_rng(0)
    images = made_up(rng.integers(0, 2, (60, 2)), np.arange(60) // 2)
    found = partitions(images, 1.0, seed=3, n_folds=5, validate=validate)
    assert sorted(np.concatenate([rows.test for rows in found])) == list(range(60))
    for rows in found:
        parts = [set(images.subjects[part]) for part in (rows.train, rows.valid, rows.test)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        assert sum(map(len, (rows.train, rows.valid, rows.test))) == 60 and bool(len(rows.valid)) == validate
    half = partitions(images, 0.5, seed=3, n_folds=5, validate=validate)
    for rows, fewer in zip(found, half, strict=True):
        assert set(fewer.train) < set(rows.train) and len(fewer.train) == round(len(rows.train) / 2)
        assert np.array_equal(fewer.test, rows.test)


@pytest.mark.parametrize(("n", "n_folds"), [(48, 40), (60, 5), (61, 7)])
def test_folds_share_every_kind_evenly_and_none_is_empty(n, n_folds):
    kinds = np.random.default_rng(0).integers(0, 3, n)
    folds = draw_folds(kinds, np.arange(n).astype(str), n_folds, 1)
    assert set(folds) == set(range(n_folds))
    for kind in range(3):
        counts = np.bincount(folds[kinds == kind], minlength=n_folds)
        assert counts.max() - counts.min() <= 2
    assert np.ptp(np.bincount(folds)) <= 1
    assert (folds != draw_folds(kinds, np.arange(n).astype(str), n_folds, 2)).any()


def test_scores_know_nothing_of_the_tested_subject():
    """Features that name the subject help a leaky split to AUC 1, and a grouped one to chance."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 3)
    labels = rng.integers(0, 2, 40)[subjects].astype(float)
    features = np.eye(40)[subjects]
    assert roc_auc_score(labels, folded_scores(made_up(labels[:, None], subjects), features)) < 0.7
    leaky = made_up(labels[:, None], np.arange(120))
    assert roc_auc_score(labels, folded_scores(leaky, features)) > 0.95


def test_unknown_labels_and_lone_classes(capsys):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 3))
    labels = (values[:, 0] > 0).astype(float)
    labels[::5] = np.nan
    rows = Rows(np.arange(20), np.arange(20, 30), np.arange(30, 40))
    known = Rows(*(part[~np.isnan(labels[part])] for part in (rows.train, rows.valid)), rows.test)
    subjects, how = np.arange(40).astype(str), dict(seed=0, say=print, name="ours, Mass")
    scores = probe_scores(values, labels, subjects, rows, **how)
    assert np.array_equal(scores, probe_scores(values, labels, subjects, known, **how)) and len(scores) == 10
    labels[rows.train] = 0
    assert (probe_scores(values, labels, subjects, rows, **how) == 0.5).all()
    assert "ours, Mass: no image with it among 20 to train on" in capsys.readouterr().out


@pytest.mark.parametrize("fit", [standardise, partial(principal_components, seed=0)])
def test_features_are_fitted_on_training_rows_only(fit):
    values = np.random.default_rng(0).normal(size=(50, 9))
    moved = values.copy()
    moved[40:] += 100
    np.testing.assert_allclose(fit(values, np.arange(30))[:40], fit(moved, np.arange(30))[:40])


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
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for tap, latent in (("0", latents[0]), ("last", latents[1])):
        own, random = read_candidates([f"ours={tmp_path / 'c.pth'}", "random"], imagenet="", tap=tap)
        built = own.build().eval()
        assert len(built.blocks) == len(random.build().blocks) == (1 if tap == "0" else 2)
        assert len(own.build(2, global_pool="avg").blocks) == len(built.blocks)
        found = Encoder(built, mean, std, torch.device("cpu"))(gray)
        np.testing.assert_allclose(found, torch.cat([latent[:, 0], latent[:, 1:].mean(1)], 1), atol=1e-5)


def test_random_weights_follow_their_seed_and_leave_the_generator_alone(backbone):
    (own, random) = read_candidates([str(backbone), "random"], imagenet="")
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (random.build(seed=seed).pos_embed for seed in (0, 0, 1))
    assert torch.equal(torch.rand(2), wanted)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, own.build().pos_embed)


def test_input_is_scaled_to_the_encoders_side_and_normalised(backbone):
    (candidate,) = read_candidates([str(backbone)], imagenet="")
    model = candidate.build()
    gray = torch.full((2, 1, 224, 224), 51, dtype=torch.uint8)
    images = network_input(gray, model, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    assert images.shape == (2, 3, 32, 32)
    for channel, value in enumerate((-1.5, -0.8, -0.2)):
        torch.testing.assert_close(images[:, channel], torch.full((2, 32, 32), value))


def test_names_are_checked(backbone):
    with pytest.raises(UserError, match="printable"):
        read_candidates([f"a\n={backbone}"], imagenet="")
    with pytest.raises(UserError, match="named twice"):
        read_candidates(["random", "random"], imagenet="")
    assert read_candidates(["pixels"], imagenet="")[0] == Candidate("pixels", "pixels")
    (random,) = read_candidates(["random@test_vit"], imagenet="")
    assert random.build().embed_dim == 64 and random.name == "random@test_vit"
    with pytest.raises(UserError, match="--weights random@no_vit: timm can't make it"):
        read_candidates(["random@no_vit"], imagenet="")
