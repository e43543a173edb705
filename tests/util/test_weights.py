"""Weights files of several origins: read safely, matched by name, reported, refused with a reason."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from made_checkpoints import make_state
from timm.layers import resample_abs_pos_embed

from models_cxrmim import CXRMIM, cxrmim_vit_base_patch16, cxrmim_vit_tiny_patch16
from util.architecture import build_model
from util.checkpoint import save_checkpoint
from util.errors import UserError
from util.weights import check_same_model, load_initial_weights, read_state_dict, summarize_keys

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def vit() -> dict[str, torch.Tensor]:
    """A timm ViT-Ti state dict of random weights, with head, as timm's own file has it."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    state = model.state_dict()
    return {name: torch.randn(tensor.shape) * 0.02 for name, tensor in state.items()}


def save(content, path: Path) -> Path:
    torch.save(content, path)
    return path


def with_heads(state, heads: int) -> dict:
    """The content of a file that says how many attention heads its encoder has."""
    return {"model": state, "metadata": {"num_heads": str(heads)}}


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch /tmp/should_never_exist",)


# ---------------------------------------------------------------- reading


def test_plain_and_wrapped_files_give_the_same_tensors(vit, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    safetensors.torch.save_file(vit, folder / "model.safetensors", metadata={"source": "here"})
    files = [
        save(vit, tmp_path / "plain.pth"),
        save({"model": vit, "epoch": 3}, tmp_path / "model.pth"),
        save({"state_dict": {f"module.{k}": v for k, v in vit.items()}}, tmp_path / "ddp.pth"),
        folder,
        folder / "model.safetensors",
    ]
    for file in files:
        state, info = read_state_dict(file)
        assert state.keys() == vit.keys()
        assert all(torch.equal(state[name], vit[name]) for name in vit)
        assert info.kind == "vit"
    assert read_state_dict(files[1])[1].epoch == 3
    assert read_state_dict(folder)[1].metadata == {"source": "here"}


def test_namespace_and_numpy_scalars_under_args_are_read(vit, tmp_path):
    args = argparse.Namespace(model="cxrmim_vit_tiny_patch16", id_list=[1, 3], lr=np.float64(0.25), seed=np.int64(7))
    content = {"model": vit, "args": args, "epoch": np.int64(4), "scaler": {"scale": np.float32(2)}}
    _, info = read_state_dict(save(content, tmp_path / "published.pth"))
    assert info.args["model"] == "cxrmim_vit_tiny_patch16"
    assert info.args["lr"] == 0.25 and info.args["seed"] == 7 and info.epoch == 4


def test_scalars_pickled_by_numpy_1_are_read(vit, tmp_path):
    """NumPy 1 names its scalar constructor numpy.core.multiarray.scalar."""
    path = save({"model": {"blocks.0.x": torch.zeros(1)}, "epoch": np.int64(4)}, tmp_path / "new.pth")
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(item.filename, data)
    assert read_state_dict(old)[1].epoch == 4


def test_file_that_would_run_code_is_refused_unrun(vit, tmp_path):
    path = save({"model": vit, "args": RunsCode()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: refused.*system") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/should_never_exist").exists()


def test_namespace_cannot_smuggle_another_class(vit, tmp_path):
    path = save({"model": vit, "args": argparse.Namespace(hook=RunsCode())}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="refused"):
        read_state_dict(path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_truncated_file(vit, tmp_path, name, keep):
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(vit, path)
    else:
        safetensors.torch.save_file(vit, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=name) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content, reason",
    [([1, 2], "holds a list"), ({}, "empty"), ({"model": {}}, "empty"), ({"epoch": 3}, "'epoch' is no tensor")],
)
def test_file_without_state_dict(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        read_state_dict(save(content, tmp_path / "x.pth"))


def test_other_files(tmp_path):
    (tmp_path / "text.pth").write_text("hello\n")
    (tmp_path / "image.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    for name, reason in [
        ("text.pth", "not a readable"),
        ("image.pth", "not a readable"),
        ("no.pth", "no such"),
        ("", "folder without"),
    ]:
        with pytest.raises(UserError, match=reason):
            read_state_dict(tmp_path / name)


def test_summarize_keys():
    keys = ["cls_token", "blocks.0.norm1.weight", "blocks.1.norm1.weight", "blocks.3.mlp.fc1.bias", "norm.weight"]
    assert summarize_keys(keys) == "cls_token, blocks.0-1,3, norm"
    assert summarize_keys([]) == ""


# ---------------------------------------------------------------- into a model

SMALL = dict(
    img_size=64, embed_dim=64, depth=2, num_heads=1, decoder_embed_dim=32, id_list=(0, 1), scale_list=(2.0, 0.5)
)


def is_encoder(name: str) -> bool:
    return name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks."))


def test_timm_file_fills_the_encoder(vit, tmp_path):
    model = cxrmim_vit_tiny_patch16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, save(with_heads(vit, 3), tmp_path / "vit.pth"))
    after = model.state_dict()
    assert set(report.matched) == {name for name in vit if is_encoder(name)}
    assert set(report.ignored) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    assert set(report.missing) == {name for name in after if not is_encoder(name)}
    for name in after:
        expected = vit[name] if is_encoder(name) else before[name]
        assert torch.equal(after[name], expected), name
    assert model.pos_embed.requires_grad is False
    text = str(report)
    assert len(text.splitlines()) <= 5
    assert "blocks.0-11" in text and "148" in text and "head" in text


def test_mae_file_fills_the_encoder_and_its_decoder_is_ignored(tmp_path):
    donor, model = CXRMIM(**SMALL), CXRMIM(**SMALL)
    state = {name: tensor for name, tensor in donor.state_dict().items() if is_encoder(name)}
    mae = state | {
        "norm.weight": torch.ones(64),
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_pos_embed": torch.zeros(1, 17, 16),
        "decoder_blocks.0.norm1.weight": torch.ones(16),
        "decoder_pred.weight": torch.zeros(768, 16),
    }
    path = save(with_heads(mae, 1) | {"args": argparse.Namespace(lr=np.float64(1))}, tmp_path / "mae.pth")
    assert read_state_dict(path)[1].kind == "mae"
    report = load_initial_weights(model, path)
    assert set(report.matched) == set(state)
    assert set(report.ignored) == set(mae) - set(state)


def test_published_checkpoint_with_hog_enc(tmp_path):
    """All 248 published names and shapes (ViT-B); those of hog_enc are ignored, the rest all match."""
    shapes = json.loads((GOLDEN / "published_state_dict.json").read_text())
    state = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}
    assert len(state) == 248
    path = save({"model": state, "args": argparse.Namespace(gaze_weighted=True), "epoch": 399}, tmp_path / "c.pth")
    model = cxrmim_vit_base_patch16()
    report = load_initial_weights(model, path)
    assert report.missing == []
    assert report.ignored == [f"hog_enc.{k}.conv.weight" for k in range(4)]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_other_input_size_resamples_pos_embed_only(tmp_path):
    donor = CXRMIM(**SMALL)
    path = save(with_heads(donor.state_dict(), 1), tmp_path / "c.pth")
    model = CXRMIM(**SMALL | {"img_size": 96})
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_initial_weights(model, path)
    expected = resample_abs_pos_embed(donor.pos_embed, [6, 6], num_prefix_tokens=1)
    assert model.pos_embed.shape == (1, 37, 64)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, :1], donor.pos_embed[:, :1])
    assert report.ignored == report.missing == ["decoder.0.pos_embed", "decoder.1.pos_embed"]
    for name in report.missing:
        assert torch.equal(model.state_dict()[name], own[name])
    assert "16 patches to 6 x 6" in str(report)


def test_other_model_size_is_an_error_that_names_it(vit, tmp_path):
    model = CXRMIM(**SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=r"vit.pth: cls_token has shape 1x1x192, the model needs 1x1x64.*--model"):
        load_initial_weights(model, save(vit, tmp_path / "vit.pth"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_other_target_size_is_an_error_that_names_the_flag(tmp_path):
    path = save({"model": CXRMIM(**SMALL, hog_nbins=6).state_dict()}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"decoder.0.pred.1.weight has shape 18x16x1x1.*--hog_nbins"):
        load_initial_weights(CXRMIM(**SMALL), path)


def test_missing_parts_are_an_error_and_further_ones_are_reported(tmp_path):
    deep, shallow = CXRMIM(**SMALL | {"depth": 4}), CXRMIM(**SMALL)
    with pytest.raises(UserError, match=r"lacks blocks.2-3"):
        load_initial_weights(deep, save(shallow.state_dict(), tmp_path / "shallow.pth"))
    for part in ("patch_embed", "cls_token"):
        state = {name: tensor for name, tensor in shallow.state_dict().items() if not name.startswith(part)}
        with pytest.raises(UserError, match=f"lacks {part}"):
            load_initial_weights(shallow, save(state, tmp_path / "without.pth"))
    report = load_initial_weights(shallow, save(with_heads(deep.state_dict(), 1), tmp_path / "deep.pth"))
    assert summarize_keys(report.ignored) == "blocks.2-3" and report.missing == []


def test_file_that_matches_no_block(tmp_path):
    path = save({"conv1.weight": torch.zeros(1), "layer1.0.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet.pth: matches no transformer block.*conv1, layer1.0"):
        load_initial_weights(CXRMIM(**SMALL), path)


# ---------------------------------------------------------------- a model out of a checkpoint


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"img_size": 96, "hog_nbins": 6},
        {"scale_list": (4.0, 1.0), "decoder_depth": 2, "mlp_ratio": 2.0},
        {"embed_dim": 128, "num_heads": 2, "depth": 3, "id_list": (0, 1, 2), "scale_list": (1.0, 0.5, 4.0)},
    ],
)
@pytest.mark.parametrize("stored", ["model_config", "args"])
def test_build_model_gives_the_model_that_was_saved(change, stored, tmp_path):
    """From the stored arguments of the constructor; for a file without them, from shapes and command line."""
    options = SMALL | change
    donor = CXRMIM(**options, masking="random").eval()
    state = donor.state_dict() | {"hog_enc.0.conv.weight": torch.zeros(2, 1, 3, 3)}
    told = {name: list(options[name]) for name in ("id_list", "scale_list")}
    told |= {"num_heads": options["num_heads"], "decoder_num_heads": 8}
    content = {"model": state, stored: donor.config if stored == "model_config" else told}
    path = save(content, tmp_path / "c.pth")
    model = build_model(CXRMIM, *read_state_dict(path), {"masking": "block"})
    assert model.config == donor.config | {"masking": "block"}
    img = torch.randn(1, 3, options["img_size"], options["img_size"])
    mask = torch.zeros(1, model.num_patches)
    mask[:, ::2] = 1
    with torch.no_grad():
        found, expected = (m.forward_decoder(m.forward_encoder(img, mask), mask) for m in (model, donor))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.hog_targets(img), donor.hog_targets(img), strict=True):
        assert torch.equal(a, b)


def test_build_model_refuses(vit, tmp_path):
    def build(content, **args):
        return build_model(CXRMIM, *read_state_dict(save(content, tmp_path / "c.pth")), args)

    with pytest.raises(UserError, match="not a CXR-MIM checkpoint"):
        build(vit)
    state, config = CXRMIM(**SMALL).state_dict(), CXRMIM(**SMALL).config
    whole = {"num_heads": 1, "decoder_num_heads": 8, "scale_list": [2.0, 0.5], "id_list": [0, 1]}
    build(state, **whole)
    for lacking in whole:
        with pytest.raises(UserError, match=f"c.pth.*does not say.*--{lacking}"):
            build(state, **{key: value for key, value in whole.items() if key != lacking})
    for wrong, reason in [
        ({"id_list": [0, 9]}, "arguments don't fit.*id_list"),
        ({"scale_list": [2.0, 3.0]}, r"scale_list \[3.0\] not among"),
        ({"scale_list": [2.0, 1.0]}, "don't fit together.*decoder.1.pred"),
        ({"num_heads": 3}, "--num_heads 3"),
    ]:
        with pytest.raises(UserError, match=reason):
            build(state, **whole | wrong)
    for wrong, reason in [
        ({"masking": "gone"}, "masking 'gone' is not one of attention, random, block"),
        ({"of_a_newer_program": 1}, "of_a_newer_program"),
        ({"num_heads": "many"}, "don't fit"),
    ]:
        with pytest.raises(UserError, match=reason):
            build({"model": state, "model_config": config | wrong})
    assert build({"model": state, "model_config": config | {"masking": "gone"}}, masking="block").masking == "block"
    del state["cls_token"]
    with pytest.raises(UserError, match="cls_token"):
        build(state, **whole)


def test_config_rebuilds_the_model_and_holds_every_argument():
    options = SMALL | {"id_list": [1, 0], "scale_list": [1, 4], "gaze_weighted": True}
    config = CXRMIM(**options).config
    assert set(config) == set(inspect.signature(CXRMIM.__init__).parameters) - {"self"}
    assert config["scale_list"] == (1.0, 4.0) and config["gaze_weighted"] is True
    assert CXRMIM(**config).config == config


def test_weights_of_an_encoder_with_unknown_heads_are_refused(vit, tmp_path):
    """No tensor's shape tells the heads, and tiny ViTs with 3 and with 12 are in use."""
    with pytest.raises(UserError, match="vit.pth: the file does not say how many attention heads"):
        load_initial_weights(cxrmim_vit_tiny_patch16(), save(vit, tmp_path / "vit.pth"))


def test_an_encoder_with_tensors_that_we_do_not_compute_is_refused(tmp_path):
    state = {name: t for name, t in CXRMIM(**SMALL).state_dict().items() if is_encoder(name)}
    path = save(with_heads(state | {"register_tokens": torch.zeros(1, 4, 64)}, 1), tmp_path / "c.pth")
    with pytest.raises(UserError, match="c.pth: register_tokens may belong to an encoder that is no plain ViT"):
        load_initial_weights(CXRMIM(**SMALL), path)


def test_weights_of_an_encoder_with_other_heads_are_refused(tmp_path):
    donor = CXRMIM(**SMALL | {"num_heads": 4})
    path = save({"model": donor.state_dict(), "model_config": donor.config}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="c.pth: its encoder has 4 attention heads, the model 1"):
        load_initial_weights(CXRMIM(**SMALL), path)
    other = CXRMIM(**SMALL | {"num_heads": 4, "decoder_num_heads": 4, "id_list": (1, 0)})
    report = str(load_initial_weights(other, path))
    assert "decoder_num_heads 8, this model has 4" in report and "id_list 0 1, this model has 1 0" in report
    for change, differs in (({"num_heads": 2}, "num_heads 4 there, 2 here"), ({"masking": "block"}, "")):
        own = CXRMIM(**SMALL | {"num_heads": 4} | change).config
        if differs:
            with pytest.raises(UserError, match=differs):
                check_same_model(donor.config, own, path)
        else:
            check_same_model(donor.config, own, path)


@pytest.mark.parametrize("content", [b"junk", b"hello world", b"(dp0", b"\x80\x02}q", b"PK\x03\x04..", b"\x80\x05\x95"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_weights_file_at_all_is_one_line(tmp_path, content):
    path = tmp_path / "junk.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match="not a readable weights file"):
        read_state_dict(path)


@pytest.mark.parametrize("signed", [False, True])
def test_every_flipped_bit_that_changes_a_number_is_found(signed, tmp_path):
    """torch.load checks neither the CRC-32 of its archive's records nor this program's digest."""
    weights = {f"blocks.{i}.norm1.weight": torch.randn(64) for i in range(3)}
    path = tmp_path / "w.pth"
    if signed:
        save_checkpoint(make_state() | {"model": weights}, path)
    else:
        torch.save({"model": weights}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    inside = whole.index(weights["blocks.1.norm1.weight"].numpy().tobytes())
    for at in [*range(inside, inside + 256, 16), *rng.integers(0, len(whole), 60).tolist()]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            state, _ = read_state_dict(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:  # in bytes that nobody reads
            assert not signed and at not in range(inside, inside + 256)
            assert state.keys() == weights.keys() and all(torch.equal(state[k], weights[k]) for k in weights)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="w.pth"):
            read_state_dict(path)
    path.write_bytes(whole)
    read_state_dict(path)


def test_archive_that_was_saved_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state_dict(path)[0]["blocks.0.norm1.weight"].sum() == 3


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(3, dtype=torch.int32), "of type torch.int32"),
        (torch.ones(3, dtype=torch.complex64), "of type torch.complex64"),
        (torch.ones(3).to_sparse(), "sparse"),
        (torch.ones(3, device="meta"), "without its numbers"),
        (torch.tensor([0, float("inf")]), "1 values that are not finite"),
    ],
)
def test_tensors_that_are_no_weights_are_refused(value, reason, tmp_path):
    path = save(
        {"model": {"bn.num_batches_tracked": torch.tensor(3), "blocks.0.norm1.weight": value}}, tmp_path / "w.pth"
    )
    with pytest.raises(UserError, match=rf"w.pth: blocks.0.norm1.weight (is|has) .*{reason}"):
        read_state_dict(path)


def test_metadata_of_another_program_may_be_anything(tmp_path):
    for metadata in ("by somebody", 3, [1], None):
        path = save({"model": {"blocks.0.norm1.weight": torch.ones(3)}, "metadata": metadata}, tmp_path / "w.pth")
        assert read_state_dict(path)[1].metadata == {}
