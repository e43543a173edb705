"""Methods on frozen encoders, whose features are encoded once: linear heads as published, and probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from downstream.data.images import CENTRE
from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.data.partition import Rows
from downstream.data.splits import draw_folds
from downstream.driver import Method, Part, Recipe, Runs, Scores, Work
from downstream.encoders import PIXELS, Candidate, digest_of, input_size, pooled
from downstream.forward import Stopped, all_outputs
from downstream.jobs import digest
from util.bootstrap import auc
from util.errors import UserError
from util.files import atomic_write, file_lock
from util.lr_sched import learning_rate
from util.output import Progress
from util.stop import StopSignals

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, chosen on training images
STRENGTH_FOLDS = 3
PIXEL_COMPONENTS = 64


class Frozen(Method):
    """A method on features of a frozen encoder: the first of `pooled`, the cls token if there is one, in views of the
    training images, and in the centre view all.

    They stand in one .npy per view in a folder that is named by what they depend on. Random numbers of the views come
    from their number alone, so more views leave the first as they are.
    """

    def __init__(self, work: Work, candidate: Candidate):
        super().__init__(work, candidate)
        model, self.scale = candidate.build().eval(), candidate.normalisation(work.args.normalisation)
        with torch.no_grad():
            sample = pooled(model, model.forward_features(torch.zeros(1, 3, *input_size(model))))
        widths = [feature.shape[1] for feature in sample.values()]
        self.first, self.total = widths[0], sum(widths)
        content = digest([digest_of(model), candidate.architecture, work.files, self.scale, str(work.dtype)])
        self.model, self.key = model.to(work.ranks.device), [content]
        self.folder = Path(work.args.features_dir or Path(work.args.output_dir, "features"), content)
        if self.trains:
            self.key += [asdict(work.recipe), work.args.views]
        elif candidate.kind != PIXELS:
            self.kinds = tuple(sample)

    def path(self, view: int) -> Path:
        return self.folder / ("centre.npy" if view == CENTRE else f"view-{view:03d}.npy")

    def rows(self, view: int) -> np.ndarray:
        """A row for each image of the data set, NaN where it is missing: float32 [N, self.total] of the centre view, else
        [N, self.first]."""
        shape = len(self.work.images), self.total if view == CENTRE else self.first
        there = self.path(view).exists()
        return np.load(self.path(view), mmap_mode="c") if there else np.broadcast_to(np.float32(np.nan), shape)

    def encode(self, wanted: Mapping[int, np.ndarray]) -> None:
        """Encode what is missing of the images wanted in each view.

        Raises:
            Stopped: a stop was requested; what was encoded is kept.
            UserError: an unreadable image, features that are not finite, or a full disk.
        """
        work = self.work
        self.folder.mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / "lock", what=f"features {self.folder}", wait=True):
            missing = {view: np.sort(some[np.isnan(self.rows(view)[some, 0])]) for view, some in wanted.items()}
            missing = {view: images for view, images in missing.items() if len(images)}
            progress = Progress(f"{self.name}: encoding", sum(map(len, missing.values())), "images")
            for view, images in missing.items():
                rows, done = np.array(self.rows(view)), 0
                for found in all_outputs(self.model, work.views, images, view, self.scale, **work.loading):
                    if not found.isfinite().all():
                        raise UserError(f"{self.name}: features are not finite; pass --dtype float32, or sound weights")
                    rows[images[done : done + len(found)]] = found[:, : rows.shape[1]]
                    done += len(found)
                    progress.add(len(found))
                with atomic_write(self.path(view)) as file:
                    np.save(file, rows)
                if work.signals.request:
                    raise Stopped
        if progress.done:
            print(f"{self.name}: {progress.done} images encoded into {self.folder}", flush=True)


class Linear(Frozen):
    """The published linear evaluation."""

    def scores(self, part: Part, runs: Runs) -> Scores:
        work, rows, what = self.work, part.rows, f"{self.name}-{part.name}"
        views = range(min(work.args.views, work.recipe.epochs))
        self.encode({CENTRE: np.r_[rows.valid, rows.test]} | dict.fromkeys(views, rows.train))
        labels = torch.from_numpy(work.images.labels).to(work.ranks.device)

        def read(view: int, images: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(self.rows(view)[images, : self.first]).to(labels)

        how = {"task": work.images.task, "recipe": work.recipe, "signals": work.signals}
        heads = train_heads(read, views, labels, rows, seeds=list(runs), what=f"{what}: heads", **how)
        tested = read(CENTRE, rows.test)
        for seed, head in zip(runs, heads, strict=True):
            told = f"best epoch {head.epoch + 1}, validation loss {head.valid_losses[head.epoch]:.4f}"
            print(f"{what}, seed {seed}: {told}", flush=True)
            yield seed, probabilities(F.linear(tested, head.weight, head.bias), work.images.task)[None]


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


def known_loss(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Loss averaged over the known labels: [..., B, C], labels NaN where unknown -> [...].

    multilabel: binary cross-entropy; multiclass: cross-entropy, labels one-hot.
    """
    if task == MULTICLASS:
        return -(labels * F.log_softmax(logits, -1)).sum(-1).mean(-1)
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return (losses * known).sum((-2, -1)) / known.sum((-2, -1)).clamp(min=1)


def schedule(step: int, steps_per_epoch: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear from 0 over the warm-up's share of all steps, then cosine to 0."""
    epochs, warmup = recipe.epochs, recipe.warmup * recipe.epochs
    return learning_rate(step / steps_per_epoch, lr=recipe.lr, min_lr=0.0, warmup_epochs=warmup, epochs=epochs)


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
    read: Callable[[int, np.ndarray], Tensor],
    views: Sequence[int],
    labels: Tensor,
    rows: Rows,
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
        read: (view, images) -> features [n, D]; of the training images in `views`, of the others in the centre view.
        labels: [N, C] of all images.

    Raises:
        Stopped: a stop was requested.
        UserError: fewer images than a batch, or a loss that is not finite.
    """
    n, n_steps = len(rows.train), steps_per_epoch(len(rows.train), recipe.batch_size)
    valid, valid_labels, labels = read(CENTRE, rows.valid), labels[rows.valid], labels[rows.train]
    starts = [new_head(valid.shape[1], labels.shape[1], seed).to(valid) for seed in seeds]
    # A product and a loss each: one for all is computed in another order for another number of heads, and so would differ
    # in the last bits when a killed run goes on with the heads that are left.
    weights = [start.weight.detach().T.contiguous().requires_grad_() for start in starts]  # [D, C]
    biases = [start.bias.detach().requires_grad_() for start in starts]
    optimizer = torch.optim.Adam([*weights, *biases], lr=recipe.lr, weight_decay=recipe.weight_decay, foreach=True)
    best, losses = [None] * len(seeds), [[] for _ in seeds]  # heads and validation losses
    progress = Progress(what, recipe.epochs * n_steps, "steps")
    for epoch in range(recipe.epochs):
        features = None  # not two views at once
        features = read(views[epoch % len(views)], rows.train)
        order = torch.from_numpy(np.stack([np.random.default_rng((seed, epoch)).permutation(n) for seed in seeds])).to(
            valid.device
        )
        for step in range(n_steps):
            optimizer.param_groups[0]["lr"] = schedule(epoch * n_steps + step, n_steps, recipe)
            batch = order[:, step * recipe.batch_size : (step + 1) * recipe.batch_size]  # [H, B]
            step_losses = [
                known_loss(torch.addmm(b, features[own], w), labels[own], task)
                for b, own, w in zip(biases, batch, weights, strict=True)
            ]
            optimizer.zero_grad(set_to_none=True)
            torch.stack(step_losses).sum().backward()
            optimizer.step()
        with torch.no_grad():
            judged = [known_loss(valid @ w + b, valid_labels, task) for w, b in zip(weights, biases, strict=True)]
        for i, loss in enumerate(torch.stack(judged).tolist()):
            if best[i] and epoch - best[i].epoch > recipe.patience:
                continue  # it has stopped
            if not math.isfinite(loss):
                raise UserError(f"{what}, epoch {epoch + 1}: the validation loss is not finite; lower --lr")
            losses[i].append(loss)
            if best[i] is None or loss < best[i].valid_losses[best[i].epoch]:
                best[i] = Head(weights[i].detach().T.clone(), biases[i].detach().clone(), epoch, losses[i])
        progress.add(n_steps)
        if signals.request:
            raise Stopped
        if all(epoch - head.epoch >= recipe.patience for head in best):
            break
    return best


def probabilities(logits: Tensor, task: str) -> np.ndarray:
    """Scores between 0 and 1, float32 [N, C]: a sigmoid per label, or a softmax over classes."""
    logits = logits.double().cpu()
    return (logits.sigmoid() if task == MULTILABEL else logits.softmax(-1)).float().numpy()


class Probe(Frozen):
    """Logistic regression on features of the centre crop, cls and mean of patches ("pixels": principal components).

    Only folds depend on the seed: with the data's own parts the first seed stands for all.
    """

    trains = False

    def scores(self, part: Part, runs: Runs) -> Scores:
        images, rows, (seed,) = self.work.images, part.rows, runs
        used = np.r_[rows.train, rows.valid, rows.test]
        self.encode({CENTRE: used})
        values = np.zeros((len(images), self.total), np.float32)
        values[used] = self.rows(CENTRE)[used]
        scores = np.empty((len(self.kinds), len(rows.test), len(images.label_names)), np.float32)
        for k, own in enumerate(np.split(values, len(self.kinds), axis=1)):
            own = scaled(own, rows.train, pixels=not self.kinds[k], seed=seed)
            for j, label in enumerate(images.label_names):
                if self.work.signals.request:
                    raise Stopped
                name = f"{self.name}-{part.name}, {label}"
                scores[k, :, j] = probe_scores(own, images.labels[:, j], images.subjects, rows, seed=seed, name=name)
        yield seed, scores


def scaled(features: np.ndarray, train: np.ndarray, *, pixels: bool, seed: int) -> np.ndarray:
    """Features [N, D], each scaled by the training rows; of gray values `PIXEL_COMPONENTS` components fitted on them.

    These keep their proportions: equal scales would blow up the last ones, which are noise.
    """
    if not pixels:
        return StandardScaler().fit(features[train]).transform(features)
    n = min(PIXEL_COMPONENTS, len(train) - 1, features.shape[1])
    values = PCA(n, random_state=seed).fit(features[train]).transform(features)
    return values / values[train].std()


def probe_scores(
    values: np.ndarray, labels: np.ndarray, subjects: np.ndarray, rows: Rows, *, seed: int, name: str
) -> np.ndarray:
    """Probability of one label for the test rows, of the fit on its known training rows: float64 [len(rows.test)].

    The strength is the one with the best AUC on the validation rows, or, if there are none, in grouped
    folds of the training rows; the smallest if a fold lacks a kind of image. If the training rows have no image with the
    label, or none without, all scores are 0.5, with a message.

    Args:
        values: [N, D] of all images, scaled.
        labels: [N], NaN where unknown.
        name: of the label, for the message.
    """
    train, valid = (part[~np.isnan(labels[part])] for part in (rows.train, rows.valid))

    def has_both(images: np.ndarray) -> bool:
        return len(np.unique(labels[images])) == 2

    def fit(images: np.ndarray, strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=1000).fit(values[images], labels[images])

    def value(strength: float) -> float:
        fits = [(fit(inner, strength), outer) for inner, outer in parts if has_both(outer)]
        return sum(auc(labels[outer], model.decision_function(values[outer])) for model, outer in fits)

    if not has_both(train):
        print(
            f"{name}: {len(train)} images to train on are all with it, or all without; all scores are 0.5", flush=True
        )
        return np.full(len(rows.test), 0.5)
    parts = [(train, valid)]
    if not has_both(valid):
        folds = draw_folds(labels[train], subjects[train], STRENGTH_FOLDS, seed)
        parts = [(train[folds != k], train[folds == k]) for k in range(STRENGTH_FOLDS)]
    with threadpool_limits(1):  # the problems are small; more threads only get into each other's way
        strength = max(STRENGTHS, key=value) if all(has_both(inner) for inner, _ in parts) else STRENGTHS[0]
        return fit(train, strength).predict_proba(values[rows.test])[:, 1]
