"""One epoch of pretraining."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from datasets.replay import chosen_samples, training_dataset
from util.distributed import Ranks
from util.errors import UserError
from util.finite import FiniteWatch, poison, update_was_skipped
from util.logging import Progress, RunLog
from util.lr_sched import learning_rate
from util.masking import mask_generator, masked_count, significant_patches
from util.stop import GO_ON


@dataclass
class Meters:
    """Sums over steps on this rank, kept on the device until they are read.

    Attributes:
        sums: float64 [2, K + 2]; since the epoch began, and since the last report: the K scale losses,
            the number of significant patches per image, and how many steps were added.
    """

    sums: Tensor

    @classmethod
    def zeros(cls, n_scales: int, device: torch.device) -> Meters:
        return cls(torch.zeros(2, n_scales + 2, dtype=torch.float64, device=device))

    def add(self, losses: Tensor, n_significant: Tensor) -> None:
        """Add a step, unless a loss is not finite: training leaves such a step out too."""
        losses = losses.detach().double()
        row = torch.cat([losses, n_significant[None], torch.ones_like(n_significant)[None]])  # [K + 2]
        self.sums += torch.where(torch.isfinite(losses).all(), row, 0.0)

    def epoch_means(self) -> list[float]:
        return (self.sums[0, :-1] / self.sums[0, -1]).tolist()

    def report_means(self) -> list[float]:
        """Means since this was last asked."""
        means = (self.sums[1, :-1] / self.sums[1, -1]).tolist()
        self.sums[1] = 0
        return means


@dataclass
class Training:
    """What training works on, from one epoch to the next.

    Attributes:
        model: what is called, wrapped for several ranks; `core` is the bare CXRMIM in it.
        scaler: scales the loss under float16; with any dtype it skips, on the device, an update whose
            gradient is not finite.
        batches: iterator over this rank's batches of all epochs.
        dataset_size: samples of the whole data set; `samples` is their digest.
        steps_per_epoch: of this rank.
        watch: finds non-finite numbers and requests to stop.
        waited: seconds spent waiting for data since the start.
        unchanged_since: see `util.resume.unchanged_since`.
    """

    model: nn.Module
    core: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: Iterator[Mapping[str, Tensor]]
    dataset_size: int
    steps_per_epoch: int
    watch: FiniteWatch
    ranks: Ranks
    log: RunLog
    progress: Progress
    samples: str | None = None
    waited: float = field(default=0.0)
    unchanged_since: tuple[int, int] = (0, 0)


def train_one_epoch(training: Training, epoch: int, first_step: int, meters: Meters, args) -> tuple[int, int]:
    """Train from `first_step` to the end of the epoch, or to a step at which all ranks agree to stop.

    A step is one forward and backward pass; every `accum_iter` steps the optimiser steps, with the
    learning rate of the window's first step. Training stops only after an optimiser step, so no
    gradient is ever left behind. `meters` gathers the epoch's sums.

    Args:
        args: the command line's options: accum_iter, mask_ratio, clinical_ratio, dtype, clip_grad,
            seed, print_every and those of the learning rate.

    Returns:
        The number of steps done in this epoch, and the request to stop (`util.stop`), GO_ON for none.

    Raises:
        NonFiniteError: on all ranks, when the loss or the gradient of a step was not finite.
    """
    core, optimizer, scaler, ranks = training.core, training.optimizer, training.scaler, training.ranks
    device, steps = ranks.device, training.steps_per_epoch
    n_visible = core.num_patches - masked_count(core.num_patches, args.mask_ratio)
    dtype = getattr(torch, args.dtype)
    request = GO_ON
    training.model.train()

    for step in range(first_step, steps):
        began = time.perf_counter()
        batch = next(training.batches)
        training.waited += time.perf_counter() - began

        updates = (step + 1) % args.accum_iter == 0
        if step % args.accum_iter == 0:
            lr = set_learning_rate(optimizer, epoch + step / steps, args)
            window_losses = 0.0

        batch = core.prepare_batch(batch)
        generator = mask_generator(args.seed, epoch, step, ranks.rank, device)
        mask = core.draw_mask(batch, args.mask_ratio, args.clinical_ratio, generator, epoch=epoch, step=step)
        with contextlib.ExitStack() as stack:
            if not updates and isinstance(training.model, DistributedDataParallel):
                stack.enter_context(training.model.no_sync())  # gradients travel once per update
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                losses = training.model(batch, mask=mask, n_visible=n_visible, per_scale=True)  # [K]
            scaler.scale(poison(losses.sum()) / args.accum_iter).backward()
        meters.add(losses, significant_patches(batch["foreground"], core.patch_size).sum(1).double().mean())
        window_losses = window_losses + losses.detach() / args.accum_iter  # [K]
        training.progress.step()
        if (step + 1) % args.print_every == 0 or step + 1 == steps:
            report(training, epoch, step, meters, lr, args)

        if updates:
            skipped = update(training, args.clip_grad)
            window = range(step + 1 - args.accum_iter, step + 1)
            request = training.watch.step(epoch, window, lr=lr, losses=window_losses, skipped=skipped)
            if request != GO_ON:
                break
    return step + 1, max(request, training.watch.settle())


def update(training: Training, clip_grad: float | None) -> Tensor:
    """Step the optimiser; returns a scalar on the device, non-zero if the update was left out because
    the gradient was not finite."""
    optimizer, scaler = training.optimizer, training.scaler
    if clip_grad is not None:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(training.core.parameters(), clip_grad)
    scaler.step(optimizer)
    skipped = update_was_skipped(scaler, optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return skipped


def set_learning_rate(optimizer: torch.optim.Optimizer, epoch: float, args) -> float:
    """Give all parameter groups the learning rate of a fractional epoch; returns it."""
    lr = learning_rate(epoch, lr=args.lr, min_lr=args.min_lr, warmup_epochs=args.warmup_epochs, epochs=args.epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def report(training: Training, epoch: int, step: int, meters: Meters, lr: float, args) -> None:
    """Show this rank's means since the last report on the terminal and in TensorBoard."""
    *losses, n_significant = meters.report_means()  # the only wait for the device
    rates = training.progress.rates(training.waited)
    where = f"epoch {epoch + 1}/{args.epochs}  step {step + 1}/{training.steps_per_epoch}"
    training.progress.show(where, sum(losses), lr, rates)
    training.log.scalars(
        {
            "train_loss": sum(losses),
            **{f"train_loss_{name}": loss for name, loss in zip(scale_names(training.core), losses, strict=True)},
            "lr": lr,
            "significant_patches": n_significant,
            **rates,
        },
        epoch + (step + 1) / training.steps_per_epoch,
    )


def describe_run(training: Training, dataset: Dataset, args, epoch: int) -> str:
    """What a user checks before leaving a run alone for hours, with a loud warning where gaze is void."""
    core, world_size = training.core, training.ranks.world_size
    n_parameters = sum(p.numel() for p in core.parameters() if p.requires_grad)
    sample = [dataset[(epoch, i)] for i in range(min(32, len(dataset)))]
    foreground = torch.stack([item["foreground"] for item in sample])
    n_significant = significant_patches(foreground, core.patch_size).sum(1).float().mean().item()
    lines = [
        f"model            {args.model}, {n_parameters / 1e6:.1f} M trained parameters, {args.dtype} on {training.ranks.device}",
        f"images           {len(dataset)}, {training.steps_per_epoch} steps per epoch",
        f"effective batch  {args.batch_size * args.accum_iter * world_size} = {args.batch_size} x "
        f"{args.accum_iter} accumulated x {world_size} processes",
        f"learning rate    {args.lr:.3e} (absolute)",
        f"masking          {args.masking}, {masked_count(core.num_patches, args.mask_ratio)} of {core.num_patches} "
        f"patches; {n_significant:.1f} significant on average in the first {len(sample)} images",
    ]
    if args.masking == "attention" and n_significant == 0:
        lines.append(
            "WARNING: no patch of these images is significant, so the mask is plain random masking. Look at the "
            "heatmaps (attention/, foreground/): `python run_pretrain.py --check_data ...` lists empty ones."
        )
    return "\n".join(lines)


def picture(training: Training, args, epoch: int) -> None:
    """Write to TensorBoard what the model makes of the first samples, with the same masks each time."""
    from util.pictures import reconstruction_figure  # here, since matplotlib takes a second to load

    core = training.core
    try:
        dataset = training_dataset(vars(args), None, core.img_size, augment=False)
        shown = chosen_samples(core, dataset, vars(args), range(min(4, len(dataset))), epoch - 1)
    except (OSError, UserError) as error:  # a file that is gone meanwhile: training reads the cache
        print(f"warning: no picture after epoch {epoch}: {error}", flush=True)
        return
    title = f"{args.output_dir}, {' '.join(map(str, args.data_path))}, epoch {epoch} of {args.epochs}"
    figure = reconstruction_figure(core, shown.batch, shown.mask, names=shown.names, title=title)
    training.log.figure("reconstruction", figure, epoch)


def epoch_record(training: Training, epoch: int, meters: Meters, seconds: float) -> dict:
    """The epoch's means over all ranks, for log.txt."""
    ranks_means = training.ranks.gather(meters.epoch_means())
    *losses, n_significant = (sum(values) / len(values) for values in zip(*ranks_means, strict=True))
    names = scale_names(training.core)
    return {
        "epoch": epoch,
        "train_loss": sum(losses),
        **{f"train_loss_{name}": loss for name, loss in zip(names, losses, strict=True)},
        "train_lr": training.optimizer.param_groups[0]["lr"],
        "significant_patches": n_significant,
        "time_s": round(seconds, 2),
    }


def scale_names(core: nn.Module) -> list[str]:
    """Name of each scale in the records: "scale_4.0", or with its block where a scale comes twice."""
    scales = core.scale_list
    return [
        f"scale_{scale}" if scales.count(scale) == 1 else f"scale_{scale}_block_{block}"
        for scale, block in zip(scales, core.id_list, strict=True)
    ]
