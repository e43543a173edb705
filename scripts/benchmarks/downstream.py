"""Linear evaluation: heads from stored features against the plain published loop, on the same images."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from torch.utils.data import DataLoader

from datasets.downstream import read_dataset
from datasets.downstream.images import CENTRE, Views, normalisation, open_squares
from datasets.downstream.partition import Rows, partitions
from datasets.phantom.labelled import Chests
from datasets.phantom.rsna import make_rsna
from engine_downstream import Encoder, HeadOptions, Keyed, epoch_order, known_loss, new_head, schedule
from engine_frozen import Frozen, linear
from scripts.benchmarks.timing import Report, Row, Settings, timed
from util.encoders import Candidate
from util.export import read_backbone
from util.jobs import Jobs
from util.roc import auc
from util.stop import StopSignals

FRACTIONS, SEEDS = (0.3, 0.6, 1.0), (43, 44, 45)


def measure_downstream(report: Report, root: Path, settings: Settings) -> None:
    """3 fractions x 3 seeds of linear heads; and encoding against the encoder's bare forward passes."""
    n_images, epochs, batch_size, width = settings.downstream
    device = torch.device(settings.device)
    chests = Chests(n_images, size=(192, 160), lesion_kinds=("consolidation",), normal_fraction=0.5)
    images = read_dataset("rsna", make_rsna(root, chests, image_format="jpg").raw)
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_base_patch16_224", embed_dim=width, depth=2, num_heads=width // 64, num_classes=0
    )
    torch.save(
        {"state_dict": model.state_dict(), "metadata": {"num_heads": str(width // 64)}}, root / "x.pth"
    )
    candidate = Candidate("x", "file", read_backbone(root / "x.pth"))
    # Without early stopping both do the same steps.
    options = HeadOptions(epochs=epochs, batch_size=batch_size, patience=epochs)
    encoder = Encoder(candidate.build().eval().to(device), *normalisation("half"), device)
    plain: dict[tuple[float, int], float] = {}

    def published() -> None:
        for fraction in FRACTIONS:
            (rows,) = partitions(images, fraction, seed=0, n_folds=2, validate=True)
            for seed in SEEDS:
                plain[fraction, seed] = published_head(
                    encoder, Views(images, seed=seed), images, rows, seed, options
                )

    found: dict = {}

    def ours() -> None:
        with contextlib.redirect_stdout(sys.stderr), StopSignals() as signals:
            plane = open_squares(images, root / "cache")
            frozen = Frozen(
                images=images, views=Views(images, plane=plane), views_key="", files_key="", study_key="",
                fractions=FRACTIONS, seeds=SEEDS, n_folds=2, n_views=10, heads=options, features_dir=root / "features",
                jobs=Jobs(root / "jobs"), device=device, dtype=torch.float32, batch_size=64, num_workers=0, signals=signals,
            )  # fmt: skip
            found.update(linear(frozen, candidate, *normalisation("half")))

    fast, slow = timed(ours, settings.device), timed(published, settings.device)
    ratio = slow / fast
    note = f"{n_images} images, {epochs} epochs, width {width}; once each, since the baseline takes long"
    report.add(
        Row(
            "linear evaluation, 3 fractions x 3 seeds",
            "s",
            slow,
            fast,
            ratio,
            None,
            1,
            ">= 10",
            ratio >= 10,
            note,
        )
    )
    differences, spreads = [], []
    for fraction in FRACTIONS:
        own = [
            auc(images.labels[rows, 0], scores[:, 0])
            for (_, share, _), (rows, scores) in found.items()
            if share == fraction
        ]
        theirs = [plain[fraction, seed] for seed in SEEDS]
        differences.append(abs(np.mean(own) - np.mean(theirs)))
        spreads.append(np.std(theirs, ddof=1))
    report.equality["linear evaluation, largest difference of mean AUCs over fractions"] = float(
        max(differences)
    )
    report.equality["linear evaluation, mean standard deviation of AUCs over seeds"] = float(np.mean(spreads))
    measure_encoding(
        report, encoder, Views(images, plane=open_squares(images, root / "cache")), len(images), device
    )


def published_head(encoder: Encoder, views, images, rows: Rows, seed: int, options: HeadOptions) -> float:
    """The published loop: in every epoch read, augment and encode the training images, then the validation
    images; test the best epoch. Returns the test AUC."""

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
    return auc(images.labels[rows.test, 0], logits_of(rows.test)[:, 0].cpu().numpy())


def measure_encoding(report: Report, encoder: Encoder, views: Views, n: int, device: torch.device) -> None:
    """Views read, augmented and encoded as `encode` does, against the bare forward passes of ready batches."""
    keys = [(view, i) for view in range(2) for i in range(n)]
    batches = list(DataLoader(Keyed(views, keys), 64))

    def bare() -> None:
        for gray in batches:
            encoder(gray.to(device)).cpu()

    def whole() -> None:
        for gray in DataLoader(Keyed(views, keys), 64):
            encoder(gray.to(device)).cpu()

    repeats = report.settings["repeats"]
    times = [(timed(bare, device.type), timed(whole, device.type)) for _ in range(repeats + 1)][1:]
    report.compare("encoding against bare forward passes", *(list(column) for column in zip(*times, strict=True)),
                   note="ratio: share of the bare rate; in this process, without workers")  # fmt: skip


def measure_encoding_rate(report: Report, settings: Settings) -> None:
    """A frozen ViT-B at 224 px, as run_downstream.py encodes with it, on images that are ready in memory."""
    device = torch.device(settings.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    smaller = {"embed_dim": 64, "depth": 2, "num_heads": 1} if settings.quick else {}
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **smaller).eval().to(device)
    encoder = Encoder(model, *normalisation("half"), device, dtype)
    gray = torch.randint(256, (settings.batch_size, 1, 224, 224), dtype=torch.uint8)

    def encode() -> None:
        encoder(gray.to(device)).cpu()

    seconds = [timed(encode, device.type) for _ in range(settings.repeats + 1)][1:]
    rate = settings.batch_size / float(np.median(seconds))
    note = f"width {model.embed_dim}, {len(model.blocks)} blocks, {str(dtype).removeprefix('torch.')}"
    report.value("downstream encoding", "images/s", rate, note=note)
