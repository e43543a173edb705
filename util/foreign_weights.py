"""A Vision Transformer under the names of other programs: found by what is in it, renamed to timm's.

Known are timm, MAE, SimMIM (`encoder.`), DINO (`teacher`, `backbone.`), mmpretrain (`layers.N.ln1`,
`ffn.layers.0.0`), Lightning (`model.`, `img_encoder_q.model.`), and any other prefix: what is behind it tells,
never a file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from util.weights import ENCODER, is_unknown, refusal

PLAIN_VIT = "blocks.0.attn.qkv.weight"  # a name that each has
PATCH_EMBEDDINGS = ("patch_embed.proj.weight", "patch_embed.projection.weight")  # timm's, mmpretrain's
# Of twin encoders the one that is used afterwards: DINO's teacher, MoCo's query encoder.
BETTER_TWIN = (("teacher", "student"), ("encoder_q", "encoder_k"), ("online", "target"), ("", "momentum"), ("", "ema"))
MMPRETRAIN = (
    (re.compile(r"^patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"^layers\.(\d+)\.ln([12])\."), r"blocks.\1.norm\2."),
    (re.compile(r"^layers\.(\d+)\.ffn\.layers\.0\.0\."), r"blocks.\1.mlp.fc1."),
    (re.compile(r"^layers\.(\d+)\.ffn\.layers\.1\."), r"blocks.\1.mlp.fc2."),
    (re.compile(r"^layers\.(\d+)\.attn\."), r"blocks.\1.attn."),
    (re.compile(r"^layers\.(\d+)\.(gamma|ls)"), r"blocks.\1.\2"),
    (re.compile(r"^(?:ln1|norm1|ln|norm)\."), "norm."),
)


def find_encoder(state: Mapping[str, Tensor], path: object) -> tuple[dict[str, Tensor], str, list[str]]:
    """The Vision Transformer in a state dict, whatever stands before its names.

    Returns:
        All tensors behind the prefix, under timm's names; the prefix, "" or e.g. "module.backbone."; and the names of
        the file at `path` that are no part of the encoder.

    Raises:
        KeyError: no patch embedding of a ViT.
        ValueError: several encoders, and no way to tell which is meant.
        UserError: tensors that may be part of it, not known to be of a head or decoder.
    """
    ends = PATCH_EMBEDDINGS
    prefixes = [name[: -len(end)] for name in state for end in ends if f".{name}".endswith(f".{end}")]
    if not prefixes:
        raise KeyError(PATCH_EMBEDDINGS[0])
    prefix = _choose(prefixes)
    mmpretrain = f"{prefix}{PATCH_EMBEDDINGS[0]}" not in state
    twins = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    found, ignored, unknown = {}, [], []
    for name, tensor in state.items():
        own = name[len(prefix) :] if name.startswith(prefix) else None
        if own is not None and mmpretrain:
            for pattern, replacement in MMPRETRAIN:
                own = pattern.sub(replacement, own)
        if own is None or not ENCODER.fullmatch(own):
            ignored.append(name)
        if own is not None:
            found[own] = tensor
            if is_unknown(own) and not name.startswith(twins):
                unknown.append(name)
    if unknown:
        raise refusal(path, unknown)
    return found, prefix, ignored


def _choose(prefixes: list[str]) -> str:
    """The one that is meant: the only one, the one without a prefix, or the better of twins."""
    if "" in prefixes:
        return ""
    left = list(prefixes)
    for better, worse in BETTER_TWIN:
        for prefix in prefixes:
            if worse in prefix and len(left) > 1 and prefix in left and any(better in p for p in left if p != prefix):
                left.remove(prefix)
    if len(left) > 1:
        raise ValueError(f"encoders under {' and '.join(sorted(left))}; save the state dict of one")
    return left[0]
