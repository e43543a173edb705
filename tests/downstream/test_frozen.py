"""Heads from stored features are those of the published loop, which encodes every image anew in every epoch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from downstream.data.images import CENTRE, normalisation
from downstream.data.labelled import LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.driver import Work, judge
from downstream.encoders import read_candidates
from downstream.forward import Encoder, Keyed
from downstream.heads import Recipe, epoch_order, known_loss, new_head, probabilities, schedule
from downstream.main import get_args_parser, read_weights
from util import distributed


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
    flags = f"--dataset rsna --data_path none --weights {backbone} --epochs 4 --batch_size 4 --lr 5e-2 --patience 4"
    flags += f" --seeds 43 44 --encode_batch 5 --num_workers 0 --device cpu --output_dir {tmp_path}"
    (rows,) = partitions(images, 1.0, seed=0, n_folds=2, validate=True)

    def work(n_views: int) -> Work:
        args = get_args_parser().parse_args([*flags.split(), "--views", str(n_views)])
        return Work(args, images, distributed.start("cpu"), SimpleNamespace(request=0, exit_at_signal=nullcontext))

    def judged(one: Work) -> list:
        (make,) = read_weights(one)
        return judge(one, make())

    one = work(4)
    full, fewer = judged(one), judged(work(2))
    (candidate,) = read_candidates([str(backbone)], imagenet="")
    encoder = Encoder(candidate.build().eval(), *normalisation("half"), torch.device("cpu"))
    for outcome, other in zip(full, fewer, strict=True):
        logits = published_head(encoder, one.views, images, rows, outcome.seed, one.recipe)
        assert outcome.ids == [images.ids[row] for row in rows.test]
        expected = probabilities(torch.from_numpy(logits), "multilabel")
        np.testing.assert_allclose(outcome.scores, expected, atol=1e-5)
        assert np.abs(outcome.scores - other.scores).max() > 1e-3


def published_head(encoder: Encoder, views, images, rows: Rows, seed: int, options: Recipe) -> np.ndarray:
    """The published loop: in every epoch read, augment and encode the training images, then the validation
    images; test the best epoch. Returns the test images' logits, [n, C]."""

    def features(keys: list[tuple[int, int]]):
        for gray in DataLoader(Keyed(views, keys), options.batch_size):
            width = encoder.model.embed_dim
            yield encoder(gray.to(encoder.device))[:, :width]

    def logits_of(part: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([head(batch) for batch in features([(CENTRE, int(i)) for i in part])])

    labels = torch.from_numpy(images.labels).to(encoder.device)
    head = new_head(encoder.model.embed_dim, labels.shape[1], seed).to(encoder.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    steps, best, state = len(rows.train) // options.batch_size, math.inf, {}
    for epoch in range(options.epochs):
        order = rows.train[epoch_order(seed, epoch, len(rows.train))][: steps * options.batch_size]
        for step, batch in enumerate(features([(epoch, int(i)) for i in order])):
            for group in optimizer.param_groups:
                group["lr"] = schedule(epoch * steps + step, steps, options)
            wanted = labels[order[step * options.batch_size : (step + 1) * options.batch_size]]
            optimizer.zero_grad()
            known_loss(head(batch), wanted, images.task).backward()
            optimizer.step()
        loss = known_loss(logits_of(rows.valid), labels[rows.valid], images.task).item()
        if loss < best:
            best, state = loss, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(state)
    return logits_of(rows.test).cpu().numpy()
