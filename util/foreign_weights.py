"""A Vision Transformer under the names of other programs: found by what is in it, renamed to timm's.

Known are timm, MAE, SimMIM (`encoder.`), DINO (`teacher`, `backbone.`), mmpretrain (`layers.N.ln1`,
`ffn.layers.0.0`), Lightning (`model.`, `img_encoder_q.model.`), and any other prefix: what is behind it tells,
never a file's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

ENCODER = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|(fc_)?norm\.(\d+\.)?(weight|bias)|"
    r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
# What stands behind an encoder in training, by the first part of its name. Of any other name nobody knows whether the
# encoder computes with it, as with register_tokens, norm_pre or a table of relative positions.
BEHIND = re.compile(
    r"(head|decoder|pred|projec|classifier|criterion|loss|queue|text|bert|hog_enc|mask_token|masked_embed|pre_logits|fc$)"
    r"|.*_(head|decoder|predictor|projector|classifier|loss|queue)$"
)
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


@dataclass(frozen=True)
class Found:
    """Where the encoder was.

    Attributes:
        state: all tensors behind the prefix, under timm's names.
        prefix: "" or e.g. "module.backbone.".
        layout: "timm" or "mmpretrain".
        ignored: names of the file that are no part of an encoder, as they stand there.
        unknown: those of them that may be part of it: not known to be a head or decoder (`BEHIND`).
    """

    state: dict[str, Tensor]
    prefix: str
    layout: str
    ignored: list[str]
    unknown: list[str]


def find_encoder(state: Mapping[str, Tensor]) -> Found:
    """The Vision Transformer in a state dict, whatever stands before its names.

    Raises:
        KeyError: no patch embedding of a ViT.
        ValueError: several encoders, and no way to tell which is meant.
    """
    found = {
        name[: -len(end)]: "timm" if end == PATCH_EMBEDDINGS[0] else "mmpretrain"
        for name in state
        for end in PATCH_EMBEDDINGS
        if name == end or name.endswith(f".{end}")
    }
    if not found:
        raise KeyError(PATCH_EMBEDDINGS[0])
    prefix = _choose(list(found))
    layout = found[prefix]
    twins = tuple(other for other in found if other.startswith(prefix) and other != prefix)
    renamed, ignored, unknown = {}, [], []
    for name, tensor in state.items():
        own = _timm_name(name[len(prefix) :], layout) if name.startswith(prefix) else None
        if own is None or not ENCODER.fullmatch(own):
            ignored.append(name)
        if own is not None:
            renamed[own] = tensor
            if is_unknown(own) and not name.startswith(twins):
                unknown.append(name)
    return Found(renamed, prefix, layout, ignored, unknown)


def is_unknown(name: str) -> bool:
    """Whether a name, in timm's layout, is neither an encoder's nor known to stand behind one."""
    return not (ENCODER.fullmatch(name) or BEHIND.match(name.partition(".")[0]))


def refusal(path: object, unknown: list[str]) -> str:
    """Why a file with these unknown names is not read."""
    more = f" and {len(unknown) - 1} more names" if unknown[1:] else ""
    return (
        f"{path}: {unknown[0]}{more} may belong to an encoder that is no plain ViT, which this program would compute "
        "wrongly; if not, save the encoder's state dict without them"
    )


def _timm_name(name: str, layout: str) -> str:
    if layout == "mmpretrain":
        for pattern, replacement in MMPRETRAIN:
            name, count = pattern.subn(replacement, name)
            if count:
                break
    return name


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
