"""Heads from stored features are those of the published loop, which encodes every image anew in every epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from downstream.data.images import Views, normalisation
from downstream.data.labelled import LabelledImages
from downstream.data.partition import partitions
from downstream.encoders import read_candidates
from downstream.frozen import Frozen, linear
from downstream.heads import Encoder, HeadOptions, probabilities
from downstream.jobs import Jobs
from scripts.benchmarks.downstream import published_head
from util.stop import StopSignals


@pytest.fixture
def images(tmp_path) -> LabelledImages:
    """24 images, of which 12 train; the positives are brighter."""
    rng, files = np.random.default_rng(0), []
    labels = rng.permutation(np.repeat([0, 1], 12)).astype(np.float32)[:, None]
    for i, label in enumerate(labels[:, 0]):
        files.append(tmp_path / f"{i}.png")
        gray = rng.normal(90 + 40 * label, 30, (48, 40)).clip(0, 255)
        Image.fromarray(gray.astype(np.uint8)).save(files[-1])
    parts = np.repeat(["train", "valid", "test"], (12, 4, 8)).astype(object)
    names = [file.stem for file in files]
    return LabelledImages("x", names, files, np.array(names), parts, ["x"], labels, strong_augmentation=True)


def test_a_view_per_epoch_is_the_published_loop(images, backbone, tmp_path):
    """The same draws, so the same scores; fewer views than epochs are another training."""
    (candidate,) = read_candidates([str(backbone)], imagenet="")
    device, scale = torch.device("cpu"), normalisation("half")
    heads, views = HeadOptions(epochs=4, batch_size=4, lr=5e-2, patience=4), Views(images)

    def from_features(n_views: int) -> dict:
        with StopSignals() as signals:
            frozen = Frozen(
                images=images,
                views=views,
                views_key="",
                files_key="",
                study_key="",
                fractions=(1.0,),
                seeds=(43, 44),
                n_folds=2,
                n_views=n_views,
                heads=heads,
                features_dir=tmp_path / "features",
                jobs=Jobs(tmp_path / "jobs"),
                device=device,
                dtype=torch.float32,
                batch_size=5,
                num_workers=0,
                signals=signals,
            )
            return linear(frozen, candidate, *scale)

    found, fewer = from_features(heads.epochs), from_features(2)
    encoder = Encoder(candidate.build().eval(), *scale, device)
    for (kind, fraction, seed), (tested, scores) in found.items():
        (rows,) = partitions(images, fraction, seed=0, n_folds=2, validate=True)
        logits = published_head(encoder, views, images, rows, seed, heads)
        assert np.array_equal(tested, rows.test)
        np.testing.assert_allclose(scores, probabilities(torch.from_numpy(logits), "multilabel"), atol=1e-5)
        assert np.abs(scores - fewer[kind, fraction, seed][1]).max() > 1e-3
