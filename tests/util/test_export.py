"""Exports: what timm, the Hugging Face layout and the cxr-eval client load is our encoder, exactly."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest
import timm
import torch

import models_cxrmim
from models_cxrmim import CXRMIM
from scripts.export_backbone import main
from util.errors import UserError
from util.export import build_encoder, read_encoder
from util.subjects import subject_marks
from util.weights import read_state_dict

SMALL = dict(
    img_size=64, embed_dim=64, depth=3, num_heads=1, decoder_embed_dim=32, id_list=(0, 2), scale_list=(2.0, 0.5)
)


def shake(model: CXRMIM, seed: int = 0) -> CXRMIM:
    """Move every parameter off its start, norms above all: else a wrong LayerNorm would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        for norm in model.norm:
            norm.weight.add_(0.3 * torch.randn(norm.weight.shape, generator=generator))
    return model.eval()


def save(model: CXRMIM, path: Path, **args) -> Path:
    stored = {"id_list": list(model.id_list)} | args
    content = {"model": model.state_dict(), "model_config": model.config, "args": stored, "epoch": 7}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[CXRMIM, Path]:
    model = shake(CXRMIM(**SMALL))
    return model, save(model, tmp_path_factory.mktemp("small") / "checkpoint-7.pth")


SMALL_TIMM = ("vit_base_patch16_224", dict(img_size=64, embed_dim=64, depth=3, num_heads=1, num_classes=0))


@torch.no_grad()
def encode(model: CXRMIM, img: torch.Tensor) -> list[torch.Tensor]:
    return model.forward_encoder(img, torch.zeros(len(img), model.num_patches))


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_timm_features_equal_the_encoder(size, tmp_path):
    """The name alone, strict loading, all tokens visible: the same features, for each model size."""
    factory = getattr(models_cxrmim, f"cxrmim_vit_{size}_patch16")
    model = factory(id_list=(1, 11), scale_list=(2.0, 0.5), decoder_embed_dim=32).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.uniform_(-0.05, 0.05, generator=generator)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    checkpoint = save(model, tmp_path / "c.pth")
    main([str(checkpoint), str(tmp_path / "b.pth")])
    arguments = dict(num_classes=0, checkpoint_path=str(tmp_path / "b.pth"), weight_init="skip")
    timm_model = timm.create_model(f"vit_{size}_patch16_224", **arguments).eval()
    img = torch.randn(1, 3, 224, 224, generator=generator)
    with torch.no_grad():
        found = timm_model.forward_features(img)
    expected = encode(model, img)[-1]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("fmt, name", [("timm", "b.pth"), ("safetensors", "b.safetensors"), ("hf", "folder")])
@pytest.mark.parametrize("size", [[], ["--img_size", "96"]])
def test_formats_hold_the_same_encoder_and_where_it_comes_from(small, fmt, name, size, tmp_path, capsys):
    model, checkpoint = small
    content = torch.load(checkpoint, weights_only=False) | {"seen": subject_marks(["1", "2"], "mimic")}
    checkpoint, out = tmp_path / "checkpoint-7.pth", tmp_path / name
    torch.save(content, checkpoint)
    assert main([str(checkpoint), str(out), "--format", fmt, *size]) == 0
    call = capsys.readouterr().out.partition("load it with ")[2].splitlines()[0]
    loaded = eval(call, {"timm": timm}).eval()  # the printed call gives the model
    if fmt == "hf":
        config = json.loads((out / "config.json").read_text())
        metadata, scaling = config["cxr_mim"], config["pretrained_cfg"]
        assert scaling["mean"] == pytest.approx((0.485, 0.456, 0.406)) and scaling["num_classes"] == 0
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    else:
        metadata = read_state_dict(out)[1].metadata
    side = loaded.patch_embed.img_size[0]
    assert side == (96 if size else 64)
    if not size:
        img = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert torch.allclose(loaded.forward_features(img), encode(model, img)[-1], atol=1e-5)
    assert metadata["source"] == "checkpoint-7.pth" and metadata["epoch"] == "7" and metadata["tap"] == "1"
    assert metadata["source_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert json.loads(metadata["args"]) == {"id_list": [0, 2]}
    again = read_encoder(out)  # an export is itself a file that the other scripts read
    assert sorted(again.source.seen) == content["seen"]
    assert all(torch.equal(again.state[name], tensor) for name, tensor in loaded.state_dict().items())


def test_tap_chooses_the_layer_norm(small, tmp_path, capsys):
    model, checkpoint = small
    out = tmp_path / "b.pth"
    main([str(checkpoint), str(out), "--tap", "0"])
    state, info = read_state_dict(out)
    assert torch.equal(state["norm.weight"], model.norm[0].weight) and info.metadata["block"] == "0"
    name, arguments = SMALL_TIMM
    timm_model = timm.create_model(name, checkpoint_path=str(out), **arguments).eval()
    img = torch.randn(1, 3, 64, 64)
    advice = capsys.readouterr().out.splitlines()[-1]
    with torch.no_grad():
        found = eval(advice, {"model": timm_model, "x": img})[0]  # [1, D, h, w]
    assert torch.allclose(found.flatten(2).transpose(1, 2), encode(model, img)[0][:, 1:], atol=1e-5)


def test_cxr_eval_client_loads_all_of_it(small, tmp_path, capsys):
    """The client's steps: torch.load, ["model"] by the path's name, drop head*, strict=False into a ViT."""
    model, checkpoint = small
    out = tmp_path / "GazeMIM_vit.pth"
    main([str(checkpoint), str(out), "--format", "cxr-eval"])
    assert "WARNING" not in capsys.readouterr().out

    loaded = torch.load(out, map_location="cpu")["model"]
    loaded = {name: tensor for name, tensor in loaded.items() if not name.startswith("head")}
    name, arguments = SMALL_TIMM
    client = timm.create_model(name, **arguments | {"num_classes": 14})
    message = client.load_state_dict(loaded, strict=False)

    assert message.unexpected_keys == [] and message.missing_keys == ["head.weight", "head.bias"]
    assert torch.equal(client.norm.weight, model.norm[-1].weight)
    img = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(client.eval().forward_features(img), encode(model, img)[-1], atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"num_heads": 4}, {"embed_dim": 192, "depth": 12, "num_heads": 6, "img_size": 32, "id_list": (0, 11)}]
)
def test_heads_that_no_shape_shows_are_exported_and_read_again(change, tmp_path):
    """The checkpoint says them, then the export, and an export of that; the second is a named size with other heads."""
    model = shake(CXRMIM(**SMALL | change))
    names = [save(model, tmp_path / "checkpoint-7.pth"), tmp_path / "b.pth", tmp_path / "c.safetensors"]
    for source, out in itertools.pairwise(names):
        main([str(source), str(out), *(["--format", "safetensors"] if out.suffix != ".pth" else [])])
    img = torch.randn(1, 3, model.config["img_size"], model.config["img_size"])
    for name in names:
        encoder = read_encoder(name)
        assert encoder.num_heads == change["num_heads"] == encoder.timm_args["num_heads"]
        with torch.no_grad():
            assert (build_encoder(encoder).eval().forward_features(img) - encode(model, img)[-1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    "width, name, heads",
    [
        (192, "cxrmim_vit_tiny_patch16", 3),  # of the program, which has one number for it
        (192, "vit_tiny_patch16", None),  # 3, or 12 in several MAE forks
        (768, "mae_vit_base_patch16", 12),
        (768, "my_encoder", None),
    ],
)
def test_heads_are_taken_for_granted_only_where_one_number_is_in_use(width, name, heads, tmp_path):
    state = {
        "cls_token": torch.zeros(1, 1, width),
        "pos_embed": torch.zeros(1, 5, width),
        "norm.weight": torch.zeros(width),
    }
    state |= {"norm.bias": torch.zeros(width), "patch_embed.proj.weight": torch.zeros(width, 3, 16, 16)}
    state |= {f"blocks.{i}.mlp.fc1.weight": torch.zeros(4 * width, 1) for i in range(12)}
    torch.save({"model": state, "args": {"model": name}}, tmp_path / "c.pth")
    if heads is None:
        with pytest.raises(UserError, match=f"does not say.*{name}.*--num_heads"):
            read_encoder(tmp_path / "c.pth")
    else:
        assert read_encoder(tmp_path / "c.pth").num_heads == heads
    assert read_encoder(tmp_path / "c.pth", num_heads=heads or 4).num_heads == (heads or 4)


def test_mean_pooling_head_takes_the_norm(small):
    model = build_encoder(read_encoder(small[1]), 5, global_pool="avg")
    assert torch.equal(model.fc_norm.weight, small[0].norm[-1].weight) and model.head.out_features == 5


def test_bad_input_is_named_and_writes_nothing(small, tmp_path):
    _, checkpoint = small
    state = read_encoder(checkpoint).state
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    torch.save(state, tmp_path / "mute.pth")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for source, out, options, reason in [
        ("resnet.pth", "x.pth", "", "resnet.pth: no whole plain ViT"),
        ("mute.pth", "x.pth", "", r"mute.pth.*heads.*width 64, 3 blocks.*--num_heads"),
        ("mute.pth", "x.pth", "--num_heads 3", "3 attention heads .--num_heads. don't divide its width 64"),
        ("mute.pth", "x.pth", "--num_heads 1 --tap 0", "--tap 0.*single norm"),
        (checkpoint, "x.pth", "--num_heads 2", r"--num_heads 2.*checkpoint-7.pth says that it has 1"),
        (checkpoint, "x.pth", "--tap 2", "--tap 2.*0, 1"),
        (checkpoint, "x.pth", "--img_size 100", "--img_size 100"),
        (checkpoint, "no/x.pth", "", "no/x.pth: no such directory"),
        (checkpoint, "x.pth", "--format safetensors", "x.pth.*safetensors"),
        (checkpoint, "resnet.pth", "--format hf", "resnet.pth: .* is not a directory"),
        ("mute.pth", "mute.pth", "", "mute.pth: is the checkpoint itself"),
    ]:
        with pytest.raises(UserError, match=reason):
            main([str(tmp_path / source), str(tmp_path / out), *options.split()])
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
