"""Small processed trees of made-up pictures, for the tests of datasets/."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image

from util.images import write_gray
from util.masking import otsu_foreground

SIZES = [(130, 100), (90, 120), (64, 64), (200, 150), (40, 50), (33, 77)]  # (height, width)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A picture with soft structure, 0..255."""
    waves = Image.fromarray(rng.random((9, 9), np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.round((waves - np.min(waves)) / np.ptp(waves) * 255).astype(np.uint8)


def heatmap(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A bump, 0..255."""
    y, x = np.mgrid[:height, :width] - rng.uniform(0.3, 0.7, (2, 1, 1)) * [[[height]], [[width]]]
    bump = np.exp(-(y**2 + x**2) / (height / 5) ** 2)
    return np.round(bump / bump.max() * 255).astype(np.uint8)


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


def save_entry(root: Path, rng: np.random.Generator, size: tuple[int, int], image: str, maps: str) -> None:
    """An image, its attention and its foreground (Otsu's, 0/255)."""
    gaze = heatmap(rng, *size)
    save(root / image, smooth(rng, *size))
    save(root / "attention" / maps, gaze)
    save(root / "foreground" / maps, otsu_foreground(torch.from_numpy(gaze)[None])[0].numpy() * np.uint8(255))


def make_reflacx(root: Path, sizes=SIZES) -> Path:
    rng, entries = np.random.default_rng(1), []
    for i, size in enumerate(sizes):
        image = f"files/p10/p1000{i}/s{i}/image{i}.{'png' if i % 2 else 'jpg'}"
        entry = {"image_path": image, "study_id": 50000 + i, "reflacx_id": f"P300R{i:06d}", "split": "train"}
        save_entry(root, rng, size, image, f"{entry['study_id']}/{entry['reflacx_id']}.png")
        entries.append(entry)
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


def make_mimic(root: Path, prefix: str = "files/", mirror_prefix: str = "files/", sizes=SIZES[:3]) -> Path:
    rng, entries = np.random.default_rng(2), []
    for i, size in enumerate(sizes):
        inner = f"p11/p1100{i}/s{i}/image{i}"
        save_entry(root, rng, size, f"files/{inner}.jpg", f"{mirror_prefix}{inner}.png")
        entries.append({"image_path": f"{prefix}{inner}.jpg", "study_id": i, "subject_id": i})
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
