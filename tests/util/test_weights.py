"""Weights files of several origins: read safely, found under any names, put into models, refused with a reason."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed

from models_cxrmim import CXRMIM, cxrmim_vit_base_patch16, cxrmim_vit_tiny_patch16
from util.errors import UserError
from util.export import build_encoder, build_model, read_encoder
from util.weights import check_same_model, load_initial_weights, read_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = dict(
    img_size=64, embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=32, id_list=(0, 1), scale_list=(2.0, 0.5)
)


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    """A small timm ViT of random weights, with a head."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", img_size=64, embed_dim=64, depth=2, num_heads=1, num_classes=5)
    return {name: torch.randn(tensor.shape) * 0.02 for name, tensor in model.state_dict().items()}


def save(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def with_heads(state, heads: int = 1) -> dict:
    """The content of a file that says how many attention heads its encoder has."""
    return {"model": dict(state), "metadata": {"num_heads": str(heads)}}


def is_encoder(name: str) -> bool:
    return name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/should_never_exist",)


# ---------------------------------------------------------------- reading


def test_plain_and_wrapped_files_give_the_same_tensors(vit, tmp_path):
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file(vit, tmp_path / "folder/model.safetensors", metadata={"source": "here"})
    files = [
        save(vit, tmp_path / "plain.pth"),
        save({"model": vit, "epoch": 3}, tmp_path / "model.pth"),
        save({"state_dict": {f"module.{k}": v for k, v in vit.items()}}, tmp_path / "ddp.pth"),
        tmp_path / "folder",
        tmp_path / "folder/model.safetensors",
    ]
    for file in files:
        state, info = read_state_dict(file)
        assert state.keys() == vit.keys() and info.kind == "vit"
        assert all(torch.equal(state[name], vit[name]) for name in vit)
    assert read_state_dict(files[1])[1].epoch == 3
    assert read_state_dict(files[3])[1].metadata == {"source": "here"}


@pytest.mark.parametrize("old_numpy", [False, True])  # which names its scalars numpy.core.multiarray.scalar
def test_namespace_and_numpy_scalars_are_read(old_numpy, tmp_path):
    args = argparse.Namespace(model="cxrmim_vit_tiny_patch16", lr=np.float64(0.25))
    path = save({"model": {"blocks.0.x": torch.zeros(1)}, "args": args, "epoch": np.int64(4)}, tmp_path / "new.pth")
    if old_numpy:
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "old.pth", "w") as target:
            for item in source.infolist():
                data = source.read(item)
                target.writestr(item.filename, data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
        path = tmp_path / "old.pth"
    _, info = read_state_dict(path)
    assert info.args == {"model": "cxrmim_vit_tiny_patch16", "lr": 0.25} and info.epoch == 4


@pytest.mark.parametrize("args", [RunsCode(), argparse.Namespace(hook=RunsCode())])
def test_a_file_that_would_run_code_is_refused_unrun(args, vit, tmp_path):
    path = save({"model": vit, "args": args}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: refused[^\n]*system[^\n]*$"):
        read_state_dict(path)
    assert not Path("/tmp/should_never_exist").exists()


JUNK = [b"junk", b"(dp0", b"\x80\x02}q", b"PK\x03\x04..", b"\x89PNG\r\n" + bytes(100)]


@pytest.mark.parametrize("content", [*JUNK, [1, 2], {}, {"model": {}}, {"epoch": 3}], ids=str)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_holds_no_weights_is_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
    with pytest.raises(UserError, match=r"x.pth: (not a readable weights file|truncated|no state dict in it)[^\n]*$"):
        read_state_dict(path)
    for place in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="no such weights file, nor a folder"):
            read_state_dict(place)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_every_cut_is_found(kind, tmp_path):
    """Flipped bits, which only torch's files have checksums against: tests/util/test_checkpoint.py."""
    weights, path = {"blocks.0.norm1.weight": torch.randn(64)}, tmp_path / f"w.{kind}"
    torch.save({"model": weights}, path) if kind == "pth" else safetensors.torch.save_file(weights, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 31):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"w\.[^\n]*$"):
            read_state_dict(path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(3, dtype=torch.int32), "torch.int32"),
        (torch.tensor([0, float("inf")]), "1 values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(value, reason, tmp_path):
    state = {"bn.num_batches_tracked": torch.tensor(3), "blocks.0.norm1.weight": value}
    path = save({"model": state, "metadata": "by somebody"}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w.pth: blocks.0.norm1.weight (is|has) .*{reason}"):
        read_state_dict(path)


# ---------------------------------------------------------------- a ViT under the names of others


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state: dict) -> dict:
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


ONE = torch.zeros(2)
LAYOUTS = {
    "MAE": lambda s: {"model": s | {"mask_token": ONE, "decoder_embed.weight": ONE}},
    "SimMIM": lambda s: {"model": under("encoder.", s | {"mask_token": ONE}) | {"decoder.0.weight": ONE}},
    "DINO": lambda s: {
        "student": under("module.backbone.", other(s)),
        "teacher": under("backbone.", s) | {"head.mlp.0.weight": ONE},
    },
    "GLoRIA-like": lambda s: {
        "state_dict": under("img_encoder_k.model.", other(s))
        | under("img_encoder_q.model.", s)
        | {"text_encoder.x": ONE}
    },
    "momentum beside it": lambda s: s | under("momentum_encoder.", other(s)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_encoder_is_found(vit, tmp_path, layout):
    state = {name: tensor for name, tensor in vit.items() if not name.startswith("head.")}
    path = save(LAYOUTS[layout](state), tmp_path / "a strange name.pth")
    encoder = read_encoder(path, num_heads=1)
    assert set(encoder.state) == set(state)
    assert all(torch.equal(encoder.state[name], tensor) for name, tensor in state.items())
    build_encoder(encoder)


# Of CLIP, DINOv2, BEiT, DeiT: each changes the features.
@pytest.mark.parametrize("name", "register_tokens norm_pre.weight fc_norm.weight blocks.0.gamma_1".split())
def test_tensors_that_may_be_the_encoders_are_refused(vit, tmp_path, name):
    path = save(with_heads(under("backbone.", vit | {name: torch.zeros(1, 1, 64)})), tmp_path / "x.pth")
    for read in (read_encoder, lambda path: load_initial_weights(CXRMIM(**SMALL), path)):
        with pytest.raises(
            UserError, match=rf"x.pth: backbone.{name} may belong to an encoder that is not a plain ViT"
        ):
            read(path)


def test_less_than_the_whole_encoder_is_an_error(vit, tmp_path):
    def without(start: str) -> dict:
        return {name: tensor for name, tensor in vit.items() if not name.startswith(start)}

    for broken, reason in [
        (without("blocks.1.mlp.fc2.weight"), "blocks.1.mlp.fc2.weight"),
        (without("pos_embed"), "pos_embed is missing"),
        (vit | {"patch_embed.proj.weight": torch.zeros(64, 768)}, "patch_embed.proj.weight .* another rank"),
        (vit | {"pos_embed": vit["pos_embed"][:, :12]}, "takes square images: pos_embed"),
        (under("a.", vit) | under("b.", vit), r"encoders under a\. and b\."),
        ({"conv1.weight": torch.zeros(1)}, "no whole plain ViT.* it has conv1 .*FILE@TIMM_MODEL"),
    ]:
        path = save(broken, tmp_path / "half.pth")
        with pytest.raises(UserError, match=rf"half.pth: [^\n]*{reason}[^\n]*$"):
            build_encoder(read_encoder(path, num_heads=1, img_size=32))


# ---------------------------------------------------------------- into a model


def report_line(report: str, title: str) -> str:
    return next(line for line in report.splitlines() if line.startswith(f"  {title}"))


def test_a_timm_file_fills_the_encoder(vit, tmp_path):
    model = CXRMIM(**SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, save(with_heads(vit), tmp_path / "vit.pth"))
    after = model.state_dict()
    for name in after:
        assert torch.equal(after[name], vit[name] if is_encoder(name) else before[name]), name
    assert model.pos_embed.requires_grad is False
    assert "matched   28  cls_token, pos_embed, patch_embed (2), blocks (24)" in report
    assert report_line(report, "ignored").endswith("4  norm (2), head (2)")
    assert report_line(report, "missing").endswith("norm (4), decoder (42)") and len(report.splitlines()) == 4


def test_published_checkpoint_with_hog_enc(tmp_path):
    """All 248 published names and shapes (ViT-B); those of hog_enc are ignored, the rest all match."""
    shapes = json.loads((GOLDEN / "published_state_dict.json").read_text())
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    args = argparse.Namespace(gaze_weighted=True)
    path = save({"model": state, "args": args, "epoch": 399}, tmp_path / "c.pth")
    model = cxrmim_vit_base_patch16()
    report = load_initial_weights(model, path)
    assert report_line(report, "missing") == "  missing    0" and report_line(report, "ignored").endswith(
        "4  hog_enc (4)"
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_other_input_size_resamples_pos_embed_only(tmp_path):
    donor = CXRMIM(**SMALL)
    path = save(with_heads(donor.state_dict()), tmp_path / "c.pth")
    model = CXRMIM(**SMALL | {"img_size": 96})
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, path)
    assert torch.equal(model.pos_embed, resample_abs_pos_embed(donor.pos_embed, [6, 6], num_prefix_tokens=1))
    assert torch.equal(model.pos_embed[:, :1], donor.pos_embed[:, :1])
    kept = ["decoder.0.pos_embed", "decoder.1.pos_embed"]
    assert all(torch.equal(model.state_dict()[name], own[name]) for name in kept)
    assert all(report_line(report, title).endswith("2  decoder (2)") for title in ("ignored", "missing"))
    assert "16 patches to 6 x 6" in report


def test_files_of_other_models_are_refused(vit, tmp_path):
    deep, small = CXRMIM(**SMALL | {"depth": 4}), CXRMIM(**SMALL)
    heads = CXRMIM(**SMALL | {"num_heads": 4})
    told = {"model": heads.state_dict(), "model_config": heads.config}
    tiny = cxrmim_vit_tiny_patch16(img_size=32, id_list=(0,), scale_list=(1.0,))
    wide = {name: tensor for name, tensor in tiny.state_dict().items() if is_encoder(name)}
    for model, content, reason in [
        (small, with_heads(wide), "size mismatch for (cls_token|pos_embed): .*--model"),
        (small, {"model": CXRMIM(**SMALL, hog_nbins=6).state_dict()}, "decoder.0.pred.1.weight.*--hog_nbins"),
        (deep, with_heads(small.state_dict()), r"lacks blocks \(24\).*first: blocks.2"),
        (small, told, "its encoder has 4 attention heads, the model 1"),
        (tiny, wide, "does not say how many attention heads"),
    ]:
        with pytest.raises(UserError, match=rf"c.pth: [^\n]*{reason}[^\n]*$"):
            load_initial_weights(model, save(content, tmp_path / "c.pth"))
    report = load_initial_weights(small, save(with_heads(deep.state_dict()), tmp_path / "deep.pth"))
    assert report_line(report, "ignored").endswith("24  blocks (24)") and "missing    0" in report
    other = CXRMIM(**SMALL | {"num_heads": 4, "decoder_num_heads": 4, "id_list": (1, 0)})
    report = load_initial_weights(other, save(told, tmp_path / "c.pth"))
    assert "decoder_num_heads 8, this model has 4" in report and "id_list 0 1, this model has 1 0" in report
    check_same_model(heads.config, CXRMIM(**SMALL | {"num_heads": 4, "masking": "block"}).config, "c.pth")
    with pytest.raises(UserError, match="c.pth: of another model .num_heads 4 there, 1 here"):
        check_same_model(heads.config, small.config, "c.pth")


# ---------------------------------------------------------------- a model out of a checkpoint


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": 96, "hog_nbins": 6, "scale_list": (4.0, 1.0), "decoder_depth": 2, "mlp_ratio": 2.0},
        {"embed_dim": 128, "num_heads": 2, "depth": 3, "id_list": (0, 1, 2), "scale_list": (1.0, 0.5, 4.0)},
    ],
)
@pytest.mark.parametrize("stored", ["model_config", "args"])
def test_build_model_gives_the_model_that_was_saved(change, stored, tmp_path):
    """From the stored arguments of the constructor; for a file without them, from shapes and command line."""
    options = SMALL | change
    donor = CXRMIM(**options, masking="random")
    state = donor.state_dict() | {"hog_enc.0.conv.weight": torch.zeros(2, 1, 3, 3)}
    told = {name: list(options[name]) for name in ("id_list", "scale_list")}
    told |= {"num_heads": options["num_heads"], "decoder_num_heads": 8}
    content = {"model": state, stored: donor.config if stored == "model_config" else told}
    model = build_model(CXRMIM, *read_state_dict(save(content, tmp_path / "c.pth")), {"masking": "block"})
    assert model.config == donor.config | {"masking": "block"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_build_model_refuses(vit, tmp_path):
    state, config = CXRMIM(**SMALL).state_dict(), CXRMIM(**SMALL).config
    whole = {"num_heads": 1, "decoder_num_heads": 8, "scale_list": [2.0, 0.5], "id_list": [0, 1]}

    def build(content, **args):
        return build_model(CXRMIM, *read_state_dict(save(content, tmp_path / "c.pth")), args)

    build(state, **whole)
    assert build({"model": state, "model_config": config | {"masking": "gone"}}, masking="block").masking == "block"
    for content, args, reason in [
        (vit, {}, "not a CXR-MIM checkpoint"),
        (state, {k: v for k, v in whole.items() if k != "id_list"}, "does not say.*id_list"),
        (state, whole | {"id_list": [0, 9]}, "arguments don't fit.*id_list"),
        (state, whole | {"scale_list": [2.0, 1.0]}, "don't fit together.*decoder.1.pred"),
        ({"model": state, "model_config": config | {"of_a_newer_program": 1}}, {}, "of_a_newer_program"),
    ]:
        with pytest.raises(UserError, match=f"c.pth[^\n]*{reason}"):
            build(content, **args)
