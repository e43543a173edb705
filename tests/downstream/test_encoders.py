"""Encoders of other programs: each gives its own library's features, or is refused in a line that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models import register_model
from torch import nn

from downstream.driver import RECIPES
from downstream.encoders import Candidate, describe, input_size, pooled, read_candidates
from downstream.evaluate import read_tuned
from downstream.finetune import build, write_tuned
from util.errors import UserError

TOKENS = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def register(base: str, **smaller) -> str:
    """A model of timm's, with its filter and configuration, but small; its name."""

    def entry(pretrained: bool = False, **options) -> nn.Module:
        return timm.create_model(base, pretrained=pretrained, **smaller | options)

    entry.__name__ = f"small_{base}"
    register_model(entry)
    return entry.__name__


def shaken(model: nn.Module) -> nn.Module:
    """A model whose norms, scales and tokens are not at their start, so that none can be missed unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def open_clip(model: nn.Module) -> dict[str, torch.Tensor]:
    """A CLIP's tensors under open_clip's names, with some of the text's."""
    pairs = [("blocks.", "transformer.resblocks."), ("norm1", "ln_1"), ("norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc")]
    pairs += [("mlp.fc2", "mlp.c_proj"), ("attn.qkv.", "attn.in_proj_"), ("attn.proj", "attn.out_proj")]
    pairs += [("patch_embed.proj", "conv1"), ("norm_pre", "ln_pre")]
    state = {"token_embedding.weight": torch.zeros(3, 4), "logit_scale": torch.zeros(())}
    for name, tensor in model.state_dict().items():
        for timms, theirs in pairs:
            name = name.replace(timms, theirs)
        name = {"cls_token": "class_embedding", "pos_embed": "positional_embedding"}.get(name, name)
        name = name.replace("norm.", "ln_post.") if name.startswith("norm.") else name
        state[f"visual.{name}"] = tensor.squeeze() if name.endswith("embedding") else tensor
    return state


DINO = register("vit_small_patch14_dinov2", **TOKENS)
REGISTERS = register("vit_small_patch14_reg4_dinov2", **TOKENS)
PLAIN = register("vit_base_patch16_224", **TOKENS)
CLIP = register("vit_base_patch16_clip_224", **TOKENS)
# kind -> (timm's model, options of the file's own model, which feature its own library gives); two of other libraries.
KINDS: dict[str, tuple[str, dict, str]] = {
    "DINOv2": (DINO, {}, "cls"),
    "DINOv2 with registers": (REGISTERS, {}, "cls"),
    "EVA-02": (register("eva02_tiny_patch14_224", **TOKENS), {}, "mean of patches"),
    "BEiT": (register("beit_base_patch16_224", **TOKENS), {}, "mean of patches"),
    "DeiT distilled": (register("deit_tiny_distilled_patch16_224", **TOKENS), {}, "both tokens"),
    "ViT without class token": (register("vit_base_patch16_siglip_gap_224", **TOKENS), {}, "mean of patches"),
    "ViT with fc_norm": (PLAIN, {"global_pool": "avg"}, "mean of patches"),
    "timm's ResNet": ("test_resnet", {}, "pooled"),
    "timm's DenseNet": (register("densenet121", growth_rate=4, block_config=(1, 1, 1, 1)), {}, "pooled"),
    "torchvision's ResNet": ("resnet18", {}, "pooled"),
    "open_clip's ViT": (CLIP, {}, "cls"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str], tuple[nn.Module, Path]]:
    """The model of a kind, and its file with a head."""
    folder, kept = tmp_path_factory.mktemp("kinds"), {}

    def make(kind: str) -> tuple[nn.Module, Path]:
        if kind not in kept:
            torch.manual_seed(0)
            name, options, _ = KINDS[kind]
            if kind.startswith("torchvision"):
                model = shaken(torchvision.models.resnet18())
                state, model.fc = model.state_dict(), nn.Identity()
            else:
                sized = {"img_size": 56} if "dinov2" in name else {}
                model = shaken(timm.create_model(name, num_classes=0, **sized, **options))
                state = open_clip(model) if kind.startswith("open_clip") else model.state_dict()
                state |= {"head.weight": torch.zeros(5, 3), "head.bias": torch.zeros(5)} if "clip" not in name else {}
            path = folder / f"{len(kept)}.pth"
            torch.save({"state_dict": state}, path)
            kept[kind] = model, path
        return kept[kind]

    return make


def candidate_of(kind: str, path: Path) -> Candidate:
    name = KINDS[kind][0]
    return read_candidates([f"x={path}@{name}"], imagenet="", img_size=56 if "dinov2" in name else None)[0]


@torch.no_grad()
def features(candidate: Candidate, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model = candidate.build().eval()
    return pooled(model, model.forward_features(x))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_are_those_of_the_files_own_library(kind, made):
    model, path = made(kind)
    candidate = candidate_of(kind, path)
    built = candidate.build().eval()
    x = torch.randn(2, 3, *input_size(built))
    found, own = features(candidate, x), KINDS[kind][2]
    expected = {own: model(x)}
    if own in ("cls", "both tokens"):  # the patches' tokens are the last of all
        tokens, n_patches = model.forward_features(x), (x.shape[-1] // model.patch_embed.patch_size[0]) ** 2
        expected = {
            "cls": model(x) if own == "cls" else tokens[:, 0],
            "mean of patches": tokens[:, -n_patches:].mean(1),
        }
    for name, feature in expected.items():
        assert feature.std() > 0.01 and (found[name] - feature).abs().max() < 1e-5, name
    told = describe(candidate)
    assert f"input {input_size(built)[0]} px, mean " in told and "missing    0" in told
    assert ("head (2)" in told) == (kind not in ("torchvision's ResNet", "open_clip's ViT"))


@pytest.mark.parametrize(
    ("kind", "model", "reason"),
    [
        ("torchvision's ViT", PLAIN, "it lacks .* tensors .*name the model"),
        ("DINOv2", "nothing", "timm has no model nothing"),
        ("EVA-02", "", "FILE@TIMM_MODEL"),
        ("DeiT distilled", "", "FILE@TIMM_MODEL"),
        ("torchvision's ResNet", "", "FILE@TIMM_MODEL"),
        ("open_clip's ViT", "", "FILE@TIMM_MODEL"),
        ("DINOv2 with registers", DINO, "not the weights of timm's small_vit"),
        ("DINOv2", REGISTERS, "not the weights of timm's small_vit"),
        ("DINOv2", PLAIN, "no tensor has the size of patch_embed.proj.weight"),  # timm would resample the patches
        ("timm's ResNet", "resnet18", "not the weights of timm's resnet18"),
        ("ViT with fc_norm", "vit_tiny_patch16_224", "not the weights of timm's vit_tiny"),
    ],
)
def test_another_models_name_is_refused_in_one_line(kind, model, reason, made, tmp_path):
    if kind == "torchvision's ViT":
        path = tmp_path / "torchvision.pth"
        small = dict(image_size=224, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128)
        torch.save(torchvision.models.VisionTransformer(**small).state_dict(), path)
    else:
        path = made(kind)[1]
    with pytest.raises(UserError, match=rf"\.pth: [^\n]*{reason}[^\n]*$"):
        read_candidates([f"x={path}@{model}".rstrip("@")], imagenet="", img_size=56 if "dino" in model else None)


def test_a_file_that_says_other_heads_than_timms_model_is_refused(made, tmp_path):
    state = made("DINOv2")[0].state_dict()
    torch.save({"model": state, "metadata": {"num_heads": "4"}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth: has 4 attention heads, timm's small_vit_small_patch14_dinov2 2"):
        read_candidates([f"{tmp_path / 'x.pth'}@{DINO}"], imagenet="", img_size=56)


@pytest.mark.parametrize(("kind", "extra"), [("DINOv2", "reg_token"), ("timm's ResNet", "layer1.0.se.fc1.weight")])
def test_what_a_file_has_beyond_its_model_must_be_known(kind, extra, made, tmp_path):
    torch.save(made(kind)[0].state_dict() | {extra: torch.zeros(32)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"x.pth: {extra} may belong to an encoder that is not timm's"):
        candidate_of(kind, tmp_path / "x.pth")


def test_flags_go_before_the_configuration(made):
    clip = candidate_of("open_clip's ViT", made("open_clip's ViT")[1])
    assert clip.normalisation(None)[0] == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert clip.normalisation("imagenet")[0] == (0.485, 0.456, 0.406)
    path = made("timm's ResNet")[1]
    (small,) = read_candidates([f"{path}@test_resnet"], imagenet="", img_size=64)
    assert input_size(small.build()) == (64, 64)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        ("DINOv2 with registers", "layer_decay"),
        ("BEiT", "layer_decay"),
        ("DeiT distilled", "published"),
        ("timm's ResNet", "layer_decay"),
    ],
)
def test_a_fine_tuned_model_is_read_again(kind, recipe, made, tmp_path):
    candidate = candidate_of(kind, made(kind)[1])
    model = build(candidate, RECIPES[recipe], 2, 0).eval()
    facts = {"mean": [0.5] * 3, "std": [0.5] * 3, "reading": {}, "fraction": 1, "seed": 0, "task": "multilabel"}
    write_tuned(tmp_path / "best.pth", model.state_dict(), candidate, model, labels=["a", "b"], **facts)
    again = read_tuned(tmp_path / "best.pth").model.eval()
    x = torch.randn(2, 3, *input_size(again))
    with torch.no_grad():
        assert torch.equal(again(x), model(x)) and again(x).shape == (2, 2)


# ---------------------------------------------------------------- folders of transformers

FOLDERS = ["vit", "dinov2", "dinov2_with_registers", "clip_vision_model", "clip", "vit_mae"]


def transformers_model(kind: str):
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    small |= dict(image_size=32, patch_size=8)
    if kind == "clip":
        config = transformers.CLIPConfig(vision_config=small, text_config={**small, "vocab_size": 99})
    else:
        config = transformers.AutoConfig.for_model(kind, **small)
    torch.manual_seed(0)
    return shaken(transformers.AutoModel.from_config(config))


@pytest.mark.parametrize("kind", FOLDERS)
@torch.no_grad()
def test_a_folder_of_transformers_gives_its_features(kind, tmp_path):
    model = transformers_model(kind)
    model.save_pretrained(tmp_path)
    (candidate,) = read_candidates([f"x={tmp_path}"], imagenet="")
    x = torch.randn(2, 3, 32, 32)
    found = features(candidate, x)
    vision = getattr(model, "vision_model", model)
    if kind == "vit_mae":
        vision.config.mask_ratio = 0.0
    expected = vision(pixel_values=x).last_hidden_state
    before = 5 if kind == "dinov2_with_registers" else 1
    assert (found["cls"] - expected[:, 0]).abs().max() < 1e-5
    assert (found["mean of patches"] - expected[:, before:].mean(1)).abs().max() < 1e-5
    assert "of transformers; input 32 px, mean 0.5, 0.5, 0.5" in describe(candidate)


@torch.no_grad()
def test_a_folder_at_another_size_and_with_its_own_scaling(tmp_path):
    model = transformers_model("vit")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}')
    (candidate,) = read_candidates([str(tmp_path)], imagenet="", img_size=64)
    (usual,) = read_candidates([str(tmp_path)], imagenet="")
    assert candidate.architecture != usual.architecture  # whose kept features are others
    assert candidate.normalisation(None)[0] == [0.1, 0.2, 0.3] and input_size(candidate.build()) == (64, 64)
    x = torch.randn(1, 3, 64, 64)
    expected = model(pixel_values=x, interpolate_pos_encoding=True).last_hidden_state
    assert (features(candidate, x)["mean of patches"] - expected[:, 1:].mean(1)).abs().max() < 1e-5


def test_a_folder_that_lacks_a_tensor_is_refused(tmp_path):
    model = transformers_model("vit")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layernorm.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks 1 tensors of its model, such as layernorm.weight"):
        read_candidates([f"x={tmp_path}"], imagenet="")
