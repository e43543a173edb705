"""Fine-tuning of a whole encoder with a new head: one run, on one process or several, that goes on where it was."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import Dataset

from datasets.sampler import train_loader
from downstream.data.images import Views, options_heeded
from downstream.data.labelled import MULTICLASS
from downstream.data.partition import Rows
from downstream.driver import CHECKPOINT, Method, Work
from downstream.encoders import RANDOM, Candidate, digest_of
from downstream.evaluate import BEST, write_tuned
from downstream.forward import Stopped, network_input, predict
from downstream.heads import Recipe, known_loss, new_head, probabilities, schedule, steps_per_epoch
from util.checkpoint import load_checkpoint, restoring, save_checkpoint
from util.distributed import Ranks, on_main
from util.errors import UserError
from util.export import config_names
from util.output import Progress, RunLog
from util.stop import GO_ON
from util.subjects import subject_marks
from util.training import Training

SAVE_MINUTES = 10.0  # between checkpoints; a stop that is requested saves at once

Scale = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of the input's three channels


class TrainingViews(Dataset):
    """Training images under (epoch, place): the epoch's view of the image at that place, and its labels."""

    def __init__(self, views: Dataset, rows: np.ndarray, labels: np.ndarray):
        self.views, self.rows = views, rows
        self.labels = torch.from_numpy(labels[rows])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, place = key
        return self.views[int(self.rows[place]), epoch], self.labels[place]


def build(candidate: Candidate, recipe: Recipe, n_labels: int, seed: int) -> VisionTransformer:
    """The encoder with a new head, which starts as `new_head` of the seed."""
    options = {"drop_path_rate": recipe.drop_path} if recipe.drop_path else {}
    if "cls_token" in candidate.encoder.state:  # others have one way to pool
        options["global_pool"] = recipe.pool
    model = candidate.build(n_labels, seed=seed, **options)
    for name in config_names(model, "classifier"):
        head = model.get_submodule(name)
        head.load_state_dict(new_head(head.in_features, n_labels, seed).state_dict())
    return model


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam or AdamW; with layer-wise decay, `lr_scale` of each group is its share of the learning rate."""
    if recipe.optimizer == "adam" and recipe.layer_decay == 1:
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    options = dict(lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay)
    return create_optimizer_v2(model, recipe.optimizer, **options, fused=True)


def global_loss(logits: Tensor, labels: Tensor, task: str, ranks: Ranks) -> Tensor:
    """`known_loss` over the batches of all ranks, as far as this rank has a part in it: the mean of the ranks'
    values, and of their gradients, is that of the whole batch."""
    loss = known_loss(logits.float(), labels, task)
    if ranks.world_size == 1 or task == MULTICLASS:
        return loss
    known = (~labels.isnan()).sum().float()
    everywhere = known.clone()
    dist.all_reduce(everywhere)
    return loss * known * ranks.world_size / everywhere.clamp(min=1)


def batch_losses(
    training: Training, batch: tuple[Tensor, Tensor], task: str, scale: Scale, seed: int
) -> tuple[Tensor, Tensor]:
    """The loss [1] of this rank's next batch, twice: to minimise and to average."""
    gray, labels = (tensor.to(training.ranks.device, non_blocking=True) for tensor in batch)
    # Stochastic depth draws from the global generator: after a resume the same numbers come.
    place = (seed, training.epoch, training.step, training.ranks.rank)
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
    with training.autocast():
        logits = training.model(network_input(gray, training.core, *scale))
    loss = global_loss(logits, labels, task, training.ranks)[None]
    return loss, loss


def make_training(
    core: VisionTransformer,
    recipe: Recipe,
    scale: Scale,
    *,
    task: str,
    seed: int,
    steps: int,
    dtype: torch.dtype,
    **more,
) -> Training:
    """The training of a model in `steps` steps per epoch; `more` goes to `Training`."""
    return Training(
        core=core,
        optimizer=build_optimizer(core, recipe),
        options=asdict(recipe) | {"dtype": str(dtype).removeprefix("torch."), "seed": seed},
        n_values=1,
        losses=partial(batch_losses, task=task, scale=scale, seed=seed),
        rate=lambda epoch, step: schedule(epoch * steps + step, steps, recipe),
        **more,
    )


class FineTune(Method):
    """Training of a whole encoder with a new head until the validation loss has not fallen for a while; its best epoch
    is tested.

    Each run has a folder below `runs`: best.pth, log.txt (a JSON line per epoch), TensorBoard events, and, until its
    scores are kept, checkpoint.pth, from which it goes on.
    """

    def __init__(self, work: Work, candidate: Candidate):
        super().__init__(work, candidate)
        self.scale = work.input_scale(candidate)
        self.key = [
            RANDOM if candidate.kind == RANDOM else digest_of(candidate.build()),
            candidate.architecture,
            work.files,
            asdict(work.recipe),
            self.scale,
            str(work.dtype),
            work.images.study,  # by it, and beside these, best.pth keeps who trained it
            sorted(candidate.seen),
        ]

    def scores(
        self, rows: Rows, names: Mapping[int, str], fraction: float, what: str
    ) -> Iterator[tuple[int, np.ndarray]]:
        for seed, name in names.items():
            folder = Path(self.work.args.output_dir, "runs", name)
            yield seed, self.train(rows, seed, folder, fraction, f"{what}, seed {seed}")[None]

    def train(self, rows: Rows, seed: int, folder: Path, fraction: float, what: str) -> np.ndarray:
        """One run; returns the scores of `rows.test`, [n, C], on every rank."""
        work, recipe, ranks, images = self.work, self.work.recipe, self.work.ranks, self.work.images
        views = Views(images, seed=seed, plane=work.views.plane, reading=work.views.reading)
        core = build(self.candidate, recipe, len(images.label_names), seed).to(ranks.device)
        data = TrainingViews(views, rows.train, images.labels)
        steps = steps_per_epoch(len(data), recipe.batch_size)
        valid_labels = torch.from_numpy(images.labels[rows.valid])
        best: dict[str, Any] = {"best_epoch": -1, "best_loss": math.inf, "best": None}  # as checkpoints have it
        saved = time.monotonic()

        def judge(part: np.ndarray) -> Tensor:
            try:
                return predict(core, views, part, self.scale, dtype=work.dtype, ranks=ranks, **work.forward_options)
            except Stopped:
                training.save()
                training.log.close()
                raise

        def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, float]:
            loss = float(known_loss(judge(rows.valid), valid_labels, images.task))
            if not math.isfinite(loss):
                raise UserError(f"{what}, epoch {training.epoch + 1}: the validation loss is {loss}; lower --lr")
            if loss < best["best_loss"]:
                weights = {name: tensor.detach().cpu().clone() for name, tensor in core.state_dict().items()}
                best.update(best_epoch=training.epoch, best_loss=loss, best=weights)
            losses = {"train_loss": means[0], "valid_loss": loss}
            training.log.scalars(losses, training.epoch + 1)
            training.progress.add(0, f"validation loss {loss:.4f}")
            return losses

        def save_due() -> bool:
            nonlocal saved
            due = ranks.gather(time.monotonic() - saved > 60 * SAVE_MINUTES)[0]
            if due:
                saved = time.monotonic()
            return due

        training = make_training(
            core,
            recipe,
            self.scale,
            task=images.task,
            seed=seed,
            steps=steps,
            dtype=work.dtype,
            ranks=ranks,
            signals=work.signals,
            finish_epoch=finish_epoch,
            is_over=lambda: training.epoch - max(best["best_epoch"], 0) > recipe.patience,
            save_due=save_due,
            write=partial(save_checkpoint, path=folder / CHECKPOINT),
            more_state=lambda: dict(best),
            sample_name=lambda i: images.ids[rows.train[i]],
            dataset_size=len(data),
            remedy="lower --lr, or use --dtype float32",
        )
        if on_main(ranks, (folder / CHECKPOINT).exists):
            state = load_checkpoint(folder / CHECKPOINT)
            with restoring(folder / CHECKPOINT):
                best.update({name: state[name] for name in best})
            training.restore(state, folder / CHECKPOINT)
            ranks.say(f"{what}: goes on from epoch {training.epoch + 1}, step {training.step}")
        done = training.epoch * steps + training.step
        epoch, step = divmod(done, steps)  # behind an epoch that is still to be validated
        loader = train_loader(
            data,
            recipe.batch_size // ranks.world_size,
            ranks,
            seed=seed,
            epochs=recipe.epochs,
            epoch=epoch,
            step=step,
            num_workers=work.args.num_workers,
        )
        on_main(ranks, lambda: folder.mkdir(parents=True, exist_ok=True))
        log = RunLog(folder, None, done / steps, enabled=ranks.is_main)
        with Progress(what, recipe.epochs * steps, "steps", done=done, enabled=ranks.is_main) as progress:
            training.start(loader, log=log, progress=progress)
            request = training.run()
        if request != GO_ON:
            log.close()
            raise Stopped
        del training.batches, training.loader, loader
        core.load_state_dict(best["best"])
        scores = probabilities(judge(rows.test), images.task).astype(np.float32)
        log.close()
        seen = subject_marks(images.subjects[np.r_[rows.train, rows.valid]], images.study)
        facts = dict(
            mean=self.scale[0],
            std=self.scale[1],
            reading={name: getattr(views.reading, name) for name in options_heeded(images.files)},
            task=images.task,
            dataset=images.name,
            fraction=fraction,
            seed=seed,
            recipe=asdict(recipe),
            epoch=best["best_epoch"],
            valid_loss=best["best_loss"],
            seen=sorted({*self.seen, *seen}),
        )
        labels, pool = images.label_names, recipe.pool
        write = partial(
            write_tuned, folder / BEST, best["best"], self.candidate, core, pool=pool, labels=labels, **facts
        )
        on_main(ranks, write)
        ranks.say(
            f"{what}: best epoch {best['best_epoch'] + 1} of {training.epoch}, validation loss {best['best_loss']:.4f}"
        )
        return scores
