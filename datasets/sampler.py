"""Which samples each step trains on: a function of (seed, epoch, step, rank), for all epochs at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import Dataset, DistributedSampler, Sampler

from util.distributed import Ranks
from util.errors import UserError
from util.loading import SampleLoader

ORDER = ("batch_size", "seed", "epochs", "accum_iter")  # options of a run that `TrainBatches` takes


class TrainBatches(Sampler[list[tuple[int, int]]]):
    """Batches of all epochs in one go, so that a DataLoader is never restarted between epochs.

    An epoch's order is that of torch's DistributedSampler(seed, drop_last), which deals the shuffled
    samples to the ranks in turn: R ranks with batch b see in each step the same samples as one rank
    with batch R*b. Incomplete batches, and batches that don't fill a last accumulation window, are
    dropped, so every epoch has the same number of steps and ends with an optimiser step.

    Args:
        dataset_size: number of samples.
        batch_size: samples per rank and step.
        world_size, rank: of the process group.
        seed: shuffles the epochs.
        epochs: where training ends.
        start_epoch, start_step: where it goes on.
        accum_iter: steps per optimiser step.

    Raises:
        UserError: the data set doesn't fill a single optimiser step.
    """

    def __init__(
        self,
        dataset_size: int,
        batch_size: int = 32,
        *,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        epochs: int = 1,
        start_epoch: int = 0,
        start_step: int = 0,
        accum_iter: int = 1,
    ):
        self.sampler = DistributedSampler(
            range(dataset_size), num_replicas=world_size, rank=rank, seed=seed, shuffle=True, drop_last=True
        )
        self.batch_size = batch_size
        self.epochs = epochs
        self.start_epoch, self.start_step = start_epoch, start_step
        self.steps_per_epoch = dataset_size // world_size // batch_size // accum_iter * accum_iter
        if self.steps_per_epoch == 0:
            raise UserError(
                f"--batch_size {batch_size} x accum_iter {accum_iter} x {world_size} processes is larger than "
                f"the data set ({dataset_size} samples)"
            )

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The samples that this rank trains on in the steps of an epoch from `start` on."""
        self.sampler.set_epoch(epoch)
        order, size = list(self.sampler), self.batch_size
        for step in range(start, self.steps_per_epoch):
            yield order[step * size : (step + 1) * size]

    def batch(self, epoch: int, step: int) -> list[int]:
        """The samples that this rank trains on in one step."""
        return next(self.batches(epoch, step))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in range(self.start_epoch, self.epochs):
            for batch in self.batches(epoch, self.start_step if epoch == self.start_epoch else 0):
                yield [(epoch, index) for index in batch]


def train_batches(dataset: Dataset, options: Mapping[str, Any], **place: int) -> TrainBatches:
    """`TrainBatches` of a run's `options`, which may have others; `place`: rank, world_size and where it starts."""
    return TrainBatches(len(dataset), **place, **{name: options[name] for name in ORDER if name in options})


def train_loader(dataset: Dataset, options: Mapping[str, Any], ranks: Ranks, *, epoch: int, step: int) -> SampleLoader:
    """This rank's batches from a place, (`epoch`, `step`), to the end of training; its `batch_sampler` is a
    `TrainBatches`.

    Args:
        options: num_workers, those of `TrainBatches` by its names, and, if the task has it, pin_mem: on a GPU; never
            on the CPU.

    Raises:
        UserError: the data set doesn't fill a single optimiser step, or an epoch has no such step.
    """
    sampler = train_batches(
        dataset, options, rank=ranks.rank, world_size=ranks.world_size, start_epoch=epoch, start_step=step
    )
    if step >= sampler.steps_per_epoch:
        raise UserError(
            f"the checkpoint is at step {step} of epoch {epoch + 1}, and an epoch has {sampler.steps_per_epoch}; go on "
            "from another"
        )
    return SampleLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=options["num_workers"],
        pin_memory=options.get("pin_mem", True) and ranks.device.type == "cuda",
        prefetch_factor=4 if options["num_workers"] else None,
    )
