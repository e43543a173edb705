"""Linear evaluation: heads from stored features against the plain published loop, on the same images."""

from __future__ import annotations

import contextlib
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm
import torch
from torch.utils.data import DataLoader

from datasets.phantom.labelled import Chests
from datasets.phantom.rsna import make_rsna
from downstream.data import read_dataset
from downstream.data.images import CENTRE, Views, normalisation, open_squares
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.partition import Rows, partitions
from downstream.encoders import Candidate
from downstream.frozen import Frozen, linear
from downstream.heads import ENCODE_BATCH, Encoder, HeadOptions, Keyed, epoch_order, known_loss, new_head, schedule
from downstream.jobs import Jobs
from scripts.benchmarks.timing import Report, Row, Settings, timed_twice
from util.export import read_backbone
from util.roc import auc
from util.stop import StopSignals

FRACTIONS, SEEDS, VIEWS = (0.3, 0.6, 1.0), (43, 44, 45), 10
SHARES = {TRAIN: 4, VALID: 1, TEST: 10}  # testing costs the plain loop nothing, and makes AUCs worth comparing


def measure_downstream(report: Report, root: Path, settings: Settings) -> None:
    """3 fractions x 3 seeds of linear heads of a small frozen encoder."""
    n_images, epochs, batch_size, width = settings.downstream
    device = torch.device(settings.device)
    chests = Chests(n_images, size=(192, 160), lesion_kinds=("consolidation",), normal_fraction=0.5)
    images = read_dataset("rsna", make_rsna(root, chests, image_format="jpg").raw)
    parts = np.resize(np.repeat(list(SHARES), list(SHARES.values())), n_images)
    images = replace(images, parts=np.random.default_rng(0).permutation(parts))
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", embed_dim=width, depth=2, num_heads=width // 64, num_classes=0)
    torch.save({"state_dict": model.state_dict(), "metadata": {"num_heads": str(width // 64)}}, root / "x.pth")
    candidate = Candidate("x", "file", read_backbone(root / "x.pth"))
    measure_heads(report, root, images, candidate, HeadOptions(epochs, batch_size, patience=epochs), device)


def measure_heads(
    report: Report, root: Path, images: LabelledImages, candidate: Candidate, options: HeadOptions, device: torch.device
) -> None:
    """All heads from stored features, of some views and of one per epoch, against the plain published loop, which
    draws new views for every seed. Without early stopping all do the same steps."""
    encoder = Encoder(candidate.build().eval().to(device), *normalisation("half"), device)
    plain, spent = {}, []
    for fraction in FRACTIONS:
        (rows,) = partitions(images, fraction, seed=0, n_folds=2, validate=True)
        for seed in SEEDS:

            def published(rows: Rows = rows, fraction: float = fraction, seed: int = seed) -> None:
                logits = published_head(encoder, Views(images, seed=seed), images, rows, seed, options)
                plain[fraction, seed] = auc(images.labels[rows.test, 0], logits[:, 0])

            spent.append(timed_twice(published, device.type))
    plain_seconds, plain_processor = np.sum(spent, 0).tolist()
    spread = np.mean([np.std([plain[fraction, seed] for seed in SEEDS], ddof=1) for fraction in FRACTIONS])
    report.equality["linear evaluation, mean standard deviation of AUCs over seeds"] = float(spread)
    counts = ", ".join(f"{(images.parts == part).sum()} {part}" for part in SHARES)
    for n_views in (VIEWS, options.epochs):
        found: dict = {}

        def ours(n_views: int = n_views, found: dict = found) -> None:
            with contextlib.redirect_stdout(sys.stderr), StopSignals() as signals, signals.exit_at_signal():
                place = root / f"views{n_views}"
                plane = open_squares(images, place / "cache")
                frozen = Frozen(
                    images=images,
                    views=Views(images, plane=plane),
                    views_key="",
                    files_key="",
                    study_key="",
                    fractions=FRACTIONS,
                    seeds=SEEDS,
                    n_folds=2,
                    n_views=n_views,
                    heads=options,
                    features_dir=place / "features",
                    jobs=Jobs(place / "jobs"),
                    device=device,
                    dtype=torch.float32,
                    batch_size=ENCODE_BATCH[device.type],
                    num_workers=0,
                    signals=signals,
                )
                found |= linear(frozen, candidate, *normalisation("half"))

        seconds, processor = timed_twice(ours, device.type)
        ratio = plain_seconds / seconds
        what = f"{len(FRACTIONS)} fractions x {len(SEEDS)} seeds"
        name = f"linear evaluation, {what}" if n_views == VIEWS else "linear evaluation, a view per epoch"
        bar, met = (">= 10", ratio >= 10) if n_views == VIEWS else (None, None)
        note = (
            f"{counts}; {options.epochs} epochs, {n_views} views, width {encoder.model.embed_dim}; once each; "
            f"{plain_processor / processor:.3g}x by processor time"
        )
        report.add(Row(name, "s", plain_seconds, seconds, ratio, None, 1, bar, met, note))
        differences = []
        for fraction in FRACTIONS:
            own = []
            for seed in SEEDS:
                rows, scores = found["", fraction, seed]
                own.append(auc(images.labels[rows, 0], scores[:, 0]))
            differences.append(abs(np.mean(own) - np.mean([plain[fraction, seed] for seed in SEEDS])))
        title = f"linear evaluation, {n_views} views, largest difference of mean AUCs over fractions"
        report.equality[title] = float(max(differences))


def published_head(encoder: Encoder, views, images, rows: Rows, seed: int, options: HeadOptions) -> np.ndarray:
    """The published loop: in every epoch read, augment and encode the training images, then the validation
    images; test the best epoch. Returns the test images' logits, [n, C]."""

    def features(keys: list[tuple[int, int]]):
        for gray in DataLoader(Keyed(views, keys), options.batch_size):
            width = encoder.model.embed_dim
            yield encoder(gray.to(encoder.device))[:, :width]

    def logits_of(part: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([head(batch) for batch in features([(CENTRE, int(i)) for i in part])])

    labels = torch.from_numpy(images.labels).to(encoder.device)
    head = new_head(encoder.model.embed_dim, labels.shape[1], seed).to(encoder.device)
    optimizer = torch.optim.Adam(head.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    steps, best, state = len(rows.train) // options.batch_size, math.inf, {}
    for epoch in range(options.epochs):
        order = rows.train[epoch_order(seed, epoch, len(rows.train))][: steps * options.batch_size]
        for step, batch in enumerate(features([(epoch, int(i)) for i in order])):
            for group in optimizer.param_groups:
                group["lr"] = schedule(epoch * steps + step, steps, options)
            wanted = labels[order[step * options.batch_size : (step + 1) * options.batch_size]]
            optimizer.zero_grad()
            known_loss(head(batch), wanted, images.task).backward()
            optimizer.step()
        loss = known_loss(logits_of(rows.valid), labels[rows.valid], images.task).item()
        if loss < best:
            best, state = loss, {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.load_state_dict(state)
    return logits_of(rows.test).cpu().numpy()
