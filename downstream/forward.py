"""Images through a network, batch by batch: for features of frozen encoders, validation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.data.images import CENTRE, normalise
from downstream.encoders import input_size, pooled
from util.distributed import Ranks
from util.loading import SampleLoader, ignore_stop_signals
from util.output import Progress
from util.stop import StopSignals

# Images per forward pass without training. On a CPU larger batches leave its caches, and each of their tensors is
# memory that the system hands out anew; the results are the same.
FORWARD_BATCH = {"cpu": 16, "cuda": 64}


class Stopped(Exception):
    """A stop was requested; what is done so far is kept."""


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder and how its input is scaled.

    Attributes:
        model: of timm, or `FolderEncoder`, without head.
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
        """What `pooled` gives, side by side, [B, 2 D] or [B, D], of gray images uint8 [B, 1, H, W]."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            found = self.model.forward_features(network_input(gray, self.model, self.mean, self.std))
        return torch.cat(list(pooled(self.model, found.float()).values()), 1)


def network_input(gray: Tensor, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 1, H, W] -> float [B, 3, S, S], normalised; S is the side that the model was built for."""
    size = input_size(model)
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


def forward_all(
    forward: Callable[[Tensor], Tensor],
    views: Dataset,
    keys: Sequence[tuple[int, int]],
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    signals: StopSignals,
) -> Iterator[Tensor]:
    """Results of batches of images in order, on the CPU. Ends early if a stop is requested.

    Args:
        forward: gray uint8 [B, 1, H, W] on `device` -> [B, ...].
        views: [image, view] -> gray uint8 [1, H, W].
        keys: (view, image) each.
    """
    loader = SampleLoader(
        Keyed(views, keys),
        batch_size,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=ignore_stop_signals,
    )

    def results() -> Iterator[Tensor]:
        for gray in loader:
            yield forward(gray.to(device, non_blocking=True))
            if signals.request:
                return

    return read_back(results())


def read_back(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Tensors of a device on the CPU, each handed out when the next is under way: a GPU does not wait for the host.

    The copy is requested behind the work that makes the tensor and waited for alone; a plain `.cpu()` would wait for
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


@torch.no_grad()
def predict(
    model: VisionTransformer,
    views: Dataset,
    rows: np.ndarray,
    scale: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    dtype: torch.dtype,
    ranks: Ranks,
    progress: Progress | None = None,
    **options,
) -> Tensor:
    """Logits of images in their centre crop, float32 [len(rows), C] on the CPU; the ranks share the work, and
    all get the whole.

    Args:
        scale: mean and std of the model's input.
        options: of `forward_all`.

    Raises:
        Stopped: on all ranks, if a stop was requested of any.
    """
    model.eval()
    keys = [(CENTRE, row) for row in rows[ranks.rank :: ranks.world_size].tolist()]

    def forward(gray: Tensor) -> Tensor:
        with torch.autocast(gray.device.type, dtype, enabled=dtype != torch.float32):
            return model(network_input(gray, model, *scale)).float()

    logits = [torch.empty(0, model.num_classes)]
    for found in forward_all(forward, views, keys, **options):
        logits.append(found)
        if progress is not None:
            progress.add(len(found))
    gathered, requests = zip(*ranks.gather((torch.cat(logits).numpy(), options["signals"].request)), strict=True)
    if any(requests):
        raise Stopped
    whole = np.empty((len(rows), model.num_classes), np.float32)
    for rank, part in enumerate(gathered):
        whole[rank :: ranks.world_size] = part
    return torch.from_numpy(whole)
