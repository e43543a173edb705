"""Fine-tuning of a whole encoder with a new head: one run, on one process or several, that goes on where it was."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
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
from downstream.data.labelled import MULTICLASS, LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.encoders import PIXELS, RANDOM, Candidate, digest_of
from downstream.evaluate import predict
from downstream.heads import (
    HeadOptions,
    Stopped,
    known_loss,
    network_input,
    new_head,
    probabilities,
    schedule,
    steps_per_epoch,
)
from downstream.jobs import Jobs, digest
from downstream.tuned import BEST, write_tuned
from util.checkpoint import load_checkpoint, restoring, save_checkpoint
from util.distributed import Ranks, on_main
from util.errors import UserError
from util.output import Progress, RunLog
from util.stop import GO_ON, StopSignals
from util.subjects import subject_marks
from util.training import Training

CHECKPOINT = "checkpoint.pth"


@dataclass(frozen=True)
class Recipe(HeadOptions):
    """How a whole encoder is trained; the defaults are the published ones: as a head, with one learning rate.

    Attributes:
        batch_size: images per step, over all processes.
        layer_decay: learning rate of a block over that of the next one; 1: the same for all.
        drop_path: stochastic depth of the last block.
        pool: what the head sees: token (cls) or avg (mean of the patches).
        optimizer: adam or adamw.
    """

    layer_decay: float = 1.0
    drop_path: float = 0.0
    pool: str = "token"
    optimizer: str = "adam"


RECIPES = {
    "published": Recipe(),
    # Rates and decay are ours, for small data: not those that MAE fine-tunes with.
    "layer_decay": Recipe(30, 32, 5e-4, 0.05, 0.1, 10, layer_decay=0.75, drop_path=0.1, pool="avg", optimizer="adamw"),
}


@dataclass(frozen=True)
class Tuning:
    """What all fine-tuning runs of a call share.

    Attributes:
        open_views: the images' views under a seed.
        mean, std: of the input's three channels.
        save_minutes: time between checkpoints; a stop that is asked for saves at once.
    """

    images: LabelledImages
    open_views: Callable[[int], Views]
    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype
    test_batch: int
    num_workers: int
    ranks: Ranks
    signals: StopSignals
    save_minutes: float = 10.0


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
    model = candidate.build(n_labels, seed=seed, global_pool=recipe.pool, **options)
    model.head.load_state_dict(new_head(model.embed_dim, n_labels, seed).state_dict())
    return model


def build_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam or AdamW; of a layer-wise decay each group's `lr_scale` tells its share of the learning rate."""
    if recipe.optimizer == "adam" and recipe.layer_decay == 1:
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    decay = None if recipe.layer_decay == 1 else recipe.layer_decay
    return create_optimizer_v2(
        model, recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay, layer_decay=decay, fused=True
    )


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


def batch_losses(training: Training, batch: tuple[Tensor, Tensor], tuning: Tuning, seed: int) -> tuple[Tensor, Tensor]:
    """The loss [1] of this rank's next batch, twice: to minimise and to average."""
    gray, labels = (tensor.to(tuning.ranks.device, non_blocking=True) for tensor in batch)
    # Stochastic depth draws from the global generator: after a resume the same numbers come.
    place = (seed, training.epoch, training.step, tuning.ranks.rank)
    torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
    with training.autocast():
        logits = training.model(network_input(gray, training.core, tuning.mean, tuning.std))
    loss = global_loss(logits, labels, tuning.images.task, tuning.ranks)[None]
    return loss, loss


def make_training(tuning: Tuning, core: VisionTransformer, seed: int, steps: int, **more) -> Training:
    """The training of a model in `steps` steps per epoch; `more` goes to `Training`."""
    recipe = tuning.recipe
    return Training(
        core=core,
        optimizer=build_optimizer(core, recipe),
        ranks=tuning.ranks,
        signals=tuning.signals,
        options=asdict(recipe) | {"dtype": str(tuning.dtype).removeprefix("torch."), "seed": seed},
        n_values=1,
        losses=partial(batch_losses, tuning=tuning, seed=seed),
        rate=lambda epoch, step: schedule(epoch * steps + step, steps, recipe),
        **more,
    )


@dataclass
class Best:
    """The epoch (from 0, -1 before the first validation) with the lowest validation loss so far, and its weights, on
    the CPU."""

    epoch: int = -1
    loss: float = math.inf
    weights: dict[str, Tensor] | None = None


def finetune(
    tuning: Tuning, candidate: Candidate, rows: Rows, fraction: float, seed: int, folder: Path, what: str
) -> np.ndarray:
    """Train on `rows.train` until the validation loss has not fallen for a while, and test its best epoch.

    Writes into `folder`: best.pth, log.txt (a JSON line per epoch), TensorBoard events, and checkpoint.pth, which the
    caller removes once the scores are kept.

    Returns:
        Scores of `rows.test` between 0 and 1, float32 [n, C], on every rank.

    Raises:
        Stopped: a stop was asked for, and a checkpoint saved.
        UserError: fewer images than a batch, an unreadable image, a loss that is not finite, a full disk.
    """
    recipe, ranks, images = tuning.recipe, tuning.ranks, tuning.images
    if recipe.batch_size % ranks.world_size:
        raise UserError(
            f"--batch_size {recipe.batch_size}: {ranks.world_size} processes can't share it; it is the whole step's"
        )
    views = tuning.open_views(seed)
    judging = dict(
        mean=tuning.mean,
        std=tuning.std,
        dtype=tuning.dtype,
        batch_size=tuning.test_batch,
        num_workers=tuning.num_workers,
        ranks=ranks,
        signals=tuning.signals,
    )
    core = build(candidate, recipe, len(images.label_names), seed).to(ranks.device)
    data = TrainingViews(views, rows.train, images.labels)
    steps = steps_per_epoch(len(data), recipe.batch_size)
    valid_labels = torch.from_numpy(images.labels[rows.valid])
    best, saved = Best(), time.monotonic()

    def judge(part: np.ndarray) -> Tensor:
        try:
            return predict(core, views, part, **judging)
        except Stopped:
            training.save()
            training.log.close()
            raise

    def finish_epoch(training: Training, means: list[float], seconds: float) -> dict[str, float]:
        nonlocal best
        loss = float(known_loss(judge(rows.valid), valid_labels, images.task))
        if not math.isfinite(loss):
            raise UserError(f"{what}, epoch {training.epoch + 1}: the validation loss is {loss}; lower --lr")
        if loss < best.loss:
            weights = {name: tensor.detach().cpu().clone() for name, tensor in core.state_dict().items()}
            best = Best(training.epoch, loss, weights)
        losses = {"train_loss": means[0], "valid_loss": loss}
        training.log.scalars(losses, training.epoch + 1)
        training.progress.add(0, f"validation loss {loss:.4f}")
        return losses

    def save_due() -> bool:
        nonlocal saved
        due = ranks.gather(time.monotonic() - saved > 60 * tuning.save_minutes)[0]
        if due:
            saved = time.monotonic()
        return due

    training = make_training(
        tuning,
        core,
        seed,
        steps,
        finish_epoch=finish_epoch,
        is_over=lambda: training.epoch - max(best.epoch, 0) > recipe.patience,
        save_due=save_due,
        write=partial(save_checkpoint, path=folder / CHECKPOINT),
        more_state=lambda: {"best_epoch": best.epoch, "best_loss": best.loss, "best": best.weights},
        sample_name=lambda i: images.ids[rows.train[i]],
        dataset_size=len(data),
        remedy="lower --lr, or use --dtype float32",
    )
    if on_main(ranks, (folder / CHECKPOINT).exists):
        state = load_checkpoint(folder / CHECKPOINT)
        with restoring(folder / CHECKPOINT):
            best = Best(state["best_epoch"], state["best_loss"], state["best"])
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
        num_workers=tuning.num_workers,
        mend="; lower it, or raise --fractions",
    )
    on_main(ranks, lambda: _make_folder(folder))
    log = RunLog(folder, None, done / steps, enabled=ranks.is_main)
    with Progress(what, recipe.epochs * steps, "steps", done=done, enabled=ranks.is_main) as progress:
        training.start(loader, log=log, progress=progress)
        request = training.run()
    if request != GO_ON:
        log.close()
        raise Stopped
    del training.batches, training.loader, loader
    core.load_state_dict(best.weights)
    scores = probabilities(judge(rows.test), images.task).astype(np.float32)
    log.close()

    def finish() -> None:
        write_tuned(
            folder / BEST,
            best.weights,
            candidate,
            core,
            mean=tuning.mean,
            std=tuning.std,
            reading={name: getattr(views.reading, name) for name in options_heeded(images.files)},
            task=images.task,
            labels=images.label_names,
            pool=recipe.pool,
            dataset=images.name,
            fraction=fraction,
            seed=seed,
            recipe=asdict(recipe),
            epoch=best.epoch,
            valid_loss=best.loss,
            seen=sorted(
                {*candidate.seen, *subject_marks(images.subjects[np.r_[rows.train, rows.valid]], images.study)}
            ),
        )

    on_main(ranks, finish)
    ranks.say(f"{what}: best epoch {best.epoch + 1} of {training.epoch}, validation loss {best.loss:.4f}")
    return scores


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't make this directory: {error.strerror}") from None


# ---------------------------------------------------------------- all runs of a call


def finetune_all(
    tuning: Tuning,
    candidate: Candidate,
    *,
    fractions: Sequence[float],
    seeds: Sequence[int],
    n_folds: int,
    jobs: Jobs,
    runs: Path,
    key: object,
) -> dict:
    """Fine-tune for every fraction and seed: {("", fraction, seed): (test rows, scores [n, C])}.

    What is in `jobs` is not done again; a run that was interrupted goes on in its folder below `runs`.

    Args:
        key: what the images, their views and labels are: plain content.

    Raises:
        Stopped, UserError: as `finetune`.
    """
    images, ranks = tuning.images, tuning.ranks
    if candidate.kind == PIXELS:
        raise UserError("--weights pixels: there is no encoder to fine-tune; use --method linear or probe")
    weights = RANDOM if candidate.kind == RANDOM else digest_of(candidate.build())
    known = [
        weights,
        candidate.architecture,
        key,
        asdict(tuning.recipe),
        tuning.mean,
        tuning.std,
        str(tuning.dtype),
        n_folds,
        images.study,  # by it, and beside these, best.pth keeps who trained it
        sorted(candidate.seen),
    ]
    plans = {
        (fraction, seed): partitions(images, fraction, seed=seed, n_folds=n_folds, validate=True)
        for fraction in fractions
        for seed in seeds
    }
    for parts in plans.values():
        for rows in parts:
            steps_per_epoch(len(rows.train), tuning.recipe.batch_size)
    found = {}
    for (fraction, seed), parts in plans.items():
        name = digest(["finetune", *known, fraction, seed])
        stored = on_main(ranks, lambda name=name: jobs.load(name))
        if stored is None:
            scores = []
            for k, rows in enumerate(parts):
                fold = f"-fold{k + 1}" if len(parts) > 1 else ""
                plain = re.sub(r"[^A-Za-z0-9.-]+", "_", candidate.name)
                folder = runs / f"{plain}-{fraction:g}-{seed}{fold}-{name[:8]}"
                what = f"{candidate.name}: fine-tuning, {fraction:g} of the labels, seed {seed}{fold}"
                of_fold = f"{name}-part{k + 1}"  # a fold that is done is kept while the others are not
                kept = on_main(ranks, lambda of_fold=of_fold: jobs.load(of_fold))
                if kept is None:
                    kept = {"scores": finetune(tuning, candidate, rows, fraction, seed, folder, what)}
                    on_main(ranks, lambda of_fold=of_fold, kept=kept: jobs.save(of_fold, kept))
                on_main(ranks, lambda folder=folder: (folder / CHECKPOINT).unlink(missing_ok=True))
                scores.append(kept["scores"])
            stored = {"rows": np.concatenate([rows.test for rows in parts]), "scores": np.concatenate(scores)}
            on_main(ranks, lambda name=name, stored=stored: jobs.save(name, stored))
        found["", fraction, seed] = stored["rows"], stored["scores"]
    return found
