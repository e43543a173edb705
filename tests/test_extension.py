"""Every entry of every mapping that people extend: trains a step, resumes, reloads, exports, draws.

docs/extend.md promises that an entry is all it takes.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from trees import make_mimic, make_reflacx

import run_pretrain
from datasets import build
from models_cxrmim import CXRMIM, ENCODERS
from models_decoder import SCALES
from scripts import export_backbone, visualize
from util.export import build_encoder, build_model, read_encoder
from util.masking import MASKINGS, MaskRequest, draw_mask, mask_generator
from util.weights import read_state_dict

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
SMALL = dict(depth=2, decoder_embed_dim=32)  # of every entry; its heads and patch size stay its own
FLAGS = (
    "--input_size 64 --id_list 0 1 --device cpu --batch_size 4 --num_workers 0 --pretrained none --warmup_epochs 1 "
    "--no_cache --image_every 0 --print_every 1"
).split()


@pytest.fixture(autouse=True)
def small_encoders(monkeypatch):
    """Each encoder with its own heads and patches, but 16 channels a head and two blocks."""
    for name, entry in ENCODERS.items():
        width = 16 * entry.keywords["num_heads"]
        monkeypatch.setitem(ENCODERS, name, partial(entry, **SMALL, embed_dim=width))


@pytest.fixture(scope="module")
def trees(tmp_path_factory) -> dict[str, Path]:
    """A tree of each type, by the name of its class: whoever adds a type adds its maker here."""
    root = tmp_path_factory.mktemp("trees")
    sizes = [(80, 70), (70, 90), (64, 64), (90, 80)]
    makers = {"Reflacx": partial(make_reflacx, sizes=sizes), "Mimic": partial(make_mimic, sizes=sizes)}
    return {name: make(root / name) for name, make in makers.items()}


def exercise(
    tree: Path, out: Path, *, encoder: str = "cxrmim_vit_tiny_patch16", masking: str = "attention", scale: float = 1.0
) -> CXRMIM:
    """All that a user does with a run, with one entry of a mapping exchanged; returns the reloaded model."""
    flags = [*FLAGS, "--data_path", str(tree), "--output_dir", str(out), "--model", encoder, "--masking", masking]
    flags += ["--scale_list", str(scale), "0.5"]
    assert run_pretrain.main([*flags, "--epochs", "1"]) == 0  # 4 images: one step
    assert run_pretrain.main([*flags, "--epochs", "2"]) == 0  # goes on
    checkpoint = out / "checkpoint-1.pth"
    assert [file.name for file in sorted(out.glob("*.pth"))] == ["checkpoint-0.pth", "checkpoint-1.pth"]

    state, info = read_state_dict(checkpoint)
    model = build_model(CXRMIM, state, info)
    assert model.masking == masking and model.scale_list == (scale, 0.5)
    assert (
        model.config == ENCODERS[encoder](img_size=64, id_list=(0, 1), scale_list=(scale, 0.5), masking=masking).config
    )

    assert export_backbone.main([str(checkpoint), str(out / "backbone.pth")]) == 0
    img = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = build_encoder(read_encoder(out / "backbone.pth")).eval().forward_features(img)
        expected = model.forward_encoder(img, torch.zeros(1, model.num_patches))[-1]
    assert (found - expected).abs().max() < 1e-5

    assert visualize.main([str(checkpoint), "--index", "0", "--out", str(out / "picture.jpg")]) == 0
    assert (out / "picture.jpg").stat().st_size > 1000
    return model


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale(scale, trees, tmp_path):
    model = exercise(trees["Reflacx"], tmp_path, scale=scale)
    head = model.decoder[0].pred(torch.zeros(1, 32, 4, 4))
    assert head.shape == (1, 27, 4 * scale, 4 * scale)


@pytest.mark.parametrize("masking", [name for name in MASKINGS if name != "attention"])  # all others train with it
def test_every_masking_rule(masking, trees, tmp_path):
    exercise(trees["Reflacx"], tmp_path, masking=masking)
    step = ["--epoch", "1", "--step", "0", "--sheet", "--out", str(tmp_path / "step.jpg")]
    assert visualize.main([str(tmp_path / "checkpoint-1.pth"), *step]) == 0


def check_rule(masking: str, shape: tuple[int, int, int] = (3, 64, 96)) -> None:
    """Counts are exact, and a mask is a function of what it was asked, at the start and late."""
    batch = {"attention": torch.rand(shape, generator=torch.Generator().manual_seed(0)), "img": torch.zeros(1)}
    for epoch, step in ((0, 0), (0, 1), (7, 3), (1000, 0)):
        for ratio in (0.3, 0.75):
            masks = [
                draw_mask(masking, MaskRequest(batch, 16, ratio, 0.5, epoch, step, mask_generator(0, epoch, step, 0)))
                for _ in range(2)
            ]
            assert torch.equal(*masks)
            assert (masks[0].sum(1) == int(masks[0].shape[1] * ratio)).all()


@pytest.mark.parametrize("encoder", list(ENCODERS)[1:])  # the first is what the other tests train
def test_every_encoder(encoder, trees, tmp_path):
    model = exercise(trees["Reflacx"], tmp_path, encoder=encoder)
    assert model.config["num_heads"] == ENCODERS[encoder].keywords["num_heads"]


@pytest.mark.parametrize("tree_type", build.TREE_TYPES, ids=lambda tree_type: tree_type.__name__)
def test_every_tree_type(tree_type, trees, tmp_path):
    dataset = build.build_dataset(trees[tree_type.__name__], use_cache=False)
    assert type(dataset) is tree_type
    exercise(trees[tree_type.__name__], tmp_path)


# ---------------------------------------------------------------- planted entries


def eightfold(dim: int, out_channels: int) -> nn.Sequential:
    """A whole entry: heads of scale 8, cells of 2 px."""
    return nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 8, 8), nn.Conv2d(dim // 2, out_channels, 1))


def test_a_whole_new_scale_is_one_entry(trees, tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, 8.0, eightfold)
    assert exercise(trees["Reflacx"], tmp_path, scale=8.0).hog.cell_sizes == (2, 32)


# ---------------------------------------------------------------- docs/extend.md


def test_the_worked_masking_rule_of_the_page(trees, tmp_path, monkeypatch):
    monkeypatch.setattr("util.masking.MASKINGS", MASKINGS)  # put back what the page's code adds
    before = dict(MASKINGS)
    try:
        exec(next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "MaskRequest" in code), {})
        check_rule("curriculum")
        exercise(trees["Reflacx"], tmp_path, masking="curriculum")
    finally:
        MASKINGS.clear()
        MASKINGS.update(before)
