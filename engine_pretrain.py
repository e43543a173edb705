"""What pretraining gives the training loop (`util.training`): the losses of a batch, and what follows an epoch."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from datasets.shown import chosen_samples, training_dataset
from util.errors import UserError
from util.masking import mask_generator, masked_count, significant_patches
from util.training import Training


def batch_losses(training: Training, batch: Mapping[str, Tensor], args) -> tuple[Tensor, Tensor]:
    """Losses per scale [K] of this rank's next batch; and those with the mean number of significant patches, [K + 1].

    Args:
        args: the command line's options: mask_ratio, clinical_ratio, seed.
    """
    core, ranks, epoch, step = training.core, training.ranks, training.epoch, training.step
    n_visible = core.num_patches - masked_count(core.num_patches, args.mask_ratio)
    batch = core.prepare_batch(batch)
    generator = mask_generator(args.seed, epoch, step, ranks.rank, ranks.device)
    mask = core.draw_mask(batch, args.mask_ratio, args.clinical_ratio, generator, epoch=epoch, step=step)
    with training.autocast():
        losses = training.model(batch, mask=mask, n_visible=n_visible, per_scale=True)
    n_significant = significant_patches(batch["foreground"], core.patch_size).sum(1).double().mean()
    return losses, torch.cat([losses.detach().double(), n_significant[None]])


def name_means(core: nn.Module, means: list[float]) -> dict[str, float]:
    """Names, in TensorBoard and log.txt, of the means [K + 1] of what `batch_losses` gives."""
    *losses, n_significant = means
    scales = {f"train_loss_{name}": loss for name, loss in zip(scale_names(core), losses, strict=True)}
    return {"train_loss": sum(losses), **scales, "significant_patches": n_significant}


def finish_epoch(training: Training, means: list[float], seconds: float, args) -> dict[str, float]:
    """The epoch's record for log.txt; every `image_every` epochs a picture goes to TensorBoard."""
    if training.ranks.is_main and args.image_every and (training.epoch + 1) % args.image_every == 0:
        picture(training, args, training.epoch + 1)
    lr = training.optimizer.param_groups[0]["lr"]
    return {**name_means(training.core, means), "train_lr": lr, "time_s": round(seconds, 2)}


def describe_run(training: Training, dataset: Dataset, args) -> str:
    """What a user checks before leaving a run alone for hours, with a loud warning where gaze is void."""
    core, world_size = training.core, training.ranks.world_size
    n_parameters = sum(p.numel() for p in core.parameters() if p.requires_grad)
    sample = [dataset[(training.epoch, i)] for i in range(min(32, len(dataset)))]
    foreground = torch.stack([item["foreground"] for item in sample])
    n_significant = significant_patches(foreground, core.patch_size).sum(1).float().mean().item()
    # An image that is in several trees, or read by several readers, is drawn once for each.
    names = {os.path.basename(entry["image_path"]).rpartition(".")[0] for entry in dataset.entries}
    lines = [
        f"model            {args.model}, {n_parameters / 1e6:.1f} M trained parameters, {args.dtype} on {training.ranks.device}",
        f"images           {len(dataset)} of {len(names)} file names, {training.steps_per_epoch} steps per epoch",
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
    from util.pictures import reconstruct, reconstruction_grid  # here, since matplotlib takes a second to load

    core = training.core
    try:
        dataset = training_dataset(vars(args), args.data_path, core.img_size, augment=False)
        shown = chosen_samples(core, dataset, vars(args), range(min(4, len(dataset))), epoch - 1)
    except (OSError, UserError) as error:  # a file that is gone meanwhile: training reads the cache
        print(f"warning: no picture after epoch {epoch}: {error}", flush=True)
        return
    grid = reconstruction_grid(reconstruct(core, shown.batch, shown.mask))
    training.log.image("reconstruction", grid, epoch)


def scale_names(core: nn.Module) -> list[str]:
    """Name of each scale in the records: "scale_4.0", or with its block where a scale comes twice."""
    scales = core.scale_list
    return [
        f"scale_{scale}" if scales.count(scale) == 1 else f"scale_{scale}_block_{block}"
        for scale, block in zip(scales, core.id_list, strict=True)
    ]
