"""Linear heads from kept features are those of plain loops, which encode every image anew in every epoch, whatever is
beside them."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from read_labelled import make_labelled

from downstream.data.images import CENTRE, Views, normalisation
from downstream.data.partition import Rows
from downstream.driver import Recipe, Work, judge
from downstream.encoders import read_candidates
from downstream.forward import outputs
from downstream.frozen import Linear, probabilities, train_heads
from downstream.main import get_args_parser
from util import distributed
from util.errors import UserError
from util.stop import StopSignals


def plain_head(features, labels, rows: Rows, seed: int, options: Recipe, task: str):
    """The published training of one head, written out: best weights, their epoch, epochs run.

    features: (view, images) -> [n, D], the epoch's view of the training images; labels: [N, C].
    """
    valid = features(CENTRE, rows.valid)
    torch.manual_seed(seed)
    head = torch.nn.Linear(valid.shape[1], labels.shape[1])
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    n_steps = len(rows.train) // options.batch_size
    total, warm = n_steps * options.epochs, options.warmup * n_steps * options.epochs
    best, best_loss, best_epoch, step = None, math.inf, -1, 0

    def loss_of(logits, wanted):
        if task == "multiclass":
            return F.cross_entropy(logits, wanted.argmax(1))
        known = ~wanted.isnan()
        return F.binary_cross_entropy_with_logits(logits[known], wanted[known])

    for epoch in range(options.epochs):
        order = np.random.default_rng((seed, epoch)).permutation(rows.train)
        for i in range(n_steps):
            rate = step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            optimizer.param_groups[0]["lr"] = options.lr * rate
            batch = order[i * options.batch_size : (i + 1) * options.batch_size]
            optimizer.zero_grad()
            loss_of(head(features(epoch, batch)), labels[batch]).backward()
            optimizer.step()
            step += 1
        with torch.no_grad():
            loss = loss_of(head(valid), labels[rows.valid]).item()
        if loss < best_loss:
            best, best_loss, best_epoch = [p.detach().clone() for p in head.parameters()], loss, epoch
        elif epoch - best_epoch >= options.patience:
            break
    return best, best_epoch, epoch + 1


def test_a_view_per_epoch_is_the_published_loop(backbone, tmp_path):
    """The same draws, so the same scores; fewer views than epochs are another training."""
    rng, files = np.random.default_rng(0), []
    labels = rng.permutation(np.repeat([0, 1], 12)).astype(np.float32)[:, None]
    for i, label in enumerate(labels[:, 0]):
        files.append(tmp_path / f"{i}.png")
        gray = rng.normal(90 + 40 * label, 30, (48, 40)).clip(0, 255)
        Image.fromarray(gray.astype(np.uint8)).save(files[-1])
    parts = np.repeat(["train", "valid", "test"], (12, 4, 8))
    images = make_labelled(labels, parts, files=files, strong_augmentation=True)
    flags = "--dataset rsna --data_path none --epochs 4 --batch_size 4 --lr 5e-2 --patience 4 --seeds 43 44"
    flags += f" --num_workers 0 --device cpu --encode_batch 5 --cache_dir {tmp_path} --output_dir {tmp_path}"
    (candidate,) = read_candidates([str(backbone)], imagenet="")

    def judged(n_views: int) -> list:
        args = get_args_parser().parse_args([*flags.split(), "--views", str(n_views)])
        with StopSignals() as signals:
            work = Work(args, images, distributed.start("cpu"), signals)
            return judge(work, Linear(work, candidate))

    model, views = candidate.build().eval(), Views(images)

    def features(view: int, some: np.ndarray) -> torch.Tensor:
        gray = torch.stack([views[int(i), view] for i in some])
        return outputs(model, gray, normalisation("half"), torch.float32)[:, : model.embed_dim]

    rows, options = Rows(*map(images.indices, ("train", "valid", "test"))), Recipe(4, 4, 5e-2, patience=4)
    for outcome, other in zip(judged(4), judged(2), strict=True):
        head, *_ = plain_head(features, torch.from_numpy(labels), rows, outcome.run["seed"], options, "multilabel")
        assert outcome.images.ids == list(map(str, rows.test))
        expected = probabilities(F.linear(features(CENTRE, rows.test), *head), "multilabel")
        np.testing.assert_allclose(outcome.scores, expected, atol=1e-5)
        assert np.abs(outcome.scores - other.scores).max() > 1e-3


def heads_of(views, labels, rows, seeds, options, task="multilabel"):
    how = dict(task=task, seeds=seeds, recipe=options, signals=SimpleNamespace(request=0), what="ours")
    return train_heads(lambda view, some: views[view][some], range(len(views) - 1), labels, rows, **how)


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_heads_side_by_side_are_plain_loops(task):
    """More features than images can tell: heads stop early, at other epochs."""
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(104, 40, generator=generator) for _ in range(3)]  # the last, -1, is the centre view
    scores = views[0] @ torch.randn(40, 3, generator=generator) + 6 * views[1][:, :3]
    labels = (scores > 0).float()
    if task == "multiclass":
        labels = F.one_hot(scores.argmax(1), 3).float()
    else:
        labels[5, 1] = labels[17, 0] = labels[70, 2] = torch.nan  # unknown
    options, rows = Recipe(epochs=60, batch_size=16, lr=5e-2, patience=3), Rows(np.arange(64), np.arange(64, 104), None)
    together = heads_of(views, labels, rows, [1, 2, 3], options, task)
    assert len({len(head.valid_losses) for head in together}) > 1
    features = lambda view, some: views[view if view == CENTRE else view % 2][some]  # noqa: E731
    for seed, head in zip([1, 2, 3], together, strict=True):
        (weight, bias), epoch, epochs = plain_head(features, labels, rows, seed, options, task)
        assert head.epoch == epoch and len(head.valid_losses) == epochs == epoch + 4 < 60
        torch.testing.assert_close(head.weight, weight, atol=1e-4, rtol=0)
        torch.testing.assert_close(head.bias, bias, atol=1e-4, rtol=0)
        (alone,) = heads_of(views, labels, rows, [seed], options, task)
        assert torch.equal(alone.weight, head.weight) and alone.valid_losses == head.valid_losses


def test_a_loss_that_is_not_finite_is_one_line():
    views, labels, rows = [torch.full((9, 5), math.inf)] * 2, torch.eye(9, 3), Rows(np.arange(9), np.arange(9), None)
    with pytest.raises(UserError, match="ours, epoch 1: the validation loss is not finite; lower --lr"):
        heads_of(views, labels, rows, [1], Recipe(1, 8))
