"""What a weights file says about the model that it belongs to, where the shapes of tensors don't tell.

Checkpoints of this program keep the constructor's arguments (`CXRMIM.config`) under "model_config", and
exports keep heads and patch size in their metadata. Other files say less, and nothing here guesses: what
can't be known is an error that names the option which says it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from util.errors import UserError

if TYPE_CHECKING:
    from util.weights import WeightsInfo

# (width, depth) -> (name of the size, attention heads), as timm and the ViT and MAE papers define the sizes. Heads are
# not in the shapes of any tensor, so this is consulted only for files that don't say how many they have.
VIT_SIZES = {
    (192, 12): ("tiny", 3),
    (384, 12): ("small", 6),
    (768, 12): ("base", 12),
    (1024, 24): ("large", 16),
    (1280, 32): ("huge", 16),
}
# Sizes that others use with other heads: MoCo v3's small and several MAE forks' tiny have 12.
SEVERAL_HEADS = ("tiny", "small")
# Choices of training that a model may change without its weights meaning something else.
FREE_CONFIG = ("gaze_weighted", "gaze_temperature", "masking")


def notes_on_config(state: Mapping[str, Tensor], info: WeightsInfo, own: Mapping[str, Any]) -> list[str]:
    """What to know where tensors of equal shapes mean something else; UserError for the encoder's heads."""
    heads, _ = attention_heads(state, info)
    if heads != own["num_heads"]:
        raise UserError(
            f"{info.path}: its encoder has {heads} attention heads, the model {own['num_heads']}; "
            "choose the --model it was trained with"
        )
    told = {**info.args, **info.config}
    return [
        f"note: the file was trained with {name} {_listed(told[name])}, this model has {_listed(own[name])}"
        for name in ("decoder_num_heads", "id_list", "scale_list")
        if info.kind == "cxr-mim" and name in told and _listed(told[name]) != _listed(own[name])
    ]


def _listed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check_same_model(config: Mapping[str, Any], own: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Whether weights saved by a model of `config` mean the same in a model of `own` (`CXRMIM.config`).

    Raises:
        UserError: they differ in more than `FREE_CONFIG`, though shapes may agree. {} passes.
    """
    differs = [
        f"{name} {_listed(config[name])} there, {_listed(value)} here"
        for name, value in own.items()
        if name in config and name not in FREE_CONFIG and _listed(config[name]) != _listed(value)
    ]
    if differs:
        raise UserError(f"{path}: of another model ({'; '.join(differs)}); choose the --model it was made with")


def _told_heads(info: WeightsInfo) -> int | None:
    """Attention heads of a file's encoder where it says them itself."""
    heads = info.config.get("num_heads", info.metadata.get("num_heads"))
    if heads is not None and not (str(heads).isdecimal() and int(heads)):
        raise UserError(f"{info.path}: says that its encoder has {heads!r} attention heads; not a number")
    return None if heads is None else int(heads)


def attention_heads(state: Mapping[str, Tensor], info: WeightsInfo, num_heads: int | None = None) -> tuple[int, str]:
    """Attention heads of a file's encoder, which no tensor's shape tells, and where they are known from.

    Args:
        num_heads: what the user says, for files that don't.

    Raises:
        UserError: the file doesn't say, and its size is none of `VIT_SIZES`, or one of `SEVERAL_HEADS`, or what the
            file says of its own size is another; or `num_heads` contradicts the file or does not divide the width.
    """
    width, depth = state["patch_embed.proj.weight"].shape[0], len(numbers(state, "blocks"))
    told = _told_heads(info)
    if told is not None:
        if num_heads not in (None, told):
            raise UserError(f"--num_heads {num_heads}: {info.path} says that it has {told}")
        if width % told:
            raise UserError(
                f"{info.path}: says that its encoder has {told} attention heads, which don't divide its width {width}"
            )
        return told, "stored in the file"
    if num_heads is not None:
        if num_heads < 1 or width % num_heads:
            raise UserError(f"--num_heads {num_heads}: does not divide the width {width} of {info.path}")
        return num_heads, "--num_heads"
    size, heads = VIT_SIZES.get((width, depth), ("", 0))
    name = str(info.args.get("model") or f"vit_{size}")  # of its class, as MAE and this program store it
    ours = f"cxrmim_vit_{size}" in name
    if not size or f"vit_{size}" not in name or (size in SEVERAL_HEADS and not ours):
        raise UserError(
            f"{info.path}: the file does not say how many attention heads its encoder has (width {width}, "
            f"{depth} blocks{', ' + name if 'model' in info.args else ''}); say it with --num_heads "
            "(visualize.py, export_backbone.py, run_downstream.py; the other programs read the export)"
        )
    return heads, f"of {name}" if ours else f"of every ViT-{size}; the file does not say"


def config_of_older_file(state: Mapping[str, Tensor], info: WeightsInfo, args: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a checkpoint that has no "model_config", from shapes and options."""
    for name in ("id_list", "scale_list", "decoder_num_heads"):
        if args.get(name) is None:
            raise UserError(f"{info.path}: the file does not say with which {name} it was trained; pass --{name}")
    embed_dim, in_chans, patch_size = (state["patch_embed.proj.weight"].shape[i] for i in (0, 1, 2))
    last = max(numbers(state, "decoder.0.pred"))
    return {
        "img_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depth": len(numbers(state, "blocks")),
        "num_heads": attention_heads(state, info, args.get("num_heads"))[0],
        "decoder_embed_dim": state["decoder.0.mask_token"].shape[-1],
        "decoder_depth": len(numbers(state, "decoder.0.blocks")),
        "decoder_num_heads": int(args["decoder_num_heads"]),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "hog_nbins": state[f"decoder.0.pred.{last}.weight"].shape[0] // 3,
        "id_list": args["id_list"],
        "scale_list": args["scale_list"],
    }


def numbers(state: Mapping[str, Tensor], group: str) -> set[int]:
    """The N of all names `group.N.*`."""
    matches = (re.match(rf"{re.escape(group)}\.(\d+)\.", name) for name in state)
    return {int(match.group(1)) for match in matches if match}
