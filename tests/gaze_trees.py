"""Small processed trees whose gaze can be learnt from the pictures: readers look at the bright disc."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from trees import save

from datasets.fixations import heatmap_to_uint8

SPLITS = ("train", "train", "train", "validate", "test", "train")
SIZE = np.array([48, 40])  # px, height and width


def disc(centre: np.ndarray, radius: float) -> np.ndarray:
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * radius**2))


def make_gaze_tree(root: Path, n_images: int = 12) -> Path:
    """A REFLACX tree of `n_images` subjects, without foregrounds; every third image has two readings."""
    rng = np.random.default_rng(10000)
    entries, rows = [], ["reflacx_id,x,y,duration"]
    for number in range(n_images):
        subject = str(10000 + number)
        centre = rng.uniform(0.25, 0.75, 2) * SIZE
        gray = 40 + 180 * disc(centre, 4) + rng.uniform(0, 20, SIZE)
        image = f"images/s{subject}/i{subject}.png"
        save(root / image, np.round(gray).clip(0, 255).astype(np.uint8))
        for reader in range(2 if number % 3 == 1 else 1):
            entry = {"image_path": image, "study_id": f"s{subject}", "reflacx_id": f"P{subject}R{reader}"}
            entry |= {"subject_id": subject, "split": SPLITS[number % len(SPLITS)]}
            entries.append(entry)
            seen = centre + rng.normal(0, 1, 2)
            gaze = heatmap_to_uint8(disc(seen, 5) + 0.02)
            save(root / f"attention/s{subject}/{entry['reflacx_id']}.png", gaze)
            for y, x in np.clip((seen + rng.normal(0, 2, (5, 2))) / SIZE, 0, 1):
                rows.append(f"{entry['reflacx_id']},{x:.5f},{y:.5f},0.2")
    (root / "reflacx.json").write_text(json.dumps(entries))
    (root / "fixations.csv").write_text("\n".join(rows) + "\n")
    return root


def edit_index(root: Path, change) -> None:
    """Update each entry of a tree's index by what `change` gives for its number and itself."""
    entries = json.loads((root / "reflacx.json").read_text())
    entries = [entry | change(number, entry) for number, entry in enumerate(entries)]
    (root / "reflacx.json").write_text(json.dumps(entries))
