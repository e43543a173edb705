"""One process or many: who am I, which device is mine, and small agreements between ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from util.errors import UserError
from util.stop import signal_on_parent_death

# How long ranks wait for each other: to meet, in NCCL's exchanges, and at an agreement on the CPU. That may last as
# long as one rank reads a data set or builds a cache alone; a rank that dies is noticed at once all the same, since
# its connection closes.
MEETING_TIMEOUT = timedelta(minutes=30)
AGREEMENT_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's place in the job.

    Attributes:
        rank, world_size: as the launcher set them; 0, 1 without one.
        device: where this rank computes.
        control: gloo group for small agreements on CPU tensors, which never wait for the GPU; None
            in a single process.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print a line, on rank 0 alone."""
        if self.is_main:
            print(text, flush=True)

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank. It travels on the CPU, so a GPU is not waited for."""
        if self.control is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return int(tensor)

    def gather(self, value: object) -> list:
        """`value` of every rank, in rank order, on every rank. Takes plain objects."""
        if self.control is None:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values


def start(device: str, *, local_rank: int = -1, world_size: int = 1, dist_url: str = "env://") -> Ranks:
    """Join the process group that the launcher describes in the environment, if there is one.

    Args:
        device: "cuda" or "cpu"; without a usable GPU "cuda" falls back to "cpu", with a warning.
        local_rank: as `torch.distributed.launch` passes it; the environment's LOCAL_RANK wins.
        world_size: only checked: more than one process must come from a launcher.
        dist_url: where the processes meet.

    Raises:
        UserError: for more processes than GPUs on this node, or a missing launcher.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not launched and world_size > 1:
        raise UserError(f"--world_size {world_size} needs a launcher: torchrun --nproc_per_node {world_size} ...")
    rank = int(os.environ["RANK"]) if launched else 0
    world_size = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_rank = int(os.environ.get("LOCAL_RANK", max(local_rank, 0)))

    if device not in ("cuda", "cpu"):
        raise UserError(f"--device {device}: use cuda or cpu (CUDA_VISIBLE_DEVICES chooses GPUs)")
    if device == "cuda" and not torch.cuda.is_available():
        if rank == 0:
            print("warning: no CUDA device is available, training on the CPU instead (--device cpu)", flush=True)
        device = "cpu"
    chosen = torch.device(device)
    if device == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            raise UserError(
                f"process {local_rank} of this node has no GPU, since it has {count}; lower --nproc_per_node"
            )
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)

    control = None
    if launched:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun ends its workers unless it is killed itself; then they would train on, unseen.
            signal_on_parent_death(signal.SIGTERM)
        backend = "nccl" if device == "cuda" else "gloo"
        store, rank, world_size = next(rendezvous(dist_url, rank, world_size, timeout=MEETING_TIMEOUT))
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):
            # torchrun's store outlives a restart, and a rank could read the address of a dead one in it.
            # (With several nodes the count may differ between them; there the scripts don't restart.)
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        timeout = MEETING_TIMEOUT if backend == "nccl" else AGREEMENT_TIMEOUT
        dist.init_process_group(backend, store=store, world_size=world_size, rank=rank, timeout=timeout)
        if world_size > 1:
            control = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)
    return Ranks(rank, world_size, chosen, control)


def on_main(ranks: Ranks, work: Callable[[], object]) -> object:
    """Do `work` on rank 0 while the others wait; returns its result on every rank.

    If it raises UserError, all ranks end and rank 0 prints it.
    """
    done = None  # where work fails
    try:
        if ranks.is_main:
            done = (work(),)
    finally:
        done = ranks.gather(done)[0]
    if done is None:
        raise SystemExit(1)
    return done[0]


def parallel(model: nn.Module, ranks: Ranks, *, sync_buffers: bool = False) -> nn.Module:
    """The model as several ranks train it together; in a single process the model itself.

    Its buffers must be constants, alike on all ranks, unless `sync_buffers`: each training step then starts
    from rank 0's (as batch norm's running statistics need).
    """
    if ranks.world_size == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(partial(_in_layout_of, parameter))
    device_ids = [ranks.device] if ranks.device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = sync_buffers  # as an argument it was renamed in torch 2.14
    return wrapped


def _in_layout_of(parameter: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, with its parameter's strides along sides of length 1, where any serve.

    Some kernels (1 x 1 convolutions in bfloat16, sums over a batch of 1) leave others there, and
    DistributedDataParallel compares them strictly: a warning, and a copy that nothing needs.
    """
    if gradient.stride() != parameter.stride() and gradient.is_contiguous() and parameter.is_contiguous():
        return gradient.as_strided(parameter.shape, parameter.stride())
    return gradient


def stop() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        # torch 2.7 ends gloo's threads while it holds Python's lock, for which one of them may be waiting, to
        # give back the tensor of the last exchange: for ever. This thread asleep, it gets the lock.
        time.sleep(0.1)
        dist.destroy_process_group()
