"""Frozen encoders: features of every image once per view, and all linear heads trained from them at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.data.images import normalise
from downstream.data.labelled import MULTICLASS, MULTILABEL
from downstream.features import FeatureFile
from util.errors import UserError
from util.loading import SampleLoader, ignore_stop_signals
from util.lr_sched import learning_rate
from util.output import Progress
from util.stop import StopSignals

# Features are brought to disk after so many images, or so many seconds: what a killed run loses.
WRITE_IMAGES, WRITE_SECONDS = 512, 10.0
# Images per forward pass of a frozen encoder. On a CPU larger batches leave its caches, and each of their tensors is
# memory that the system hands out anew; the features are the same.
ENCODE_BATCH = {"cpu": 16, "cuda": 64}


class Stopped(Exception):
    """A stop was asked for; what is done so far is kept."""


# ---------------------------------------------------------------- features


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and how its input is scaled.

    Attributes:
        model: timm ViT without head; `forward_features` gives tokens [B, 1 + L, D] after the final norm.
        mean, std: of the input's three channels.
        dtype: of autocast; float32 for none.
    """

    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device
    dtype: torch.dtype = torch.float32

    @torch.no_grad()
    def __call__(self, gray: Tensor) -> Tensor:
        """Cls token and mean of the patch tokens, [B, 2 D], of gray images uint8 [B, 1, H, W]."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.model.forward_features(network_input(gray, self.model, self.mean, self.std))
        tokens = tokens.float()
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


def network_input(gray: Tensor, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 1, H, W] -> float [B, 3, S, S], normalised; S is the side that a timm ViT was built for."""
    size = tuple(model.patch_embed.img_size)
    if tuple(gray.shape[-2:]) != size:
        gray = F.interpolate(gray.float(), size, mode="bilinear", antialias=True)
    return normalise(gray, mean, std)


class Keyed(Dataset):
    """A list of (view, image) keys of a data set, for a DataLoader that goes through them in order."""

    def __init__(self, views: Dataset, keys: Sequence[tuple[int, int]]):
        self.views, self.keys = views, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, place: int) -> Tensor:
        view, image = self.keys[place]
        return self.views[image, view]


def encode(
    encoder: Callable[[Tensor], Tensor],
    views: Dataset,
    wanted: Sequence[tuple[int, np.ndarray, FeatureFile]],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    signals: StopSignals,
    what: str,
) -> int:
    """Fill feature files with what they lack; returns the number of images encoded.

    Args:
        encoder: gray uint8 [B, 1, H, W] on `device` -> float [B, at least the file's width].
        views: [image, view] -> gray uint8 [1, H, W].
        wanted: (view, images, file): rows `images` of the file are the features of these images in that view.
        what: for the progress line.

    Raises:
        UserError: an unreadable image, or a full disk.
    """
    lacking = [(view, file.missing(images), file) for view, images, file in wanted]
    keys = [(view, image) for view, images, _ in lacking for image in images.tolist()]
    if not keys:
        return 0
    loader = SampleLoader(
        Keyed(views, keys),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=ignore_stop_signals,
    )
    files = {view: file for view, _, file in lacking}
    place = 0  # of the first key whose features were not handed to `store`

    def encoded() -> Iterator[Tensor]:
        for gray in loader:
            yield encoder(gray.to(device, non_blocking=True))
            if signals.request:
                return

    def store(first: int, parts: list[np.ndarray]) -> None:
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            raise UserError(
                f"{what}: features are not finite (NaN or infinite); pass --dtype float32, or weights that are sound"
            )
        for view, span in _runs(keys[first : first + len(values)]):
            images = np.array([image for _, image in keys[first + span.start : first + span.stop]])
            file = files[view]
            file.write(images, values[span, : file.width])

    # A thread waits for the disk, so that the encoder does not.
    with Progress(what, len(keys), "images") as steps, ThreadPoolExecutor(1) as writer:
        writing: Future = writer.submit(lambda: None)
        ready: list[np.ndarray] = []
        n_ready, began = 0, time.monotonic()
        for features in read_back(encoded()):
            ready.append(features.numpy())
            n_ready += len(features)
            steps.add(len(features))
            if n_ready >= WRITE_IMAGES or time.monotonic() - began >= WRITE_SECONDS:
                writing.result()
                writing = writer.submit(store, place, ready)
                place, ready, n_ready, began = place + n_ready, [], 0, time.monotonic()
        writing.result()
        if ready:
            store(place, ready)
    return place + n_ready


def read_back(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors of a device on the CPU, each handed out when the next is under way: a GPU does not wait for the host.

    The copy is asked for behind the work that makes the tensor and waited for alone; a plain `.cpu()` would wait for
    the next tensor's work too.
    """
    waiting: tuple[Tensor, torch.cuda.Event | None] | None = None

    def arrived() -> Tensor:
        tensor, done = waiting
        if done is not None:
            done.synchronize()
        return tensor

    for result in results:
        copy = result.to("cpu", non_blocking=True)  # into pinned memory
        done = None
        if result.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(result.device))
        if waiting is not None:
            yield arrived()
        waiting = copy, done
    if waiting is not None:
        yield arrived()


def _runs(keys: Sequence[tuple[int, int]]) -> Iterator[tuple[int, slice]]:
    """Stretches of one view: (view, slice)."""
    start = 0
    for place in range(1, len(keys) + 1):
        if place == len(keys) or keys[place][0] != keys[start][0]:
            yield keys[start][0], slice(start, place)
            start = place


# ---------------------------------------------------------------- heads


@dataclass(frozen=True)
class HeadOptions:
    """How linear heads are trained; the defaults are the published ones."""

    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-5
    warmup: float = 0.4
    patience: int = 10


@dataclass(frozen=True)
class Head:
    """A trained linear head, of its epoch with the lowest validation loss.

    Attributes:
        weight: float [C, D]; bias: float [C].
        epoch: 0-based; train_losses, valid_losses: of the epochs until it stopped.
    """

    weight: Tensor
    bias: Tensor
    epoch: int
    train_losses: list[float]
    valid_losses: list[float]

    def scores(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]."""
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


def schedule(step: int, steps_per_epoch: int, options: HeadOptions) -> float:
    """Learning rate of a step: linear from 0 over the warm-up's share of all steps, then cosine to 0."""
    return learning_rate(
        step / steps_per_epoch,
        lr=options.lr,
        min_lr=0.0,
        warmup_epochs=options.warmup * options.epochs,
        epochs=options.epochs,
    )


def new_head(width: int, n_labels: int, seed: int) -> nn.Linear:
    """torch's linear layer as a run with this seed starts it; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, n_labels)


def steps_per_epoch(n_images: int, batch_size: int) -> int:
    """Whole batches of an epoch. Raises `UserError` where there is none."""
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
    options: HeadOptions,
    signals: StopSignals,
    what: str,
) -> list[Head] | None:
    """Train one linear head per seed on the same images, side by side: one reading of a view, and one optimiser's step, for all.

    Epoch e sees view e modulo their number. A head stops after `patience` epochs without a lower validation
    loss; what the others do after that does not touch it. A head is the same to the bit whatever is beside it.

    Args:
        views: of the training images, each read when its turn comes: () -> features [N, D].
        labels: [N, C]; valid: features [V, D]; valid_labels: [V, C].

    Returns:
        A head for each seed; None if a stop was asked for.

    Raises:
        UserError: fewer images than a batch, or a loss that is not finite.
    """
    n, n_labels = labels.shape
    n_steps = steps_per_epoch(n, options.batch_size)
    starts = [new_head(valid.shape[1], n_labels, seed) for seed in seeds]
    like = {"device": valid.device, "dtype": valid.dtype}
    # A product and a loss each: one for all is computed in another order for another number of heads, and so would differ
    # in the last bits when a killed run goes on with the heads that are left.
    weights = [start.weight.detach().T.contiguous().to(**like).requires_grad_() for start in starts]  # [D, C]
    biases = [start.bias.detach().to(**like).requires_grad_() for start in starts]
    optimizer = torch.optim.Adam([*weights, *biases], lr=options.lr, weight_decay=options.weight_decay, foreach=True)
    best: list[Head | None] = [None] * len(seeds)
    running = set(range(len(seeds)))
    history = [([], []) for _ in seeds]

    with Progress(what, options.epochs * n_steps, "steps") as progress:
        for epoch in range(options.epochs):
            features = None  # not two views at once
            features = views[epoch % len(views)]()
            order = torch.from_numpy(np.stack([epoch_order(seed, epoch, n) for seed in seeds])).to(valid.device)
            total = torch.zeros(len(seeds), **like)
            for step in range(n_steps):
                for group in optimizer.param_groups:
                    group["lr"] = schedule(epoch * n_steps + step, n_steps, options)
                rows = order[:, step * options.batch_size : (step + 1) * options.batch_size]  # [H, B]
                losses = torch.stack(
                    [
                        known_loss(torch.addmm(b, features[own], w), labels[own], task)
                        for b, own, w in zip(biases, rows, weights, strict=True)
                    ]
                )
                optimizer.zero_grad(set_to_none=True)
                losses.sum().backward()
                optimizer.step()
                total += losses.detach()
            with torch.no_grad():
                judged = torch.stack(
                    [known_loss(valid @ w + b, valid_labels, task) for w, b in zip(weights, biases, strict=True)]
                )
            train_loss, valid_loss = total.tolist(), judged.tolist()
            if not all(math.isfinite(valid_loss[i]) for i in running):
                raise UserError(f"{what}, epoch {epoch + 1}: the validation loss is not finite; lower --lr")
            for i in sorted(running):
                train_losses, valid_losses = history[i]
                train_losses.append(train_loss[i] / n_steps)
                valid_losses.append(valid_loss[i])
                if best[i] is None or valid_losses[-1] < valid_losses[best[i].epoch]:
                    best[i] = Head(
                        weights[i].detach().T.clone(), biases[i].detach().clone(), epoch, train_losses, valid_losses
                    )
                elif epoch - best[i].epoch >= options.patience:
                    running.remove(i)
            progress.add(n_steps, f"validation loss {np.mean(valid_loss):.4f}")
            if signals.request:
                return None
            if not running:
                break
    return best


def probabilities(logits: Tensor, task: str) -> np.ndarray:
    """Scores between 0 and 1, float64 [N, C]: a sigmoid per label, or a softmax over classes."""
    logits = logits.detach().double().cpu()
    return (logits.sigmoid() if task == MULTILABEL else logits.softmax(-1)).numpy()
