"""downstream/tuned.py: a best.pth that can't be judged by is one line, not a wrong number."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from downstream.encoders import Candidate
from downstream.evaluate import read_tuned, write_tuned
from util.errors import UserError
from util.export import build_encoder, read_encoder

FACTS = {
    "timm_model": "vit_base_patch16_224",
    "labels": ["a", "b"],
    "mean": [0.5],
    "std": [0.5],
    "reading": {},
    "task": "multilabel",
    "dataset": "rsna",
    "fraction": 1.0,
    "seed": 3,
    "seen": [],
    "num_heads": 1,
    "timm_args": {"embed_dim": 32, "depth": 1, "num_heads": 1, "img_size": 32, "num_classes": 2},
}


@pytest.fixture(scope="module")
def state():
    return timm.create_model(FACTS["timm_model"], **FACTS["timm_args"]).state_dict()


def save(state, path, **facts):
    told = {name: v if isinstance(v, str) else json.dumps(v) for name, v in (FACTS | facts).items()}
    torch.save({"state_dict": state, "metadata": told}, path)
    return path


def test_a_model_that_this_timm_lacks_is_refused(state, tmp_path):
    assert read_tuned(save(state, tmp_path / "good.pth")).labels == ["a", "b"]
    path = save(state, tmp_path / "odd.pth", timm_model="nothing")
    with pytest.raises(UserError, match=f"^{path}: not a model of this timm: [^\n]*nothing"):
        read_tuned(path)


def test_a_fine_tuned_model_is_read_as_an_encoder_with_its_own_heads(tmp_path):
    """A tiny ViT with 6 heads, where timm's has 3."""
    torch.manual_seed(0)
    options = {"img_size": 32, "num_heads": 6}
    encoder = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    torch.save({"state_dict": encoder.state_dict(), "metadata": {"num_heads": "6"}}, tmp_path / "encoder.pth")
    candidate = Candidate("x", "file", read_encoder(tmp_path / "encoder.pth"))
    model = candidate.build(2).eval()
    write_tuned(tmp_path / "best.pth", model.state_dict(), candidate, model, pool="token", labels=["a", "b"])
    again = build_encoder(read_encoder(tmp_path / "best.pth")).eval()
    img = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.forward_features(img), model.forward_features(img))
