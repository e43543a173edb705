"""Fine-tuning of a whole encoder with a new head: one run, on one process or several, that goes on where it was."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor
from torch.utils.data import Dataset

from datasets.downstream.images import Views
from datasets.downstream.labelled import MULTICLASS, LabelledImages
from datasets.downstream.partition import Rows, partitions
from datasets.sampler import train_loader
from engine_downstream import (
    HeadOptions,
    Stopped,
    known_loss,
    network_input,
    new_head,
    probabilities,
    schedule,
    steps_per_epoch,
)
from engine_tuned import predict
from util.checkpoint import load_checkpoint, restoring, save_checkpoint
from util.distributed import Ranks, on_main, parallel
from util.encoders import PIXELS, RANDOM, Candidate, digest_of
from util.errors import UserError
from util.finite import FiniteWatch, make_scaler, nan_gradient_unless_finite, update_was_skipped
from util.jobs import Jobs, digest
from util.logging import RunLog
from util.progress import Steps
from util.resume import restore_optimizer, run_state, sums_of_rank
from util.stop import GO_ON, StopSignals
from util.subjects import subject_marks
from util.tuned import BEST, write_tuned

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
    # MAE's fine-tuning, scaled to small data.
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


@dataclass
class Place:
    """Where a run is: what a checkpoint holds beside model and optimiser.

    Attributes:
        epoch, step: to go on with.
        best_epoch: -1 before the first validation; best: its weights, on the CPU.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_loss: float = math.inf
    best: dict[str, Tensor] | None = None


def finetune(
    tuning: Tuning, candidate: Candidate, rows: Rows, fraction: float, seed: int, folder: Path, what: str
) -> np.ndarray:
    """Train on `rows.train` until the validation loss has not fallen for a while, and test its best epoch.

    Writes into `folder`: best.pth, log.txt (a JSON line per epoch), TensorBoard events, and, until it is done,
    checkpoint.pth.

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
    optimizer = build_optimizer(core, recipe)
    scaler = make_scaler(str(tuning.dtype).removeprefix("torch."), ranks.device)
    place, sums = Place(), torch.zeros(2, dtype=torch.float64, device=ranks.device)
    if on_main(ranks, (folder / CHECKPOINT).exists):
        state = load_checkpoint(folder / CHECKPOINT)
        with restoring(folder / CHECKPOINT):
            core.load_state_dict(state["model"])
            restore_optimizer(optimizer, scaler, state)
            sums.copy_(sums_of_rank(state, ranks))
            place = Place(state["epoch"] + 1, state["step"], state["best_epoch"], state["best_loss"], state["best"])
        ranks.say(f"{what}: goes on from epoch {place.epoch + 1}, step {place.step}")
    data = TrainingViews(views, rows.train, images.labels)
    steps = steps_per_epoch(len(data), recipe.batch_size)
    epoch, step = divmod(place.epoch * steps + place.step, steps)  # behind an epoch that is still to be validated
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
    sampler = loader.batch_sampler
    watch = FiniteWatch(
        ranks.device,
        tuning.signals,
        group=ranks.control,
        half=tuning.dtype == torch.float16,
        sample_names=lambda epoch, step: [images.ids[rows.train[i]] for i in sampler.batch(epoch, step)],
    )
    on_main(ranks, lambda: _make_folder(folder))
    log = RunLog(folder, None, place.epoch + place.step / steps, enabled=ranks.is_main)
    model = parallel(core, ranks)
    valid_labels = torch.from_numpy(images.labels[rows.valid])

    def save() -> None:
        state = run_state(
            core,
            optimizer,
            scaler,
            epoch=place.epoch - 1,
            step=place.step,
            args=asdict(recipe) | {"dtype": str(tuning.dtype).removeprefix("torch."), "seed": seed},
            sums=sums,
            ranks=ranks,
            dataset_size=len(data),
        )
        state |= {"best_epoch": place.best_epoch, "best_loss": place.best_loss, "best": place.best}
        on_main(ranks, lambda: save_checkpoint(state, folder / CHECKPOINT))

    def judge(part: np.ndarray) -> Tensor:
        try:
            return predict(core, views, part, **judging)
        except Stopped:
            save()
            log.close()
            raise

    saved = time.monotonic()
    batches = iter(loader)
    total, done = recipe.epochs * steps, place.epoch * steps + place.step
    with Steps(what, total, "steps", done=done, enabled=ranks.is_main) as progress:
        while place.epoch < recipe.epochs and place.epoch - max(place.best_epoch, 0) <= recipe.patience:
            request = _train_epoch(
                tuning, model, core, optimizer, scaler, batches, steps, place, sums, seed, watch, progress
            )
            if request != GO_ON:
                save()
                log.close()
                raise Stopped
            logits = judge(rows.valid)
            loss = float(known_loss(logits, valid_labels, images.task))
            if not math.isfinite(loss):
                raise UserError(f"{what}, epoch {place.epoch + 1}: the validation loss is {loss}; lower --lr")
            if loss < place.best_loss:
                best = {name: tensor.detach().cpu().clone() for name, tensor in core.state_dict().items()}
                place.best_epoch, place.best_loss, place.best = place.epoch, loss, best
            means = np.mean(ranks.gather(sums.tolist()), axis=0)
            record = {"epoch": place.epoch, "train_loss": means[0] / means[1], "valid_loss": loss}
            on_main(ranks, lambda record=record: log.epoch(record))
            log.scalars({"train_loss": record["train_loss"], "valid_loss": loss}, place.epoch + 1)
            place.epoch, place.step = place.epoch + 1, 0
            sums.zero_()
            progress.add(0, f"validation loss {loss:.4f}")
            if ranks.gather(time.monotonic() - saved > 60 * tuning.save_minutes)[0]:
                save()
                saved = time.monotonic()
    del batches, loader
    core.load_state_dict(place.best)
    scores = probabilities(judge(rows.test), images.task).astype(np.float32)
    log.close()

    def finish() -> None:
        write_tuned(
            folder / BEST,
            place.best,
            candidate,
            core,
            mean=tuning.mean,
            std=tuning.std,
            task=images.task,
            labels=images.label_names,
            pool=recipe.pool,
            dataset=images.name,
            fraction=fraction,
            seed=seed,
            recipe=asdict(recipe),
            epoch=place.best_epoch,
            valid_loss=place.best_loss,
            seen=subject_marks(images.subjects[np.r_[rows.train, rows.valid]], images.name),
        )
        (folder / CHECKPOINT).unlink(missing_ok=True)

    on_main(ranks, finish)
    ranks.say(f"{what}: best epoch {place.best_epoch + 1} of {place.epoch}, validation loss {place.best_loss:.4f}")
    return scores


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: can't make this directory: {error.strerror}") from None


def _train_epoch(
    tuning: Tuning,
    model,
    core,
    optimizer,
    scaler,
    batches,
    steps: int,
    place: Place,
    sums: Tensor,
    seed: int,
    watch: FiniteWatch,
    progress: Steps,
) -> int:
    """Train from `place` to the end of its epoch, or to a step at which all ranks agree to stop; returns the
    request. `sums` gathers the losses and their number."""
    recipe, ranks, device = tuning.recipe, tuning.ranks, tuning.ranks.device
    model.train()
    request = GO_ON
    for step in range(place.step, steps):
        gray, labels = next(batches)
        # Stochastic depth draws from the global generator: after a resume the same numbers come.
        torch.manual_seed(int(np.random.SeedSequence((seed, place.epoch, step, ranks.rank)).generate_state(1)[0]))
        lr = schedule(place.epoch * steps + step, steps, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with torch.autocast(device.type, tuning.dtype, enabled=tuning.dtype != torch.float32):
            logits = model(network_input(gray.to(device, non_blocking=True), core, tuning.mean, tuning.std))
        loss = global_loss(logits, labels.to(device, non_blocking=True), tuning.images.task, ranks)
        scaler.scale(nan_gradient_unless_finite(loss)).backward()
        scaler.step(optimizer)
        skipped = update_was_skipped(scaler, optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([loss.detach().double(), torch.ones_like(loss, dtype=torch.float64)])
        place.step = step + 1
        progress.add(1)
        request = watch.step(place.epoch, range(step, step + 1), lr=lr, losses=loss.detach()[None], skipped=skipped)
        if request != GO_ON:
            break
    return max(request, watch.settle())


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
                scores.append(kept["scores"])
            stored = {"rows": np.concatenate([rows.test for rows in parts]), "scores": np.concatenate(scores)}
            on_main(ranks, lambda name=name, stored=stored: jobs.save(name, stored))
        found["", fraction, seed] = stored["rows"], stored["scores"]
    return found
