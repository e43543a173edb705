"""The trained encoder as a timm Vision Transformer: in memory, and as files that other programs load."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from util.errors import UserError
from util.files import atomic_write, replace_together
from util.foreign_weights import find_encoder
from util.weights import (
    ENCODER_PREFIXES,
    VIT_SIZES,
    WeightsInfo,
    attention_heads,
    numbers,
    read_state_dict,
    resample_pos_embed,
    summarize_keys,
)

FORMATS = ("timm", "safetensors", "cxr-eval", "hf")
CXR_EVAL_NAMES = ("MAE", "LocalMIM", "GazeMIM")


@dataclass(frozen=True)
class Backbone:
    """An encoder under timm's names.

    Attributes:
        state: cls_token, pos_embed, patch_embed.*, blocks.*, norm.*: what a timm ViT without head has.
        timm_name, timm_args: what `timm.create_model` needs to make its model, beside num_classes.
        num_heads, patch_size: of the encoder, whether or not `timm_name` implies them.
        heads_from: where `num_heads` is known from.
        tap: which tap's LayerNorm `norm` is, None if the file had a single norm.
        block: the 0-based block which that tap reads, None if unknown.
        source: the file it comes from.
        prefix: what stood before the encoder's names in it.
        ignored: names in it that are no part of the encoder.
    """

    state: dict[str, Tensor]
    timm_name: str
    timm_args: dict[str, int | float]
    num_heads: int
    patch_size: int
    heads_from: str
    tap: int | None
    block: int | None
    source: WeightsInfo
    prefix: str = ""
    ignored: Sequence[str] = ()

    @property
    def depth(self) -> int:
        return len(numbers(self.state, "blocks"))


def read_backbone(
    path: str | os.PathLike, *, tap: str | int = "last", img_size: int | None = None, num_heads: int | None = None
) -> Backbone:
    """The encoder of any file that `read_state_dict` takes.

    A CXR-MIM checkpoint has one LayerNorm for each tap; `norm` becomes that of the chosen one, by
    default the last. pos_embed is resampled for another `img_size`.

    Args:
        tap: "last" or its place in --id_list, from 0.
        img_size: side of the input in pixels, a multiple of the patch size; None: as trained.
        num_heads: attention heads, for a file that doesn't say how many its encoder has.

    Raises:
        UserError: the file has no complete ViT encoder, no such tap, or its heads can't be known.
    """
    state, info = read_state_dict(path)
    try:
        state, prefix, ignored = find_encoder(state, info.path)
        encoder = {name: tensor for name, tensor in state.items() if name.startswith(ENCODER_PREFIXES)}
        width, _, patch_size, _ = encoder["patch_embed.proj.weight"].shape
        mlp_width = encoder["blocks.0.mlp.fc1.weight"].shape[0]
        encoder["cls_token"]
        if img_size is not None:
            if img_size < patch_size or img_size % patch_size:
                raise UserError(f"--img_size {img_size}: must be a multiple of the patch size {patch_size}")
            grid = img_size // patch_size
            encoder["pos_embed"] = resample_pos_embed(encoder["pos_embed"], (grid, grid))
        side = math.isqrt(encoder["pos_embed"].shape[1] - 1) * patch_size
        norm, index, block = _find_tap(state, info, tap)
        for part in ("weight", "bias"):
            encoder[f"norm.{part}"] = state[f"{norm}.{part}"]
    except KeyError as error:
        raise UserError(
            f"{info.path}: no complete ViT encoder in it, {error} is missing; it has {summarize_keys(state)[:100]}"
        ) from None
    except (ValueError, IndexError) as error:  # tensors of other ranks, or no square grid of patches
        raise UserError(f"{info.path}: not a ViT that takes square images ({error})") from None
    heads, heads_from = attention_heads(state, info, num_heads)
    depth = len(numbers(encoder, "blocks"))
    size, usual_heads, usual_patch = VIT_SIZES.get((width, depth), ("base", None, 16))
    args: dict[str, int | float] = {} if side == 224 else {"img_size": side}
    if usual_heads is None:
        args |= {"embed_dim": width, "depth": depth}
    if heads != usual_heads:
        args["num_heads"] = heads
    if patch_size != usual_patch:
        args["patch_size"] = patch_size
    if mlp_width != 4 * width:
        args["mlp_ratio"] = mlp_width / width
    name = f"vit_{size}_patch{usual_patch}_224"
    return Backbone(encoder, name, args, heads, patch_size, heads_from, index, block, info, prefix, ignored)


def _find_tap(state: Mapping[str, Tensor], info: WeightsInfo, tap: str | int) -> tuple[str, int | None, int | None]:
    """Name of the tap's norm, number of the tap, and its block; None for what the file doesn't have or say."""
    if "norm.weight" in state:
        if tap != "last":
            raise UserError(f"--tap {tap}: {info.path} has a single norm, not one for each tap; use last")
        block = info.metadata.get("block")  # of an export
        return "norm", None, None if block is None else int(block)
    count = len(numbers(state, "norm"))
    if count == 0:
        raise KeyError("norm.weight")
    if tap == "last":
        tap = count - 1
    if not str(tap).isdigit() or int(tap) >= count:
        raise UserError(f"--tap {tap}: {info.path} has taps 0 to {count - 1}, or last")
    id_list = info.config.get("id_list", info.args.get("id_list", ()))
    return f"norm.{int(tap)}", int(tap), int(id_list[int(tap)]) if len(id_list) == count else None


def build_backbone(backbone: Backbone, num_classes: int = 0, **options) -> VisionTransformer:
    """timm's model with the backbone's weights, loaded strictly (a new head stays at its random start).

    Args:
        num_classes: outputs of a new linear head; 0: no head.
        options: further arguments of `timm.create_model`, e.g. drop_path_rate, global_pool.

    Raises:
        UserError: the encoder is not one that timm's ViT computes.
    """
    if num_classes == 0:
        options["weight_init"] = "skip"  # every tensor comes from the file
    try:
        model = timm.create_model(
            backbone.timm_name,
            num_classes=num_classes,
            # As pretraining prepares images; timm's own weights of these names use 0.5 and crop_pct 0.9.
            pretrained_cfg_overlay={"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 1.0},
            **backbone.timm_args,
            **options,
        )
    except (AssertionError, ValueError, RuntimeError) as error:  # sizes or heads that no ViT has
        raise UserError(
            f"{backbone.source.path}: not an encoder of timm's ViT: {' '.join(str(error).split())}"
        ) from None
    own = model.state_dict()
    state = dict(backbone.state)
    if "fc_norm.weight" in own and "norm.weight" not in own:  # where the head takes the mean of the tokens
        state |= {f"fc_norm.{part}": state.pop(f"norm.{part}") for part in ("weight", "bias")}
    state |= {name: own[name] for name in own if name.startswith("head.")}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{backbone.source.path}: not an encoder that timm's ViT computes: {message}") from None
    return model


def export_backbone(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fmt: str = "timm",
    tap: str | int = "last",
    img_size: int | None = None,
    num_heads: int | None = None,
) -> Backbone:
    """Write the encoder of a checkpoint for other programs; whole or not at all.

    Formats: "timm" is a torch file with the tensors under "state_dict", which
    `timm.create_model(name, num_classes=0, checkpoint_path=...)` loads strictly; "safetensors" is the
    same for safetensors; "cxr-eval" has them under "model", as that client reads them; "hf" makes the
    folder that `timm.create_model("local-dir:OUT")` and `push_to_hf_hub` work with. All carry metadata: the
    source's name, SHA-256, epoch and arguments, heads and patch size, the tap, and the normalisation of
    the input.

    Raises:
        UserError: bad checkpoint, tap or size, or the place can't be written to.
    """
    out = Path(out)
    if out.exists() and Path(checkpoint).exists() and out.samefile(checkpoint):
        raise UserError(f"{out}: is the checkpoint itself, which would be lost; choose another file to write")
    backbone = read_backbone(checkpoint, tap=tap, img_size=img_size, num_heads=num_heads)
    model = build_backbone(backbone)  # proves that timm loads it
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} into")
    if (fmt == "hf") != out.is_dir() and out.exists():
        raise UserError(f"{out}: is a {'folder' if out.is_dir() else 'file'}; format {fmt} writes the other")
    if fmt == "safetensors" and out.suffix != ".safetensors":
        raise UserError(f"{out}: timm knows this format by its name; choose one that ends in .safetensors")
    if fmt != "safetensors" and out.suffix == ".safetensors":
        raise UserError(f"{out}: ends in .safetensors, but --format is {fmt}")
    metadata = describe(backbone)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if fmt == "hf":
        config = _hf_config(model, backbone, metadata)
        out.mkdir(exist_ok=True)
        with replace_together(out, first="config.json") as fresh:
            _write(fresh / "config.json", config)
            _write(fresh / "model.safetensors", safetensors.torch.save(state, {"format": "pt"} | metadata))
    elif fmt == "safetensors":
        _write(out, safetensors.torch.save(state, {"format": "pt"} | metadata))
    else:
        buffer = io.BytesIO()
        torch.save({"model" if fmt == "cxr-eval" else "state_dict": state, "metadata": metadata}, buffer)
        _write(out, buffer.getvalue())
    return backbone


def describe(backbone: Backbone) -> dict[str, str]:
    """Metadata of an export, as text (all that safetensors can hold)."""
    info = backbone.source
    described = {
        "source": info.path.name,
        "source_sha256": hashlib.sha256(info.path.read_bytes()).hexdigest(),
        "source_kind": info.kind,
        "timm_model": backbone.timm_name,
        "timm_args": json.dumps(backbone.timm_args),
        "num_heads": str(backbone.num_heads),
        "patch_size": str(backbone.patch_size),
        "mean": json.dumps(IMAGENET_DEFAULT_MEAN),
        "std": json.dumps(IMAGENET_DEFAULT_STD),
        "args": json.dumps(info.args, default=str),
    }
    if info.seen:
        described["seen"] = json.dumps(sorted(info.seen))
    for name, value in (("epoch", info.epoch), ("tap", backbone.tap), ("block", backbone.block)):
        if value is not None:
            described[name] = str(value)
    return described


def _hf_config(model: VisionTransformer, backbone: Backbone, metadata: Mapping[str, str]) -> bytes:
    """config.json as timm writes it, with where the weights come from added."""
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, model_args=dict(backbone.timm_args), safe_serialization=True)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"].update(tag="cxr_mim", custom_load=False)
    for key in ("origin_url", "paper_ids", "license", "notes"):  # those of timm's own weights
        config["pretrained_cfg"].pop(key, None)
    config["cxr_mim"] = {key: value for key, value in metadata.items() if not key.startswith(("timm_", "seen"))}
    return json.dumps(config, indent=2).encode()


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def usage(backbone: Backbone, out: str | os.PathLike, fmt: str) -> str:
    """Lines for the user: what was written, and how to load it."""
    extra = "".join(f", {name}={value}" for name, value in backbone.timm_args.items())
    call = f'timm.create_model("{backbone.timm_name}", num_classes=0{extra}, checkpoint_path="{out}")'
    if fmt == "hf":
        call = f'timm.create_model("local-dir:{out}", pretrained=True)'
    lines = [
        f"wrote {out}: {len(backbone.state)} tensors, {summarize_keys(backbone.state)}",
        f"attention heads: {backbone.num_heads} ({backbone.heads_from})",
    ]
    if fmt == "cxr-eval":
        lines.append(
            f"cxr-eval reads it where its path contains {', '.join(CXR_EVAL_NAMES[:-1])} or {CXR_EVAL_NAMES[-1]}"
        )
        if not any(name in str(Path(out).resolve()) for name in CXR_EVAL_NAMES):
            lines.append(f"WARNING: {out} contains none of these names: cxr-eval would silently load nothing from it")
    else:
        lines.append(f"load it with {call}")
    if backbone.block is not None and backbone.block != backbone.depth - 1:
        lines.append(
            f"note: norm belongs to the output of block {backbone.block}, not of the last; its features are\n"
            f"model.forward_intermediates(x, indices=[{backbone.block}], norm=True, intermediates_only=True)"
        )
    return "\n".join(lines)
