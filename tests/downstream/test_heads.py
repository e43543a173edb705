"""Linear heads equal plain loops, whatever is beside them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from downstream.heads import Recipe, epoch_order, known_loss, schedule, train_heads
from util.errors import UserError


class Quiet:
    """No stop is asked for."""

    request = 0


def made_up(n: int = 90, width: int = 12, n_labels: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(n, width, generator=generator) for _ in range(3)]
    labels = (torch.rand(n, n_labels, generator=generator) < 0.4).float()
    return views, labels


def plain_head(views, labels, valid, valid_labels, seed: int, options: Recipe, task: str):
    """The published training of one head, written out: losses of every step, best weights, epochs run."""
    torch.manual_seed(seed)
    head = torch.nn.Linear(valid.shape[1], labels.shape[1])
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    n_steps = len(labels) // options.batch_size
    total, warm = n_steps * options.epochs, options.warmup * n_steps * options.epochs
    best, best_loss, best_epoch, step = None, math.inf, -1, 0

    def loss_of(logits, wanted):
        if task == "multiclass":
            return F.cross_entropy(logits, wanted.argmax(1))
        known = ~wanted.isnan()
        return F.binary_cross_entropy_with_logits(logits[known], wanted[known])

    epochs = 0
    for epoch in range(options.epochs):
        order = epoch_order(seed, epoch, len(labels))
        for i in range(n_steps):
            if step < warm:
                lr = options.lr * step / warm
            else:
                lr = options.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))
            for group in optimizer.param_groups:
                group["lr"] = lr
            rows = order[i * options.batch_size : (i + 1) * options.batch_size]
            loss = loss_of(head(views[epoch % len(views)][rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        epochs += 1
        with torch.no_grad():
            loss = loss_of(head(valid), valid_labels).item()
        if loss < best_loss:
            best, best_loss, best_epoch = [p.detach().clone() for p in head.parameters()], loss, epoch
        elif epoch - best_epoch >= options.patience:
            break
    return best, best_epoch, epochs


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_stacked_heads_are_plain_loops(task):
    views, labels = made_up()
    if task == "multiclass":
        labels = F.one_hot(labels.argmax(1), 3).float()
    else:
        labels[5, 1] = labels[17, 0] = torch.nan
    options = Recipe(epochs=6, batch_size=16, lr=2e-2)
    valid, valid_labels = views[2][:40].flip(1), labels[:40]
    heads = train_heads(
        [lambda view=view: view for view in views],
        labels,
        valid,
        valid_labels,
        task=task,
        seeds=[43, 44, 45],
        recipe=options,
        signals=Quiet(),
        what="heads",
    )
    for seed, head in zip([43, 44, 45], heads, strict=True):
        (weight, bias), epoch, epochs = plain_head(views, labels, valid, valid_labels, seed, options, task)
        assert head.epoch == epoch and len(head.valid_losses) == epochs
        torch.testing.assert_close(head.weight, weight, atol=1e-6, rtol=0)
        torch.testing.assert_close(head.bias, bias, atol=1e-6, rtol=0)
    assert not torch.allclose(heads[0].weight, heads[1].weight, atol=1e-3)


def test_a_head_stops_early_and_the_others_do_not_notice():
    """More features than images can tell: the validation loss turns; each head alone gives the same."""
    views, _ = made_up(n=64, width=40)
    told = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))
    labels, valid = (views[0] @ told > 0).float(), views[1]
    valid_labels = (valid @ told + 6 * views[2][:, :2] > 0).float()
    options = Recipe(epochs=60, batch_size=16, lr=5e-2, patience=3)
    run = lambda seeds: train_heads(  # noqa: E731
        [lambda: views[0]],
        labels,
        valid,
        valid_labels,
        task="multilabel",
        seeds=seeds,
        recipe=options,
        signals=Quiet(),
        what="heads",
    )
    together = run([1, 2, 3, 4])
    assert all(len(head.valid_losses) == head.epoch + 1 + 3 < 60 for head in together)
    assert len({len(head.valid_losses) for head in together}) > 1
    for seed, head in zip([1, 2, 3, 4], together, strict=True):
        (alone,) = run([seed])
        assert alone.epoch == head.epoch
        torch.testing.assert_close(alone.weight, head.weight, atol=1e-6, rtol=0)
        assert head.valid_losses[head.epoch] == min(head.valid_losses)


def test_schedule_is_the_published_one():
    options = Recipe(epochs=10)
    rates = [schedule(step, 5, options) for step in range(50)]
    assert rates[0] == 0 and rates[20] == options.lr and rates[10] == pytest.approx(options.lr / 2)
    assert rates[35] == pytest.approx(options.lr / 2) and 0 < rates[49] < 1e-5


def test_unknown_labels_have_no_say():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.randint(0, 2, (4, 3)).float()
    labels[1, 2] = labels[3, 0] = torch.nan
    known = ~labels.isnan()
    loss = known_loss(logits, labels, "multilabel")
    wanted = F.binary_cross_entropy_with_logits(logits[known], labels[known])
    assert loss.item() == pytest.approx(wanted.item())
    loss.backward()
    assert (logits.grad[~known] == 0).all() and (logits.grad[known] != 0).all()


def test_bad_heads_are_one_line():
    views, labels = made_up()
    common = dict(task="multilabel", seeds=[1], signals=Quiet(), what="ours")
    with pytest.raises(UserError, match="--batch_size 91: there are only 90 images"):
        train_heads([lambda: views[0]], labels, views[1], labels, recipe=Recipe(batch_size=91), **common)
    with pytest.raises(UserError, match="ours, epoch 1: the validation loss is not finite; lower --lr"):
        train_heads([lambda: views[0] * math.inf], labels, views[1], labels, recipe=Recipe(1, 8), **common)
