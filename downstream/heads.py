"""Linear heads on stored features of a frozen encoder, all seeds of a label fraction at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.forward import Stopped
from util.errors import UserError
from util.lr_sched import learning_rate
from util.output import Progress
from util.stop import StopSignals


@dataclass(frozen=True)
class Recipe:
    """How a linear head, or a whole encoder, is trained; the defaults are the published ones, the same for both.

    Attributes:
        batch_size: images per step, over all processes.
        warmup: share of all steps in which the learning rate rises.
        patience: epochs without a lower validation loss before stopping.
        layer_decay: fine-tuning: learning rate of a block over that of the next one; 1: the same for all.
        drop_path: fine-tuning: stochastic depth of the last block.
        pool: fine-tuning: what the head sees: token (cls) or avg (mean of the patches).
        optimizer: fine-tuning: adam or adamw.
    """

    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-5
    warmup: float = 0.4
    patience: int = 10
    layer_decay: float = 1.0
    drop_path: float = 0.0
    pool: str = "token"
    optimizer: str = "adam"


RECIPES = {
    "published": Recipe(),
    # Rates and decay are ours, for small data: not those that MAE fine-tunes with.
    "layer_decay": Recipe(30, 32, 5e-4, 0.05, 0.1, 10, layer_decay=0.75, drop_path=0.1, pool="avg", optimizer="adamw"),
}


@dataclass(frozen=True)
class Head:
    """A trained linear head, of its epoch with the lowest validation loss.

    Attributes:
        weight: float [C, D]; bias: float [C].
        epoch: 0-based; valid_losses: of the epochs until it stopped.
    """

    weight: Tensor
    bias: Tensor
    epoch: int
    valid_losses: list[float]

    def logits(self, features: Tensor) -> Tensor:
        """[N, C] of features [N, D]."""
        return F.linear(features, self.weight, self.bias)


def known_loss(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Loss averaged over the known labels: [..., B, C], labels NaN where unknown -> [...].

    multilabel: binary cross-entropy; multiclass: cross-entropy, labels one-hot.
    """
    if task == MULTICLASS:
        return -(labels * F.log_softmax(logits, -1)).sum(-1).mean(-1)
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (losses * known).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the training images in an epoch, a function of these three."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def schedule(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear from 0 over the warm-up's share of all steps, then cosine to 0."""
    return learning_rate(
        step / steps_per_epoch,
        lr=recipe.lr,
        min_lr=0.0,
        warmup_epochs=recipe.warmup * recipe.epochs,
        epochs=recipe.epochs,
    )


def new_head(width: int, n_labels: int, seed: int) -> nn.Linear:
    """torch's linear layer as a run with this seed starts it; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, n_labels)


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Whole batches of an epoch. Raises `UserError` if there are none."""
    if n_images < batch_size:
        raise UserError(
            f"--batch_size {batch_size}: there are only {n_images} images to train on; lower it, or raise --fractions"
        )
    return n_images // batch_size


def train_heads(
    views: Sequence[Callable[[], Tensor]],
    labels: Tensor,
    valid: Tensor,
    valid_labels: Tensor,
    *,
    task: str,
    seeds: Sequence[int],
    recipe: Recipe,
    signals: StopSignals,
    what: str,
) -> list[Head]:
    """Train one linear head per seed on the same images, side by side: one reading of a view, and one optimiser's step, for all.

    Epoch e sees view e modulo their number. A head stops after `patience` epochs without a lower validation
    loss; what the others do after that does not touch it. A head is the same to the bit whatever is beside it.

    Args:
        views: of the training images, each read when its turn comes: () -> features [N, D].
        labels: [N, C]; valid: features [V, D]; valid_labels: [V, C].

    Raises:
        Stopped: a stop was requested.
        UserError: fewer images than a batch, or a loss that is not finite.
    """
    n, n_labels = labels.shape
    n_steps = steps_per_epoch(n, recipe.batch_size)
    starts = [new_head(valid.shape[1], n_labels, seed) for seed in seeds]
    # A product and a loss each: one for all is computed in another order for another number of heads, and so would differ
    # in the last bits when a killed run goes on with the heads that are left.
    weights = [start.weight.detach().T.contiguous().to(valid).requires_grad_() for start in starts]  # [D, C]
    biases = [start.bias.detach().to(valid).requires_grad_() for start in starts]
    optimizer = torch.optim.Adam([*weights, *biases], lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    best: list[Head | None] = [None] * len(seeds)
    running = set(range(len(seeds)))
    history: list[list[float]] = [[] for _ in seeds]  # validation losses

    with Progress(what, recipe.epochs * n_steps, "steps") as progress:
        for epoch in range(recipe.epochs):
            features = None  # not two views at once
            features = views[epoch % len(views)]()
            order = torch.from_numpy(np.stack([epoch_order(seed, epoch, n) for seed in seeds])).to(valid.device)
            for step in range(n_steps):
                for group in optimizer.param_groups:
                    group["lr"] = schedule(epoch * n_steps + step, n_steps, recipe)
                rows = order[:, step * recipe.batch_size : (step + 1) * recipe.batch_size]  # [H, B]
                losses = [
                    known_loss(torch.addmm(b, features[own], w), labels[own], task)
                    for b, own, w in zip(biases, rows, weights, strict=True)
                ]
                optimizer.zero_grad(set_to_none=True)
                torch.stack(losses).sum().backward()
                optimizer.step()
            with torch.no_grad():
                judged = [known_loss(valid @ w + b, valid_labels, task) for w, b in zip(weights, biases, strict=True)]
            valid_losses = torch.stack(judged).tolist()
            if not all(math.isfinite(valid_losses[i]) for i in running):
                raise UserError(f"{what}, epoch {epoch + 1}: the validation loss is not finite; lower --lr")
            for i in sorted(running):
                losses = history[i]
                losses.append(valid_losses[i])
                if best[i] is None or losses[-1] < losses[best[i].epoch]:
                    best[i] = Head(weights[i].detach().T.clone(), biases[i].detach().clone(), epoch, losses)
                elif epoch - best[i].epoch >= recipe.patience:
                    running.remove(i)
            progress.add(n_steps, f"validation loss {np.mean(valid_losses):.4f}")
            if signals.request:
                raise Stopped
            if not running:
                break
    return best


def probabilities(logits: Tensor, task: str) -> np.ndarray:
    """Scores between 0 and 1, float64 [N, C]: a sigmoid per label, or a softmax over classes."""
    logits = logits.detach().double().cpu()
    return (logits.sigmoid() if task == MULTILABEL else logits.softmax(-1)).numpy()
