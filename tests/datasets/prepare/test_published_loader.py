"""Trees that preparation writes are read by the published loaders' rule (DATA.md, METHOD.md), written out here from its
description: the same files, and the same samples, as our own data sets give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import brightness

from datasets.build import build_dataset
from datasets.prepare.mimic import prepare_mimic
from datasets.transforms import centre_box, crop_resize_flip
from gaze.fill import Predictor, fill_tree


class PublishedMimic:
    """root + "files/" + image_path; "attention/" and "foreground/" + image_path, with .png; nothing else is asked."""

    index = "mimic-cxr-jpg-cleanv4.json"

    def __init__(self, root: Path):
        self.root = str(root)
        with open(f"{self.root}/{self.index}", encoding="utf-8") as file:
            self.entries = json.load(file)

    def names(self, entry: dict) -> tuple[str, str, str]:
        path = entry["image_path"]
        png = path[: path.rindex(".")] + ".png"
        return f"files/{path}", f"attention/{png}", f"foreground/{png}"

    def __getitem__(self, place: int) -> list[np.ndarray]:
        names = self.names(self.entries[place])
        return [np.asarray(Image.open(f"{self.root}/{name}").convert("L")) for name in names]


class PublishedReflacx(PublishedMimic):
    """root + image_path; "attention/" and "foreground/" + study_id + reflacx_id, with .png."""

    index = "reflacx.json"

    def names(self, entry: dict) -> tuple[str, str, str]:
        gaze = f"{entry['study_id']}/{entry['reflacx_id']}.png"
        return entry["image_path"], f"attention/{gaze}", f"foreground/{gaze}"


def heatmaps(study, folder: Path) -> Path:
    folder.mkdir()
    for place, image in enumerate(study.truth):
        y, x = np.mgrid[:40, :30]
        np.save(folder / f"{image.dicom_id}.npy", np.exp(-((y - 20) ** 2 + (x - 5 - place) ** 2) / 40.0))
    return folder


@pytest.mark.parametrize("made", ["heatmaps made elsewhere", "heatmaps predicted here", "readings"])
def test_the_published_rule_finds_the_same_samples(made, study, tree, tmp_path):
    if made == "readings":
        published = PublishedReflacx(tree)
    else:
        given = heatmaps(study, tmp_path / "maps") if made == "heatmaps made elsewhere" else None
        tree = tmp_path / "tree"
        prepare_mimic(study.images, given, tree, views=("all",), size=96)
        if given is None:
            fill_tree(tree, Predictor(brightness, 32, "plain"), workers=1)
        published = PublishedMimic(tree)
        assert all(not entry["image_path"].startswith(("files/", "/")) for entry in published.entries)
    ours = build_dataset(tree, input_size=64, augment=False, preload=True, use_cache=False)
    assert len(published.entries) == len(ours) == 12
    seen = set()
    for place in range(len(ours)):
        planes = published[place]
        own, size = ours.read_planes(place)
        assert size == planes[0].shape == planes[1].shape == planes[2].shape
        for theirs, mine in zip(planes, own, strict=True):
            np.testing.assert_array_equal(theirs, mine)
        assert set(np.unique(planes[2])) == {0, 255} and planes[1].max() == 255
        sample = crop_resize_flip(planes, centre_box(*size), (64, 64))
        assert torch.equal(ours[0, place]["img"], sample[:1])
        assert torch.equal(ours[0, place]["attention"], sample[1])
        assert torch.equal(ours[0, place]["foreground"] > 0, sample[2] > 127)
        seen.add(planes[0].tobytes())
    assert len(seen) == 12  # and not one of them twice
