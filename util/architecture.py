"""The model that a CXR-MIM checkpoint was trained as.

Checkpoints of this program keep the constructor's arguments (`CXRMIM.config`) under "model_config".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from util.errors import UserError
from util.weights import FREE_CONFIG, WeightsInfo, attention_heads, numbers, summarize_keys


def build_model(
    constructor: Callable[..., nn.Module],
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the CXRMIM that a CXR-MIM checkpoint was trained as, and load all its weights.

    The constructor's arguments are those stored in the file. For published checkpoints, which have none, sizes are
    read off the tensors, and what tensors don't tell (id_list, scale_list, attention heads) comes from the stored
    command line.

    Args:
        constructor: `models_cxrmim.CXRMIM`, or whatever takes its arguments.
        state, info: as `read_state_dict` returns them.
        args: command-line options that go before the stored ones.

    Returns:
        The model on the CPU in eval mode.

    Raises:
        UserError: not a complete CXR-MIM checkpoint, it does not say all that is needed and `args` don't
            either, or arguments and tensors disagree.
    """
    path = info.path
    if info.kind != "cxr-mim" or not any(name.startswith("decoder.0.") for name in state):
        raise UserError(
            f"{path}: not a CXR-MIM checkpoint with decoders (its keys: "
            f"{summarize_keys(state)[:100]}); pass a checkpoint-*.pth of pretraining"
        )
    args = {**info.args, **(args or {})}
    free = {name: args[name] for name in FREE_CONFIG if args.get(name) is not None}
    try:
        config = info.config or _published_config(state, info, args)
        model = constructor(**config | free)
        model.load_state_dict(state)
    except KeyError as error:
        raise UserError(f"{path}: an incomplete CXR-MIM checkpoint, it lacks {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: its tensors and arguments don't fit together: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval()


def _published_config(state: Mapping[str, Tensor], info: WeightsInfo, args: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a published checkpoint, which has no "model_config", from shapes and options."""
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
