"""Fine-tuning of a whole encoder with a new head: one run, on one process or several, that goes on where it was."""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

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
from downstream.driver import Method, Part, Recipe, Runs, Scores, Work
from downstream.encoders import Candidate, Scale, digest_of
from downstream.forward import Stopped, network_input, predict
from downstream.frozen import known_loss, new_head, probabilities, schedule, steps_per_epoch
from util.checkpoint import load_checkpoint, save_checkpoint
from util.distributed import Ranks, on_main
from util.errors import UserError
from util.export import attention_heads_of, config_names
from util.files import atomic_write
from util.stop import GO_ON
from util.subjects import subject_marks
from util.training import Training

BEST = (
    "best.pth"  # of a run that is done: the model with its labels, for timm, other programs and `downstream.evaluate`
)
CHECKPOINT = "checkpoint.pth"  # of a run that is not done, in its folder below `runs`
SAVE_MINUTES = 10.0  # between checkpoints; a stop that is requested saves at once


@dataclass
class TrainingViews(Dataset):
    """Training images under (epoch, place): the epoch's view of the image at that place, and its labels [C]."""

    views: Dataset
    rows: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, place = key
        row = int(self.rows[place])
        return self.views[row, epoch], self.labels[row]


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
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "adam" and recipe.layer_decay == 1:
        return torch.optim.Adam(model.parameters(), **options)
    return create_optimizer_v2(model, recipe.optimizer, layer_decay=recipe.layer_decay, **options)


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


def make_training(
    core: VisionTransformer,
    recipe: Recipe,
    scale: Scale,
    *,
    task: str,
    seed: int,
    steps: int,
    dtype: torch.dtype,
    output_dir: Path | None = None,
    **more,
) -> Training:
    """The training of a model in `steps` steps per epoch; `more` goes to `Training`."""

    def losses(training: Training, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss [1] of this rank's next batch, twice: to minimise and to average."""
        gray, labels = (tensor.to(training.ranks.device, non_blocking=True) for tensor in batch)
        # Stochastic depth draws from the global generator: after a resume the same numbers come.
        place = (seed, training.epoch, training.step, training.ranks.rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        with training.autocast():
            logits = training.model(network_input(gray, core, scale))
        loss = global_loss(logits, labels, task, training.ranks)[None]
        return loss, loss

    options = {"dtype": str(dtype).removeprefix("torch."), "seed": seed, "output_dir": str(output_dir), "log_dir": None}
    return Training(
        core=core,
        optimizer=build_optimizer(core, recipe),
        options=asdict(recipe) | options,
        n_values=1,
        losses=losses,
        rate=lambda epoch, step: schedule(epoch * steps + step, steps, recipe),
        **more,
    )


def write_tuned(
    path: Path, state: Mapping[str, Tensor], candidate: Candidate, model: VisionTransformer, **facts
) -> None:
    """Write `state` and what `downstream.evaluate.read_tuned` and `timm.create_model(timm_model, **timm_args, checkpoint_path=...)`
    need; whole or not at all.

    Args:
        facts: `task`, `downstream.evaluate.FACTS` but timm_args, and more to be kept.
    """
    encoder = candidate.encoder
    arguments = encoder.timm_args | {"num_classes": len(facts["labels"])}
    if "cls_token" in encoder.state:
        arguments["global_pool"] = model.global_pool
    if encoder.block is not None:
        arguments["depth"] = len(model.blocks)
    facts |= {"timm_model": encoder.timm_name, "timm_args": arguments}
    if heads := attention_heads_of(model):
        facts["num_heads"] = heads
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(state), "metadata": metadata}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


class FineTune(Method):
    """Training of a whole encoder with a new head until the validation loss has not fallen for a while; its best epoch
    is tested.

    Each run has a folder below `runs`: best.pth, log.txt (a JSON line per epoch), args.json, TensorBoard events, and,
    until its scores are kept, checkpoint.pth, from which it goes on.
    """

    def __init__(self, work: Work, candidate: Candidate):
        super().__init__(work, candidate)
        self.scale = candidate.normalisation(work.args.normalisation)
        self.key = [
            digest_of(candidate.build()),
            candidate.architecture,
            work.files,
            asdict(work.recipe),
            self.scale,
            str(work.dtype),
            work.images.study,  # by it, and beside these, best.pth keeps who trained it
            sorted(candidate.seen),
        ]

    def scores(self, part: Part, runs: Runs) -> Scores:
        for seed, run in runs.items():
            folder = Path(self.work.args.output_dir, "runs", run)
            yield seed, self.train(part, seed, folder)[None]
            on_main(self.work.ranks, partial((folder / CHECKPOINT).unlink, missing_ok=True))

    def train(self, part: Part, seed: int, folder: Path) -> np.ndarray:
        """One run; returns the scores of the test images, [n, C], on every rank."""
        work, recipe, ranks, images = self.work, self.work.recipe, self.work.ranks, self.work.images
        rows, what = part.rows, f"{self.name}-{part.name}, seed {seed}"
        views = Views(images, seed=seed, plane=work.views.plane, reading=work.views.reading)
        core = build(self.candidate, recipe, len(images.label_names), seed).to(ranks.device)
        labels = torch.from_numpy(images.labels)
        data = TrainingViews(views, rows.train, labels)
        steps = steps_per_epoch(len(data), recipe.batch_size)
        best = {"best_epoch": -1, "best_loss": math.inf, "best": None}  # as checkpoints have it
        saved = time.monotonic()

        def logits(tested: np.ndarray) -> Tensor:
            try:
                return predict(core, views, tested, self.scale, ranks=ranks, what=what, **work.loading)
            except Stopped:
                training.save()
                raise

        def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, float]:
            loss = float(known_loss(logits(rows.valid), labels[rows.valid], images.task))
            if not math.isfinite(loss):
                raise UserError(f"{what}, epoch {training.epoch + 1}: the validation loss is {loss}; lower --lr")
            if loss < best["best_loss"]:
                weights = {name: tensor.detach().cpu().clone() for name, tensor in core.state_dict().items()}
                best.update(best_epoch=training.epoch, best_loss=loss, best=weights)
            losses = {"train_loss": means[0], "valid_loss": loss}
            training.log.scalars(losses, training.epoch + 1)
            return losses

        def save_due() -> bool:
            nonlocal saved
            due = ranks.gather(time.monotonic() - saved > 60 * SAVE_MINUTES)[0]
            saved = time.monotonic() if due else saved
            return due

        training = make_training(
            core,
            recipe,
            self.scale,
            task=images.task,
            seed=seed,
            steps=steps,
            dtype=work.dtype,
            output_dir=folder,
            ranks=ranks,
            signals=work.signals,
            finish_epoch=finish_epoch,
            is_over=lambda: training.epoch - max(best["best_epoch"], 0) > recipe.patience,
            save_due=save_due,
            write=partial(save_checkpoint, path=folder / CHECKPOINT),
            more_state=lambda: best,
            sample_name=lambda i: images.ids[rows.train[i]],
        )
        if on_main(ranks, (folder / CHECKPOINT).exists):
            state = load_checkpoint(folder / CHECKPOINT)
            training.restore(state, folder / CHECKPOINT)
            best.update({name: state[name] for name in best})
        ranks.say(f"{what}: training from epoch {training.epoch + 1}, step {training.step}")
        epoch, step = divmod(training.epoch * steps + training.step, steps)  # behind an epoch still to be validated
        options = {"batch_size": recipe.batch_size // ranks.world_size, "num_workers": work.args.num_workers}
        training.start(train_loader(data, {**training.options, **options}, ranks, epoch=epoch, step=step))
        if training.run() != GO_ON:
            raise Stopped
        del training.batches, training.loader
        core.load_state_dict(best["best"])
        scores = probabilities(logits(rows.test), images.task)
        training.log.close()
        seen = subject_marks(images.subjects[np.r_[rows.train, rows.valid]], images.study)
        facts = dict(
            labels=images.label_names,
            mean=self.scale[0],
            std=self.scale[1],
            reading={name: getattr(views.reading, name) for name in options_heeded(images.files)},
            task=images.task,
            fraction=part.fraction,
            seed=seed,
            epoch=best["best_epoch"],
            seen=sorted({*self.seen, *seen}),
        )
        on_main(ranks, partial(write_tuned, folder / BEST, best["best"], self.candidate, core, **facts))
        told = f"best epoch {best['best_epoch'] + 1}, validation loss {best['best_loss']:.4f}"
        ranks.say(f"{what}: {told}")
        return scores
