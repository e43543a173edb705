"""Fine-tuning of a whole backbone for several findings at once, with timm's model, optimiser and schedule."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedGroupKFold
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from datasets.downstream.labels import (
    ANY_FINDING,
    TEST,
    TRAIN,
    VALIDATE,
    LabelledImages,
    Squares,
    normalize,
    read_sample,
)
from datasets.sampler import TrainBatches
from datasets.transforms import crop_resize_flip, random_crop_box, sample_rng
from util.errors import UserError
from util.export import Backbone, build_backbone, describe
from util.files import atomic_write
from util.loading import SampleLoader
from util.probe import bootstrap_weights, interval, weighted_auc

VALIDATION_PARTS = 5  # one of so many parts of the training subjects validates, where the data name none


@dataclass(frozen=True)
class Options:
    """How to fine-tune; the defaults follow MAE's fine-tuning recipe, scaled to small data."""

    epochs: int = 30
    batch_size: int = 32
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: int = 3
    weight_decay: float = 0.05
    layer_decay: float = 0.75
    drop_path: float = 0.1
    pool: str = "avg"
    min_crop_ratio: float = 0.6
    flip: float = 0.5
    min_positives: int = 10
    bootstrap: int = 1000
    seed: int = 0
    num_workers: int = 2
    device: str = "cpu"


@dataclass(frozen=True)
class Parts:
    """Rows of the images to train on, to choose the epoch by, and to test on (empty if there are none)."""

    train: np.ndarray
    validate: np.ndarray
    test: np.ndarray


def split_images(images: LabelledImages, seed: int) -> Parts:
    """The data's own splits; where they name no validation images, a fifth of the training subjects.

    Raises:
        UserError: a subject on both sides, or too few subjects.
    """
    if images.splits is None:
        train, test = np.arange(len(images)), np.array([], int)
        validate = test
    else:
        images.check_splits()
        train, validate, test = (np.flatnonzero(images.splits == name) for name in (TRAIN, VALIDATE, TEST))
    if not len(validate):
        if len(np.unique(images.subjects[train])) < VALIDATION_PARTS:
            raise UserError(f"too few subjects to validate on: fewer than {VALIDATION_PARTS}")
        any_finding = (images.labels[train] == 1).any(1)
        splitter = StratifiedGroupKFold(VALIDATION_PARTS, shuffle=True, random_state=seed)
        inner, outer = next(splitter.split(train, any_finding, images.subjects[train]))
        train, validate = train[inner], train[outer]
    return Parts(train, validate, test)


def usable_findings(images: LabelledImages, parts: Parts, min_positives: int) -> tuple[list[int], list[str]]:
    """Findings frequent enough to train on and to validate, by column, and the names of the others.

    Raises:
        UserError: none is.
    """
    kept, left_out = [], []
    for j, finding in enumerate(images.findings):
        train, validate = (images.labels[rows, j] for rows in (parts.train, parts.validate))
        enough = min((train == 1).sum(), (train == 0).sum()) >= min_positives
        if enough and (validate == 1).any() and (validate == 0).any():
            kept.append(j)
        else:
            left_out.append(finding)
    if not kept:
        raise UserError(
            f"no finding has {min_positives} training images with and without it and both kinds among the "
            f"{len(parts.validate)} validation images; more images or a lower --min_positives are needed"
        )
    return kept, left_out


class TrainingImages(Dataset):
    """Randomly cropped and flipped images with labels, a function of (seed, epoch, index) only."""

    def __init__(
        self, images: LabelledImages, rows: np.ndarray, columns: list[int], size: int, options: Options
    ):
        self.paths = [images.paths[row] for row in rows]
        self.labels = torch.from_numpy(images.labels[np.ix_(rows, columns)]).float()
        self.size = size
        self.options = options

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        gray = read_sample(self.paths[index])
        rng = sample_rng(self.options.seed, epoch, index)
        box = random_crop_box(rng, *gray.shape, self.options.min_crop_ratio)
        flip = bool(rng.random() < self.options.flip)
        return crop_resize_flip([gray], box, (self.size, self.size), flip), self.labels[index]


def known_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy averaged over the known labels; NaN labels count for nothing. [B, F] -> scalar."""
    known = ~labels.isnan()
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def predict(model: nn.Module, paths: list[Path], size: int, options: Options) -> np.ndarray:
    """Logits [N, F] of whole images."""
    model.eval()
    loader = SampleLoader(Squares(paths, size), options.batch_size, num_workers=options.num_workers)
    logits = [model(_prepare(gray, options.device)).float().cpu() for gray in loader]
    return torch.cat(logits).numpy()


def _prepare(gray: Tensor, device: str) -> Tensor:
    return normalize(gray.to(device, non_blocking=True), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def auc_table(
    findings: list[str], labels: np.ndarray, logits: np.ndarray, subjects: np.ndarray, repeats: int, seed: int
) -> pd.DataFrame:
    """AUC per finding with its 95% interval over subjects, and the mean of the single findings.

    Findings with one class only are left out.
    """
    weights = bootstrap_weights(subjects, repeats, seed)
    rows, draws = [], []
    for j, finding in enumerate(findings):
        known = np.flatnonzero(~np.isnan(labels[:, j]))
        if len(np.unique(labels[known, j])) == 2:
            values = weighted_auc(labels[known, j], logits[known, j], weights[:, known])
            rows.append([finding, *interval(values), int(labels[known, j].sum()), len(known)])
            draws += [values] if finding != ANY_FINDING else []
    if len(draws) > 1:
        rows.append(["mean", *interval(np.mean(draws, 0)), pd.NA, pd.NA])
    return pd.DataFrame(rows, columns=["finding", "auc", "low", "high", "positives", "images"])


def finetune(backbone: Backbone, images: LabelledImages, out: Path, options: Options) -> pd.DataFrame:
    """Train all weights and a new linear head; keep the epoch with the best mean validation AUC.

    Writes into `out`: best.pth (for `timm.create_model(..., checkpoint_path=...)`, with findings and
    arguments in its metadata), log.txt (a JSON line per epoch) and auc.csv.

    Returns:
        `auc_table` of the test images, or, where there are none, of the validation images.

    Raises:
        UserError: splits or findings that can't be used, fewer images than a batch, a loss that is
            not finite, or `out` holds another run.
    """
    if (out / "log.txt").exists():
        raise UserError(f"{out}: holds a run already; choose another --output_dir")
    parts = split_images(images, options.seed)
    columns, left_out = usable_findings(images, parts, options.min_positives)
    findings = [images.findings[j] for j in columns]
    if left_out:
        print(f"left out, too few images with or without it: {', '.join(left_out)}")
    counts = ", ".join(f"{len(getattr(parts, name))} to {name}" for name in ("train", "validate", "test"))
    print(f"{len(findings)} findings: {', '.join(findings)}; images: {counts}")

    torch.manual_seed(options.seed)
    size = backbone.timm_args.get("img_size", 224)
    model = build_backbone(
        backbone, len(findings), global_pool=options.pool, drop_path_rate=options.drop_path
    ).to(options.device)
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=options.lr, weight_decay=options.weight_decay, layer_decay=options.layer_decay
    )
    data = TrainingImages(images, parts.train, columns, size, options)
    try:
        sampler = TrainBatches(len(data), options.batch_size, seed=options.seed, epochs=options.epochs)
    except ValueError as error:
        raise UserError(str(error)) from None
    steps = sampler.steps_per_epoch
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=options.epochs * steps,
        lr_min=options.min_lr,
        warmup_t=options.warmup_epochs * steps,
        warmup_lr_init=options.min_lr,
        t_in_epochs=False,
    )
    batches = iter(SampleLoader(data, batch_sampler=sampler, num_workers=options.num_workers))
    dtype = torch.bfloat16 if options.device.startswith("cuda") else torch.float32
    validation = [images.paths[row] for row in parts.validate]
    labels = images.labels[:, columns]

    out.mkdir(parents=True, exist_ok=True)
    best = -math.inf
    for epoch in range(options.epochs):
        model.train()
        total = torch.zeros((), device=options.device)
        for step in tqdm(range(steps), f"epoch {epoch + 1}/{options.epochs}", disable=None):
            gray, wanted = next(batches)
            scheduler.step_update(epoch * steps + step)
            with torch.autocast(torch.device(options.device).type, dtype, enabled=dtype != torch.float32):
                logits = model(_prepare(gray, options.device))
            loss = known_bce(logits, wanted.to(options.device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
        mean_loss = total.item() / steps
        if not math.isfinite(mean_loss):
            raise UserError(f"epoch {epoch + 1}: the loss is {mean_loss}; try a smaller --lr")
        logits = predict(model, validation, size, options)
        table = auc_table(findings, labels[parts.validate], logits, images.subjects[parts.validate], 1, 0)
        auc = float(table["auc"].iloc[-1])
        record = {"epoch": epoch, "train_loss": mean_loss, "validation_auc": auc,
                  "train_lr": max(group["lr"] for group in optimizer.param_groups)}  # fmt: skip
        with open(out / "log.txt", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(
            f"epoch {epoch + 1}/{options.epochs}  loss {mean_loss:.4f}  validation AUC {auc:.4f}", flush=True
        )
        if auc > best:
            best = auc
            _save(model, out / "best.pth", backbone, findings, options, epoch, auc)

    state = torch.load(out / "best.pth", map_location=options.device, weights_only=True)
    model.load_state_dict(state["state_dict"])
    rows = parts.test if len(parts.test) else parts.validate
    logits = predict(model, [images.paths[row] for row in rows], size, options)
    table = auc_table(findings, labels[rows], logits, images.subjects[rows], options.bootstrap, options.seed)
    with atomic_write(out / "auc.csv", "w") as file:
        table.to_csv(file, index=False, float_format="%.4f")
    return table


def _save(
    model, path: Path, backbone: Backbone, findings: list[str], options: Options, epoch: int, auc: float
):
    arguments = dict(backbone.timm_args) | {"num_classes": len(findings), "global_pool": options.pool}
    metadata = describe(backbone) | {
        "timm_args": json.dumps(arguments),
        "findings": json.dumps(findings),
        "options": json.dumps(vars(options)),
        "epoch": str(epoch),
        "validation_auc": f"{auc:.6f}",
    }
    buffer = io.BytesIO()
    torch.save({"state_dict": model.state_dict(), "metadata": metadata}, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())
