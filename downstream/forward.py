"""Images through a network, batch by batch: for features of frozen encoders, validation and tests."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.data.images import CENTRE, normalise
from downstream.encoders import Scale, input_size, pooled
from util.distributed import Ranks
from util.loading import SampleLoader
from util.output import Progress
from util.stop import StopSignals


class Stopped(Exception):
    """A stop was requested; what is done so far is kept."""


def network_input(gray: Tensor, model: nn.Module, scale: Scale) -> Tensor:
    """uint8 [B, 1, H, W] -> float [B, 3, S, S], normalised; S is the side that the model was built for."""
    size = input_size(model)
    if tuple(gray.shape[-2:]) != size:
        gray = F.interpolate(gray.float(), size, mode="bilinear", antialias=True)
    return normalise(gray, *scale)


@torch.no_grad()
def outputs(model: nn.Module, gray: Tensor, scale: Scale, dtype: torch.dtype, *, head: bool = False) -> Tensor:
    """Of gray images uint8 [B, 1, H, W], float32: what `pooled` gives, side by side, [B, 2 D] or [B, D], or, with `head`,
    the logits [B, C].

    Args:
        model: of timm, in eval mode, or, without head, another model with `forward_features`.
        dtype: of autocast; float32 for none.
    """
    with torch.autocast(gray.device.type, dtype, enabled=dtype != torch.float32):
        found = (model if head else model.forward_features)(network_input(gray, model, scale)).float()
    return found if head else torch.cat(list(pooled(model, found).values()), 1)


def all_outputs(
    model: nn.Module,
    views: Dataset,
    images: np.ndarray,
    view: int,
    scale: Scale,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    signals: StopSignals,
    head: bool = False,
) -> Iterator[Tensor]:
    """`outputs` of images in a view, batch by batch in order, on the CPU. Ends early if a stop is requested.

    Args:
        views: [image, view] -> gray uint8 [1, H, W].
        scale, dtype, head: of `outputs`.
    """
    loader = SampleLoader(
        views,
        batch_size,
        sampler=[(image, view) for image in images.tolist()],
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )

    def results() -> Iterator[Tensor]:
        for gray in loader:
            yield outputs(model, gray.to(device, non_blocking=True), scale, dtype, head=head)
            if signals.request:
                return

    return read_back(results())


def read_back(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors of a device on the CPU, each handed out when the next is under way: a GPU does not wait for the host.

    The copy is requested behind the work that makes the tensor and waited for alone; a plain `.cpu()` would wait for
    the next tensor's work too.
    """
    copy = copied = None
    for result in itertools.chain(results, [None]):
        arriving, arrived = copy, copied
        if result is not None:
            copy, copied = result.to("cpu", non_blocking=True), None  # into pinned memory
            if result.is_cuda:
                copied = torch.cuda.Event()
                copied.record(torch.cuda.current_stream(result.device))
        if arrived is not None:
            arrived.synchronize()
        if arriving is not None:
            yield arriving


def predict(
    model: nn.Module, views: Dataset, images: np.ndarray, scale: Scale, *, ranks: Ranks, what: str, **loading: object
) -> Tensor:
    """Logits of images in their centre crop, float32 [len(images), C] on the CPU; the ranks share the work, and
    all get the whole.

    Args:
        loading: further options of `all_outputs`.
        what: for the lines of progress.

    Raises:
        Stopped: on all ranks, if a stop was requested of any.
    """
    model.eval()
    own = images[ranks.rank :: ranks.world_size]
    progress = Progress(what, len(own), "images", enabled=ranks.is_main)
    logits = [np.empty((0, model.num_classes), np.float32)]
    for found in all_outputs(model, views, own, CENTRE, scale, head=True, **loading):
        logits.append(found.numpy())
        progress.add(len(found))
    gathered, requests = zip(*ranks.gather((np.concatenate(logits), loading["signals"].request)), strict=True)
    if any(requests):
        raise Stopped
    whole = torch.empty(len(images), model.num_classes)
    for rank, part in enumerate(gathered):
        whole[rank :: ranks.world_size] = torch.from_numpy(part)
    return whole
