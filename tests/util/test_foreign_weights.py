"""The same encoder out of every layout that people compare with, and nothing out of half of one."""

from __future__ import annotations

import pytest
import timm
import torch

from util.errors import UserError
from util.export import build_backbone, read_backbone

MMPRETRAIN = (
    ("patch_embed.proj.", "patch_embed.projection."),
    (".norm1.", ".ln1."),
    (".norm2.", ".ln2."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
)


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=1, num_classes=0)
    return model.state_dict()


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def mmpretrain(state: dict) -> dict:
    renamed = {}
    for name, tensor in state.items():
        for old, new in MMPRETRAIN:
            name = name.replace(old, new)
        name = name.replace("blocks.", "layers.")
        renamed[f"ln1.{name[5:]}" if name.startswith("norm.") else name] = tensor
    return renamed


def other(state: dict) -> dict:
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


LAYOUTS = {
    "plain timm, with a head": lambda s: s | {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)},
    "MAE": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 64), "decoder_embed.weight": torch.zeros(32, 64)}},
    "SimMIM": lambda s: {
        "model": under("encoder.", s)
        | {"encoder.mask_token": torch.zeros(1, 1, 64), "decoder.0.weight": torch.zeros(3)}
    },
    "DINO, a backbone's file": lambda s: s,
    "DINO, a full checkpoint": lambda s: {
        "student": under("module.backbone.", other(s)),
        "teacher": under("backbone.", s) | {"head.mlp.0.weight": torch.zeros(2, 64)},
        "epoch": 3,
    },
    "both twins in one dict": lambda s: {
        "state_dict": under("student.backbone.", other(s)) | under("teacher.backbone.", s)
    },
    "mmpretrain": lambda s: {
        "state_dict": under("backbone.", mmpretrain(s)) | {"head.layers.head.weight": torch.zeros(2, 64)},
        "meta": {"epoch": 1},
    },
    "mmpretrain, without prefix": lambda s: {"state_dict": mmpretrain(s)},
    "Lightning": lambda s: {
        "state_dict": under("model.", s) | {"criterion.weight": torch.zeros(1)},
        "epoch": 4,
        "pytorch-lightning_version": "1.5",
    },
    "GLoRIA-like": lambda s: {
        "state_dict": under("img_encoder_k.model.", other(s))
        | under("img_encoder_q.model.", s)
        | {"text_encoder.x": torch.zeros(2)}
    },
    "DistributedDataParallel": lambda s: {"model": under("module.", s)},
    "any prefix": lambda s: under("my.own.vit.", s),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_is_found(state, tmp_path, layout):
    torch.save(LAYOUTS[layout](state), tmp_path / "a strange name.pth")
    backbone = read_backbone(tmp_path / "a strange name.pth", num_heads=1)
    assert set(backbone.state) == set(state)
    for name, tensor in state.items():
        assert torch.equal(backbone.state[name], tensor), name
    build_backbone(backbone)
    assert all("attn" not in name for name in backbone.ignored if "student" not in name and "_k." not in name)


# Of CLIP, DINOv2, BEiT, EVA, DeiT: each changes the features.
@pytest.mark.parametrize(
    "name",
    "register_tokens reg_token norm_pre.weight ln_pre.weight rel_pos_bias.relative_position_bias_table rope.freqs "
    "dist_token blocks.0.gamma_1 blocks.1.attn.q_norm.weight blocks.1.attn.relative_position_bias_table".split(),
)
def test_tensors_that_may_be_the_encoders_are_refused(state, tmp_path, name):
    torch.save({"model": under("backbone.", state | {name: torch.zeros(1, 1, 64)})}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x.pth: backbone.{name} may belong to an encoder that is no plain ViT"):
        read_backbone(tmp_path / "x.pth", num_heads=1)


def test_what_is_no_part_is_told(state, tmp_path):
    torch.save({"state_dict": under("backbone.", state) | {"head.weight": torch.zeros(2, 2)}}, tmp_path / "x.pth")
    backbone = read_backbone(tmp_path / "x.pth", num_heads=1)
    assert backbone.prefix == "backbone." and list(backbone.ignored) == ["head.weight"]


def test_less_than_the_whole_encoder_is_an_error(state, tmp_path):
    half = {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.fc2.weight"}
    for broken, reason in [
        (half, "blocks.1.mlp.fc2.weight"),
        ({name: t for name, t in state.items() if not name.startswith("norm.")}, "norm.weight"),
        ({name: t for name, t in state.items() if name != "pos_embed"}, "pos_embed"),
        ({name: t for name, t in state.items() if not name.startswith("patch_embed")}, "patch_embed"),
        (under("a.", state) | under("b.", state), r"encoders under a\. and b\."),
    ]:
        torch.save(broken, tmp_path / "half.pth")
        with pytest.raises(UserError, match=f"half.pth: .*{reason}") as caught:
            build_backbone(read_backbone(tmp_path / "half.pth", num_heads=1))
        assert "\n" not in str(caught.value)
