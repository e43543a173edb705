"""Small processed trees of made-up pictures, for the tests of datasets/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from util.images import write_gray
from util.masking import otsu_foreground

SIZES = [(130, 100), (90, 120), (64, 64), (200, 150), (40, 50), (33, 77)]  # (height, width)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with soft structure, 0..255."""
    y, x = np.mgrid[:height, :width]
    waves = sum(np.sin(x * a + b) * np.cos(y * c + d) for a, b, c, d in rng.uniform(0.02, 0.15, (5, 4)))
    waves = (waves - waves.min()) / np.ptp(waves)
    return np.round(waves * 255).astype(np.uint8)


def heatmap(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Three bumps, 0..255."""
    y, x = np.mgrid[:height, :width]
    centres = rng.uniform(0.2, 0.8, (3, 2)) * (height, width)
    total = sum(np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (height / 9) ** 2)) for cy, cx in centres)
    return np.round(total / total.max() * 255).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_gray(path, array)


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A gaze predictor without weights: [B, 1, H, W] -> densities [B, H / 4, W / 4]."""
    maps = F.avg_pool2d(images.float(), 4)[:, 0] ** 2 + 1
    return maps / maps.sum((1, 2), keepdim=True)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two samples are the same."""
    return all(torch.equal(a[key], b[key]) for key in a)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a directory, without locks."""
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".prepare.lock"))
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def make_reflacx(root: Path, sizes=SIZES) -> Path:
    rng = np.random.default_rng(1)
    entries = []
    for i, size in enumerate(sizes):
        image = f"files/p10/p1000{i}/s{i}/image{i}.{'png' if i % 2 else 'jpg'}"
        entry = {"image_path": image, "study_id": 50000 + i, "reflacx_id": f"P300R{i:06d}", "split": "train"}
        gaze = heatmap(rng, *size)
        name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
        save(root / image, smooth(rng, *size))
        save(root / "attention" / name, gaze)
        binary = otsu_foreground(torch.from_numpy(gaze)[None])[0].numpy()
        save(root / "foreground" / name, binary * np.uint8(255))
        entries.append(entry)
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


def make_mimic(root: Path, prefix: str = "files/", mirror_prefix: str = "files/", sizes=SIZES[:3]) -> Path:
    rng = np.random.default_rng(2)
    entries = []
    for i, size in enumerate(sizes):
        inner = f"p11/p1100{i}/s{i}/image{i}"
        entries.append({"image_path": f"{prefix}{inner}.jpg", "study_id": i, "subject_id": i})
        gaze = heatmap(rng, *size)
        save(root / f"files/{inner}.jpg", smooth(rng, *size))
        save(root / f"attention/{mirror_prefix}{inner}.png", gaze)
        save(root / f"foreground/{mirror_prefix}{inner}.png", (gaze > 100) * np.uint8(255))
    (root / "mimic-cxr-jpg-cleanv4.json").write_text(json.dumps(entries))
    return root


def add_metadata_and_heatmaps(root: Path, study, views: Sequence[str]) -> None:
    """Give a made-up study of few images what preparing all of MIMIC-CXR reads: the metadata table, with a view per
    image, and in root/heatmaps an array per image."""
    rows = [(i.dicom_id, i.subject_id, i.study_id, view) for i, view in zip(study.truth, views, strict=True)]
    columns = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    pd.DataFrame(rows, columns=columns).to_csv(study.images / "mimic-cxr-2.0.0-metadata.csv", index=False)
    (root / "heatmaps").mkdir()
    for number, image in enumerate(study.truth):
        np.save(root / "heatmaps" / f"{image.dicom_id}.npy", np.arange(16.0).reshape(4, 4) + number)
