"""Trees that preparation writes are read by the published loaders' rule (DATA.md, METHOD.md), written out here from its
description: the same files, and the same samples, as our own data sets give."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from trees import brightness

from datasets.build import build_dataset
from datasets.prepare.mimic import prepare_mimic
from datasets.transforms import centre_box, crop_resize_flip
from gaze.fill import Predictor, fill_tree


def published_mimic(entry: dict) -> list[str]:
    """root + "files/" + image_path; "attention/" and "foreground/" + image_path, with .png; nothing else is asked."""
    path = entry["image_path"]
    assert not path.startswith(("files/", "/"))
    png = path[: path.rindex(".")] + ".png"
    return [f"files/{path}", f"attention/{png}", f"foreground/{png}"]


def published_reflacx(entry: dict) -> list[str]:
    """root + image_path; "attention/" and "foreground/" + study_id + reflacx_id, with .png."""
    gaze = f"{entry['study_id']}/{entry['reflacx_id']}.png"
    return [entry["image_path"], f"attention/{gaze}", f"foreground/{gaze}"]


@pytest.mark.parametrize("made", ["heatmaps made elsewhere", "heatmaps predicted here", "readings"])
def test_the_published_rule_finds_the_same_samples(made, study, tree, tmp_path):
    index, names = "reflacx.json", published_reflacx
    if made != "readings":
        index, names, maps = "mimic-cxr-jpg-cleanv4.json", published_mimic, None
        if made == "heatmaps made elsewhere":
            maps = tmp_path / "maps"
            maps.mkdir()
            for place, image in enumerate(study.truth):
                y, x = np.mgrid[:40, :30]
                np.save(maps / f"{image.dicom_id}.npy", np.exp(-((y - 20) ** 2 + (x - 5 - place) ** 2) / 40.0))
        tree = tmp_path / "tree"
        prepare_mimic(study.images, maps, tree, views=("all",), size=96)
        if maps is None:
            fill_tree(tree, Predictor(brightness, 32, "plain"), workers=1)
    entries = json.loads((tree / index).read_text())
    ours = build_dataset(tree, input_size=64, augment=False, preload=True, use_cache=False)
    assert len(entries) == len(ours) == 12
    seen = set()
    for place in range(len(ours)):
        planes = [np.asarray(Image.open(tree / name).convert("L")) for name in names(entries[place])]
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
