"""Models out of weights files, timm's and CXRMIM, and the trained encoder as files that other programs load."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import save_for_hf
from torch import Tensor, nn

from util.errors import UserError
from util.files import atomic_write, check_folder_place
from util.weights import (
    ENCODER,
    FREE_CONFIG,
    OTHER_MODEL,
    PATCHES,
    VIT_SIZES,
    WeightsInfo,
    attention_heads,
    find_vit,
    is_behind,
    numbers,
    read_state_dict,
    resample_pos_embed,
    summarize_keys,
    unknown_names,
)

FORMATS = ("timm", "safetensors", "cxr-eval", "hf")
CXR_EVAL_NAMES = ("MAE", "LocalMIM", "GazeMIM")
FOLDER = Path(__file__).resolve().parents[1] / "preTrain"
# What timm, in building and loading a model, raises for names, sizes and tensors that don't fit it.
MISFITS = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError, IndexError)


@dataclass(frozen=True)
class Encoder:
    """An encoder of timm's, as a file has it.

    Attributes:
        state: all tensors of timm's model without a head, under its names.
        timm_name, timm_args: what `timm.create_model` needs to make its model, beside num_classes.
        source: the file it comes from; None for random weights.
        ignored: names in it that are no part of the encoder.
        num_heads, heads_from: attention heads of a plain ViT, and where they are known from.
        tap: which tap's LayerNorm `norm` is, None if the file had a single norm.
        block: the 0-based block which that tap reads, None if unknown.
        prefix: what stood before the encoder's names in the file.
        scaling: mean and std of the input by timm's configuration, if the user named the model.
    """

    state: dict[str, Tensor]
    timm_name: str
    timm_args: dict[str, Any]
    source: WeightsInfo | None = None
    ignored: Sequence[str] = ()
    num_heads: int | None = None
    heads_from: str = ""
    tap: int | None = None
    block: int | None = None
    prefix: str = ""
    scaling: tuple[Sequence[float], Sequence[float]] | None = None

    @property
    def depth(self) -> int:
        return len(numbers(self.state, "blocks"))


def read_encoder(
    path: str | os.PathLike,
    timm_model: str | None = None,
    *,
    tap: str | int = "last",
    img_size: int | None = None,
    num_heads: int | None = None,
) -> Encoder:
    """The encoder of any file that `read_state_dict` takes.

    A CXR-MIM checkpoint has one LayerNorm for each tap; `norm` becomes that of the chosen one.

    Args:
        timm_model: timm's name of the file's model; None: a plain ViT, whose size the file tells.
        tap: "last" or its place in --id_list, from 0; of a plain ViT.
        img_size: side of the input in pixels, for which pos_embed is resampled; None: as trained.
        num_heads: attention heads, for a plain ViT whose file doesn't say how many it has.

    Raises `UserError` for a file without a whole encoder of this kind, such a tap, or a known number of heads.
    """
    whole, info = read_state_dict(path)
    if timm_model is not None:
        # Some programs take the mean of the patches' tokens, and norm it.
        pool = {"global_pool": "avg"} if "fc_norm.weight" in whole and "norm.weight" not in whole else {}
        model, args, ignored = load_timm(timm_model, whole, info.path, img_size=img_size, num_classes=0, **pool)
        heads = attention_heads_of(model)
        stored = info.metadata.get("num_heads", str(heads))
        if stored != str(heads):
            raise UserError(f"{info.path}: has {stored} attention heads, timm's {timm_model} {heads}")
        return replace(named_encoder(timm_model, model, args | pool), source=info, ignored=ignored)
    state, prefix, ignored = find_vit(whole, info.path)
    norm, index, block = _find_tap(state, info, tap)
    if not {f"{norm}.weight", f"{norm}.bias"} <= state.keys():
        raise UserError(f"{info.path}: no whole plain ViT in it, {norm} is missing ({OTHER_MODEL})")
    encoder = {name: tensor for name, tensor in state.items() if ENCODER.fullmatch(name) and name[:5] != "norm."}
    encoder |= {f"norm.{part}": state[f"{norm}.{part}"] for part in ("weight", "bias")}
    found = vit_sizes(state)
    if img_size is not None:
        if img_size < found["patch_size"] or img_size % found["patch_size"]:
            raise UserError(f"--img_size {img_size}: must be a multiple of the patch size {found['patch_size']}")
        found["img_size"] = img_size
    grid = found["img_size"] // found["patch_size"]
    encoder["pos_embed"] = resample_pos_embed(state["pos_embed"], (grid, grid), info.path)
    found["num_heads"], heads_from = attention_heads(state, info, num_heads)
    named = {name: found[name] for name in ("embed_dim", "depth")}
    size, usual_heads, usual_patch = VIT_SIZES.get(tuple(named.values()), ("base", None, 16))
    usual = {"img_size": 224, "num_heads": usual_heads, "patch_size": usual_patch, "mlp_ratio": 4}
    usual |= named if usual_heads else {}
    order = ("img_size", "embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")
    args = {name: found[name] for name in order if found[name] != usual.get(name)}
    name = f"vit_{size}_patch{usual_patch}_224"
    return Encoder(encoder, name, args, info, ignored, found["num_heads"], heads_from, index, block, prefix)


def named_encoder(name: str, model: nn.Module, args: dict[str, Any]) -> Encoder:
    """A model of timm's that was made by its name."""
    return Encoder(model.state_dict(), name, args, scaling=(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]))


def vit_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a plain ViT's constructor, timm's or CXRMIM, that its tensors' shapes show."""
    width, _, patch_size, _ = state[PATCHES].shape
    return {
        "img_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": len(numbers(state, "blocks")),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
    }


def _find_tap(state: Mapping[str, Tensor], info: WeightsInfo, tap: str | int) -> tuple[str, int | None, int | None]:
    """Name of the tap's norm, its number and its block; None for what the file doesn't have or say."""
    taps = [str(number) for number in sorted(numbers(state, "norm"))]
    if tap == "last" and not taps:
        block = info.metadata.get("block")  # of an export
        return "norm", None, None if block is None else int(block)
    chosen = taps[-1] if tap == "last" else str(tap)
    if chosen not in taps:
        has = f"taps {', '.join(taps)}" if taps else "a single norm, not one for each tap"
        raise UserError(f"--tap {tap}: {info.path} has {has}; use last")
    id_list = info.config.get("id_list", info.args.get("id_list", ()))
    return f"norm.{chosen}", int(chosen), int(id_list[int(chosen)]) if len(id_list) == len(taps) else None


# ---------------------------------------------------------------- timm's models


def create_timm(name: str, *, img_size: int | None = None, **options) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model, for inputs of a side of `img_size` (None: its own), and the arguments that say so."""
    args: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        return timm.create_model(name, **args, **options), args
    except TypeError:  # a convolutional network takes any size, and no img_size
        if not args:
            raise
    overlay = {"input_size": [3, img_size, img_size]}
    options["pretrained_cfg_overlay"] = options.get("pretrained_cfg_overlay", {}) | overlay
    return timm.create_model(name, **options), {"pretrained_cfg_overlay": overlay}


def load_timm(
    name: str, state: Mapping[str, Tensor], path: object, **options
) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """timm's model with a file's tensors, which the model's own filter of timm converts.

    timm by itself loads what fits. Here every tensor of the model must come from the file, and nothing may be left over
    that could belong to the encoder.

    Returns what `create_timm` returns of `name` and `options`, and the names in the file that are no part of the model.
    Raises `UserError` if timm has no such model, or these are not its weights.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise UserError(f"{path}: timm has no model {name}; timm.list_models() lists its names")
    try:
        with torch.random.fork_rng(devices=[]):
            model, args = create_timm(name, **options)
        own = model.state_dict()
        for first in config_names(model, "first_conv"):  # timm would resample one of another size
            wanted = own.get(f"{first}.weight")
            if wanted is not None and not any(tensor.numel() == wanted.numel() for tensor in state.values()):
                raise ValueError(f"no tensor has the size of {first}.weight, {list(wanted.shape)}")
        # timm's modules have the filter of their models' files under this name.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        found = convert(dict(state), model) if convert else state
        missing, left = model.load_state_dict(found, strict=False)
    except MISFITS as error:
        raise UserError(f"{path}: not the weights of timm's {name}: {' '.join(str(error).split())[:200]}") from None
    if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
        raise UserError(
            f"{path}: not the weights of timm's {name}: it lacks {len(missing)} of {len(own)} tensors "
            f"({summarize_keys(missing)[:80]}); name the model that they are of"
        )
    parts = {tuple(key.split(".")[:2]) for key in own}  # such as layer1.0
    attends = any("attn" in key for key in own)  # a transformer computes with tokens and tables of any name
    if unknown := [key for key in left if tuple(key.split(".")[:2]) in parts or (attends and not is_behind(key))]:
        raise unknown_names(path, unknown, f"timm's {name}")
    heads = [key for key in state if is_behind(key) and key not in own]
    return model, args, list(dict.fromkeys([*left, *heads]))


def build_encoder(encoder: Encoder, num_classes: int = 0, *, trained: bool = True, **options) -> nn.Module:
    """timm's model with the encoder's weights, loaded strictly (a new head stays at its random start).

    Args:
        num_classes: outputs of a new linear head; 0: no head.
        trained: whether to load the weights; else all are random.
        options: further arguments of `timm.create_model`, e.g. drop_path_rate, global_pool.
    Raises `UserError` for an encoder that this model of timm's does not compute, or without these options.
    """
    args = encoder.timm_args | options
    if encoder.heads_from:  # a plain ViT: inputs are prepared as in pretraining, where timm's configuration has 0.5
        scaling = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "crop_pct": 1.0}
        args |= {"pretrained_cfg_overlay": scaling} | ({"weight_init": "skip"} if trained and not num_classes else {})
    try:
        model = timm.create_model(encoder.timm_name, num_classes=num_classes, **args)
        if not trained:
            return model
        own, state = model.state_dict(), dict(encoder.state)
        for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):  # by whether the head takes the mean of the tokens
            if f"{new}.weight" in own and f"{new}.weight" not in state:
                state |= {f"{new}.{part}": state.pop(f"{old}.{part}") for part in ("weight", "bias")}
        heads = tuple(f"{head}." for head in config_names(model, "classifier"))
        model.load_state_dict(state | {name: tensor for name, tensor in own.items() if name.startswith(heads)})
    except MISFITS as error:
        message = " ".join(str(error).split())[:300]
        path = encoder.source.path if trained else "random weights"
        raise UserError(f"{path}: not an encoder of timm's {encoder.timm_name}: {message}") from None
    return model


def attention_heads_of(model: nn.Module) -> int | None:
    """Attention heads of a model's first block; None for one without."""
    return next((module.num_heads for module in model.modules() if hasattr(module, "num_heads")), None)


def config_names(model: nn.Module, key: str) -> tuple[str, ...]:
    """Names of modules in the configuration of a timm model: under "classifier" its linear heads."""
    found = model.pretrained_cfg.get(key) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def split_model(text: str) -> tuple[str, str | None]:
    """The file and timm's name of its model in FILE@TIMM_MODEL; of FILE alone None for the model."""
    file, _, model = text.rpartition("@")
    return (file, model) if file and model and "/" not in model and not Path(text).exists() else (text, None)


def stored_weights(timm_name: str) -> Path:
    """Where the pretrained weights of a timm model are kept, or would be."""
    return FOLDER / f"{timm_name.replace('_patch', '_p')}_timm.pth"  # vit_base_p16_224_timm.pth, as --pretrained has it


# ---------------------------------------------------------------- CXRMIM


def build_model(
    constructor: Callable[..., nn.Module],
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the CXRMIM that a CXR-MIM checkpoint was trained as, and load all its weights.

    The constructor's arguments are those stored in the file. For published checkpoints, which have none, sizes are
    read off the tensors, and what tensors don't show (id_list, scale_list, attention heads) comes from the stored
    command line.

    Args:
        constructor: `models_cxrmim.CXRMIM`, or whatever takes its arguments.
        state, info: as `read_state_dict` returns them.
        args: command-line options that go before the stored ones.

    Returns the model on the CPU in eval mode. Raises `UserError` for a checkpoint that is not a whole one of CXR-MIM,
    that with `args` does not say all that is needed, or whose arguments and tensors disagree.
    """
    if info.kind != "cxr-mim" or not numbers(state, "decoder"):
        raise UserError(
            f"{info.path}: not a CXR-MIM checkpoint with decoders (its keys: "
            f"{summarize_keys(state)[:100]}); pass a checkpoint-*.pth of pretraining"
        )
    args = {**info.args, **(args or {})}
    free = {name: args[name] for name in FREE_CONFIG if args.get(name) is not None}
    try:
        model = constructor(**(info.config or _published_config(state, info, args)) | free)
        model.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{info.path}: its tensors and arguments don't fit together: {message}") from None
    return model.eval()


def _published_config(state: Mapping[str, Tensor], info: WeightsInfo, args: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a published checkpoint, which has no "model_config", from shapes and options."""
    options = ("id_list", "scale_list", "decoder_num_heads")
    if lacking := [name for name in options if args.get(name) is None]:
        raise UserError(f"{info.path}: the file does not say with which {lacking[0]} it was trained")
    last = max(numbers(state, "decoder.0.pred"))
    decoder = {
        "in_chans": state[PATCHES].shape[1],
        "num_heads": attention_heads(state, info, args.get("num_heads"))[0],
        "decoder_embed_dim": state["decoder.0.mask_token"].shape[-1],
        "decoder_depth": len(numbers(state, "decoder.0.blocks")),
        "hog_nbins": state[f"decoder.0.pred.{last}.weight"].shape[0] // 3,
    }
    return {name: args[name] for name in options} | vit_sizes(state) | decoder


# ---------------------------------------------------------------- files for other programs


def check_file_place(path: str | os.PathLike, option: str) -> None:
    """UserError where no file can be written at `path`: to be asked before the work whose result goes there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; name a file to write")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: no such directory to write into")


def export_backbone(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    fmt: str = "timm",
    tap: str | int = "last",
    img_size: int | None = None,
    num_heads: int | None = None,
) -> Encoder:
    """Write the encoder of a checkpoint for other programs; whole or not at all.

    Formats: "timm" is a torch file with the tensors under "state_dict", which
    `timm.create_model(name, num_classes=0, checkpoint_path=...)` loads strictly; "safetensors" is the
    same for safetensors; "cxr-eval" has them under "model", as that client reads them; "hf" makes the
    folder that `timm.create_model("local-dir:OUT")` and `push_to_hf_hub` work with. All carry what `describe` gives.
    Raises `UserError` for a bad checkpoint, tap or size, or a place that can't be written to.
    """
    out = Path(out)
    if out.exists() and Path(checkpoint).exists() and out.samefile(checkpoint):
        raise UserError(f"{out}: is the checkpoint itself, which would be lost; choose another file to write")
    (check_folder_place if fmt == "hf" else check_file_place)(out, "OUT")
    if (fmt == "safetensors") != (out.suffix == ".safetensors"):
        raise UserError(f"{out}: timm knows safetensors by the end of its name; --format {fmt} needs another name")
    encoder = read_encoder(checkpoint, tap=tap, img_size=img_size, num_heads=num_heads)
    model = build_encoder(encoder)  # proves that timm loads it
    metadata = describe(encoder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    buffer = io.BytesIO()
    if fmt in ("hf", "safetensors"):
        buffer.write(safetensors.torch.save(state, {"format": "pt"} | metadata))
    else:
        torch.save({"model" if fmt == "cxr-eval" else "state_dict": state, "metadata": metadata}, buffer)
    files = {out: buffer.getvalue()}
    if fmt == "hf":
        out.mkdir(exist_ok=True)
        (out / "config.json").unlink(missing_ok=True)  # wherever this is cut off, none stands beside other weights
        files = {out / "model.safetensors": files[out], out / "config.json": _hf_config(model, encoder, metadata)}
    for path, content in files.items():
        with atomic_write(path) as file:
            file.write(content)
    return encoder


def describe(encoder: Encoder) -> dict[str, str]:
    """Metadata of a plain ViT's export, as text (all that safetensors can hold)."""
    info = encoder.source
    described = {
        "source": info.path.name,
        "source_sha256": hashlib.sha256(info.path.read_bytes()).hexdigest(),
        "source_kind": info.kind,
        "timm_model": encoder.timm_name,
        "timm_args": json.dumps(encoder.timm_args),
        "num_heads": encoder.num_heads,
        "patch_size": encoder.state[PATCHES].shape[-1],
        "mean": json.dumps(IMAGENET_DEFAULT_MEAN),
        "std": json.dumps(IMAGENET_DEFAULT_STD),
        "args": json.dumps(info.args, default=str),
        "seen": json.dumps(sorted(info.seen)) if info.seen else None,
        "epoch": info.epoch,
        "tap": encoder.tap,
        "block": encoder.block,
    }
    return {name: str(value) for name, value in described.items() if value is not None}


def _hf_config(model: nn.Module, encoder: Encoder, metadata: Mapping[str, str]) -> bytes:
    """config.json as timm writes it, with where the weights come from added."""
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, model_args=dict(encoder.timm_args), safe_serialization=True)
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config["pretrained_cfg"].update(tag="cxr_mim", custom_load=False)
    for key in ("origin_url", "paper_ids", "license", "notes"):  # those of timm's own weights
        config["pretrained_cfg"].pop(key, None)
    config["cxr_mim"] = {key: value for key, value in metadata.items() if not key.startswith(("timm_", "seen"))}
    return json.dumps(config, indent=2).encode()


def usage(encoder: Encoder, out: str | os.PathLike, fmt: str) -> str:
    """Lines for the user: what was written, and how to load it."""
    extra = "".join(f", {name}={value}" for name, value in encoder.timm_args.items())
    call = f'timm.create_model("{encoder.timm_name}", num_classes=0{extra}, checkpoint_path="{out}")'
    if fmt == "hf":
        call = f'timm.create_model("local-dir:{out}", pretrained=True)'
    lines = [
        f"wrote {out}: {len(encoder.state)} tensors, {summarize_keys(encoder.state)}",
        f"attention heads: {encoder.num_heads} ({encoder.heads_from})",
    ]
    if fmt == "cxr-eval":
        names = f"{', '.join(CXR_EVAL_NAMES[:-1])} or {CXR_EVAL_NAMES[-1]}"
        lines.append(f"cxr-eval reads it where its path contains {names}")
        if not any(name in str(Path(out).resolve()) for name in CXR_EVAL_NAMES):
            lines.append(f"WARNING: {out} contains none of these names: cxr-eval would silently load nothing from it")
    else:
        lines.append(f"load it with {call}")
    if encoder.block is not None and encoder.block != encoder.depth - 1:
        lines.append(
            f"note: norm belongs to the output of block {encoder.block}, not of the last; its features are\n"
            f"model.forward_intermediates(x, indices=[{encoder.block}], norm=True, intermediates_only=True)"
        )
    return "\n".join(lines)
