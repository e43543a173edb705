"""Reading weights of several origins safely, and starting a model from them.

A weights file may be a ViT's state dict under timm's names and any prefix (MAE, SimMIM, DINO, Lightning),
a CXR-MIM checkpoint of the published code or of this one, a `.safetensors` file, or a Hugging Face-style folder. None of
them is ever allowed to run code: files are opened with `weights_only=True`, and beside tensors and plain types only
`argparse.Namespace` and NumPy scalars are accepted, which MAE-style programs store under "args". What is in a file
decides, never its name; where shapes leave something open, the error names the option that says it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from util.checkpoint import read_torch
from util.errors import UserError
from util.resume import as_text

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPER_KEYS = ("model", "state_dict", "teacher", "student")  # where checkpoints keep the tensors
PATCHES = "patch_embed.proj.weight"
PARAMETERS = ("weight", "bias", "cls_token", "pos_embed")  # ends of the names of what is trained
ENCODER = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(\d+\.)?(weight|bias)|"
    r"blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
# Without these, of these ranks, there is no plain ViT.
RANKS = {"cls_token": 3, "pos_embed": 3, PATCHES: 4, "blocks.0.mlp.fc1.weight": 2}
# What stands behind an encoder in training, by the first part of its name. Any other name may be something that the
# encoder computes with, such as register_tokens, norm_pre or a table of relative positions.
BEHIND = re.compile(
    r"(head|decoder|pred|projec|classifier|criterion|loss|queue|text|bert|hog_enc|mask_token|masked_embed|pre_logits|fc$)"
    r"|.*_(head|decoder|predictor|projector|classifier|loss|queue)$"
)
OTHER_MODEL = "of a model that timm has: run_downstream.py and run_gaze.py take FILE@TIMM_MODEL"
# Of twin encoders the ones that nobody uses afterwards: DINO's student, MoCo's key encoder, moving averages.
LESSER_TWINS = ("student", "encoder_k", "target", "momentum", "ema")
# (width, depth) -> (size, attention heads, patch size of timm's model), as timm and the ViT and MAE papers define the
# sizes. No tensor's shape gives the heads, so these are for files that don't say how many they have.
VIT_SIZES = {
    (192, 12): ("tiny", 3, 16),
    (384, 12): ("small", 6, 16),
    (768, 12): ("base", 12, 16),
    (1024, 24): ("large", 16, 16),
    (1280, 32): ("huge", 16, 14),
}
# Sizes that others use with other heads: MoCo v3's small and several MAE forks' tiny have 12.
SEVERAL_HEADS = ("tiny", "small")
# The options of pretraining that say these arguments of the model; --model says the others.
OPTIONS = {name: f"--{name}" for name in ("id_list", "scale_list", "decoder_depth", "decoder_num_heads", "hog_nbins")}
OPTIONS["img_size"] = "--input_size"
# Choices of training that a model may change without its weights meaning something else.
FREE_CONFIG = ("gaze_weighted", "gaze_temperature", "masking")

_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself.

    Attributes:
        path: the file read (inside the folder, where a folder was named).
        kind: "cxr-mim" (one norm per tap), "mae", "vit" (timm names, one norm) or "unknown".
        entries: what it holds beside the tensors, such as epoch and samples, as it is.
        args: the training arguments stored in it.
        config: arguments of the model's constructor (`CXRMIM.config`), {} for a file of another program.
        metadata: further text entries, as exports of this program carry them.
    """

    path: Path
    kind: str
    entries: Mapping[str, Any]
    args: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, str]

    @property
    def epoch(self) -> int | None:
        """Last finished epoch, from 0."""
        epoch = self.entries.get("epoch")
        return epoch if isinstance(epoch, (int, np.integer)) else None

    @property
    def seen(self) -> frozenset[str]:
        """`subject_marks` of the subjects whose images trained it, as far as the file says."""
        seen = self.entries.get("seen")
        return frozenset(seen if isinstance(seen, list) else json.loads(self.metadata.get("seen", "[]")))


def summarize_keys(keys: Iterable[str]) -> str:
    """State-dict names by their first part, with their number: "cls_token, patch_embed (2), blocks (144)"."""
    parts = Counter(key.partition(".")[0] for key in keys)
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in parts.items())


def key_report(**keys: Sequence[str]) -> str:
    """A line for each group of names, such as matched, missing and ignored, with their number."""
    return "\n".join(f"  {title:8s}{len(names):4d}  {summarize_keys(names)}".rstrip() for title, names in keys.items())


# ---------------------------------------------------------------- reading


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Read the tensors of a weights file or folder, on the CPU, without running any code from it.

    Args:
        path: a file of torch.save (plain state dict, or a dict that keeps it under one of `WRAPPER_KEYS`), a
            `.safetensors` file, or a folder with one of `FOLDER_FILES`.

    Returns:
        Names without wrapper prefixes -> tensors, and what the file says about itself.

    Raises:
        UserError: the file is missing, cut short, damaged as far as its checksums show, of another kind, holds no
            tensors by name, weights that are no finite numbers, or Python objects that could run code.
    """
    path = Path(path)
    path = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file, nor a folder with {' or '.join(FOLDER_FILES)}")
    content = (_read_safetensors if path.suffix == ".safetensors" else read_torch)(path)
    entries = content if isinstance(content, Mapping) else {}
    wrapper = next((key for key in WRAPPER_KEYS if isinstance(entries.get(key), Mapping)), None)
    tensors = entries[wrapper] if wrapper else entries
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        expected = f"expected name -> tensor, plain or under {' or '.join(map(repr, WRAPPER_KEYS))}"
        raise UserError(f"{path}: no state dict in it; {expected}")
    state = {_WRAPPED.sub("", str(name)): value for name, value in tensors.items()}
    _check_weights(path, state)

    def mapping(name: str) -> dict:
        """What the file has under a name; another program's may be anything."""
        found = entries.get(name)
        found = vars(found) if isinstance(found, argparse.Namespace) else found
        return dict(found) if wrapper and isinstance(found, Mapping) else {}

    metadata = {str(key): str(value) for key, value in mapping("metadata").items()}
    more = {name: value for name, value in entries.items() if wrapper and name != wrapper}
    return state, WeightsInfo(path, _kind(state), more, mapping("args"), mapping("model_config"), metadata)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return {"state_dict": safetensors.torch.load_file(path), "metadata": metadata}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or export it again") from None


def _check_weights(path: Path, state: Mapping[str, Any]) -> None:
    """Refuse what can be no weights: parameters that are no dense floating-point tensors, or not finite."""
    for name, value in state.items():
        if not name.endswith(PARAMETERS):
            continue
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise UserError(
                f"{path}: {name} is {value.dtype}, {value.layout}, on {value.device}: no weights; save float32"
            )
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} has {int((~value.isfinite()).sum())} values that are not finite")


def _kind(state: Mapping[str, Tensor]) -> str:
    if not numbers(state, "blocks"):
        return "unknown"
    if numbers(state, "norm"):
        return "cxr-mim"
    return "mae" if any(name.startswith("decoder_") for name in state) else "vit"


def numbers(state: Iterable[str], group: str) -> set[int]:
    """The N of all names `group.N.*`."""
    return {int(name[len(group) :].split(".")[1]) for name in state if re.match(rf"{group}\.\d+\.", name)}


# ---------------------------------------------------------------- the plain ViT in a file


def find_vit(state: Mapping[str, Tensor], path: object) -> tuple[dict[str, Tensor], str, list[str]]:
    """The plain Vision Transformer in a state dict, whatever stands before its names.

    Returns:
        All tensors behind the prefix, under timm's names; the prefix, "" or e.g. "backbone."; and the names that are
        no part of the encoder.

    Raises:
        UserError: no whole ViT, several, or tensors that may be part of the encoder and that a plain ViT does not have;
            it names the file at `path`.
    """
    prefixes = [name.removesuffix(PATCHES) for name in state if f".{name}".endswith(f".{PATCHES}")] or [""]
    better = [prefix for prefix in prefixes if not any(word in prefix for word in LESSER_TWINS)] or prefixes
    prefix = "" if "" in prefixes else better[0]
    if prefix and better[1:]:
        raise UserError(f"{path}: encoders under {' and '.join(sorted(better))}; save the state dict of one")
    twins = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    found = {
        name[len(prefix) :]: tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.startswith(twins)
    }
    for name, rank in RANKS.items():
        if name not in found or found[name].ndim != rank:
            raise UserError(
                f"{path}: no whole plain ViT in it, {name} is missing or has another rank; it has "
                f"{summarize_keys(state)[:100]} ({OTHER_MODEL})"
            )
    if unknown := [name for name in found if not ENCODER.fullmatch(name) and not is_behind(name)]:
        raise unknown_names(path, [prefix + name for name in unknown], "a plain ViT")
    inside = {prefix + name for name in found if ENCODER.fullmatch(name)}
    return found, prefix, [name for name in state if name not in inside]


def is_behind(name: str) -> bool:
    """Whether a tensor is known to stand behind an encoder, in a head or decoder, by its name."""
    return bool(BEHIND.match(name.partition(".")[0]))


def unknown_names(path: object, unknown: Sequence[str], what: str) -> UserError:
    """Why a file with tensors of these unknown names is not read."""
    more = f" and {len(unknown) - 1} more names" if unknown[1:] else ""
    return UserError(
        f"{path}: {unknown[0]}{more} may belong to an encoder that is not {what}, whose features would be wrong; if "
        f"not, save the encoder's state dict without them ({OTHER_MODEL})"
    )


def resample_pos_embed(pos_embed: Tensor, grid: tuple[int, int], path: object = "") -> Tensor:
    """Resample a position embedding with one class row [1, 1+N, D] (square grid) to [1, 1+h*w, D].

    Bicubic with antialiasing (timm.layers.resample_abs_pos_embed); the same tensor where sizes agree.

    Raises:
        UserError: N is not a square number; it names the file at `path`.
    """
    count = pos_embed.shape[1] - 1
    if count == grid[0] * grid[1]:
        return pos_embed
    if count < 1 or math.isqrt(count) ** 2 != count:
        raise UserError(f"{path}: not a ViT that takes square images: pos_embed is {list(pos_embed.shape)}")
    return resample_abs_pos_embed(pos_embed, new_size=list(grid), num_prefix_tokens=1)


def attention_heads(state: Mapping[str, Tensor], info: WeightsInfo, num_heads: int | None = None) -> tuple[int, str]:
    """Attention heads of a file's ViT, which no tensor's shape gives, and where they are known from.

    They are guessed only for the sizes of which one number is in use.

    Args:
        state: the ViT under timm's names.
        num_heads: what the user says, for files that don't.

    Raises:
        UserError: neither file nor user says, and there is nothing to guess from; or `num_heads` contradicts the file;
            or the number does not divide the width.
    """
    width, depth = state[PATCHES].shape[0], len(numbers(state, "blocks"))
    size, usual, _ = VIT_SIZES.get((width, depth), ("none", 0, 0))
    name = str(info.args.get("model") or f"vit_{size}")  # of its class, as MAE and this program store it
    ours = f"cxrmim_vit_{size}" in name
    stored = info.config.get("num_heads", info.metadata.get("num_heads"))
    if stored is not None:
        heads, source = stored, "stored in the file"
    elif num_heads is not None:
        heads, source = num_heads, "--num_heads"
    elif usual and f"vit_{size}" in name and (ours or size not in SEVERAL_HEADS):
        heads, source = usual, f"of {name}" if ours else f"of every ViT-{size}; the file does not say"
    else:
        raise UserError(
            f"{info.path}: the file does not say how many attention heads its encoder has (width {width}, "
            f"{depth} blocks{', ' + name if 'model' in info.args else ''}); give it with --num_heads "
            "(visualize.py, export_backbone.py, run_downstream.py; the other programs read the export)"
        )
    if not (str(heads).isdecimal() and int(heads) and width % int(heads) == 0):
        raise UserError(f"{info.path}: {heads!r} attention heads ({source}) don't divide its width {width}")
    if num_heads not in (None, int(heads)):
        raise UserError(f"--num_heads {num_heads}: {info.path} says that it has {heads}")
    return int(heads), source


# ---------------------------------------------------------------- initial weights of pretraining


def load_initial_weights(model: nn.Module, path: str | os.PathLike) -> str:
    """Copy the weights in `path` into a CXRMIM model, in place.

    The encoder (cls_token, pos_embed, patch_embed, blocks) comes from any file that `find_vit` takes. A timm or MAE
    file's single `norm` and its head are ignored, since the model has one norm for each tap (as
    published); MAE's decoder is ignored; a CXR-MIM checkpoint fills the decoders and norms too, less
    its fixed filters `hog_enc.*`. At another input size pos_embed is resampled, and the decoders' own
    pos_embed, which is a formula, stays.

    Args:
        model: unwrapped CXRMIM.
        path: whatever `read_state_dict` takes.

    Returns:
        Lines that say which keys matched, which the file lacks (they keep their values), and which are ignored.

    Raises:
        UserError: a tensor has another shape than the model's, the encoder was trained with another
            number of heads or an unknown one, the file lacks a part of the model's encoder, or as `find_vit`.
    """
    state, info = read_state_dict(path)
    found, prefix, _ = find_vit(state, info.path)
    own, notes = model.state_dict(), []
    pos_embed = found["pos_embed"]
    found["pos_embed"] = resample_pos_embed(pos_embed, model.grid_size, info.path)
    if found["pos_embed"] is not pos_embed:
        height, width = model.grid_size
        notes.append(f"  pos_embed resampled from {pos_embed.shape[1] - 1} patches to {height} x {width} (bicubic)")
    taken = {
        name: tensor
        for name, tensor in found.items()
        if name in own and not (re.fullmatch(r"decoder\..*pos_embed", name) and tensor.shape != own[name].shape)
    }
    try:
        missing = model.load_state_dict(taken, strict=False).missing_keys
    except RuntimeError as error:  # of a shape, on the second line
        reason = str(error).splitlines()[1].strip()
        flags = "--model, or of a decoder's tensor the --hog_nbins, --scale_list or decoder,"
        raise UserError(f"{info.path}: {reason} Choose the {flags} it was trained with") from None
    if lacking := [name for name in missing if not name.startswith(("decoder.", "norm."))]:
        raise UserError(
            f"{info.path}: lacks {summarize_keys(lacking)} of the model (first: {lacking[0]}); "
            "likely a file of another model size: choose the --model it was trained with"
        )
    heads, _ = attention_heads(found, info)
    if heads != model.config["num_heads"]:
        raise UserError(
            f"{info.path}: its encoder has {heads} attention heads, the model {model.config['num_heads']}; "
            "choose the --model it was trained with"
        )
    names = ("decoder_num_heads", "id_list", "scale_list") if info.kind == "cxr-mim" else ()
    for name, theirs, ours in _differences({**info.args, **info.config}, model.config, names):
        notes.append(f"  note: the file was trained with {name} {theirs}, this model has {ours}")
    model.seen = sorted(info.seen)
    ignored = [name for name in state if name.removeprefix(prefix) not in taken]
    keys = key_report(matched=list(taken), missing=missing, ignored=ignored)
    return "\n".join([f"Initial weights from {info.path}:", keys, *notes])


def check_same_model(config: Mapping[str, Any], own: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Whether weights saved by a model of `config` mean the same in a model of `own` (`CXRMIM.config`).

    Raises:
        UserError: they differ in more than `FREE_CONFIG`, though shapes may agree. {} passes.
    """
    differs = _differences(config, own, [name for name in own if name not in FREE_CONFIG])
    if differs:
        told = "; ".join(f"{name} {theirs} there, {ours} here" for name, theirs, ours in differs)
        flags = sorted({OPTIONS.get(name, "--model") for name, _, _ in differs})
        raise UserError(f"{path}: of another model ({told}); choose the {', '.join(flags)} it was made with")


def _differences(config: Mapping[str, Any], own: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, theirs, ours) of what differs, as text."""
    texts = [(name, as_text(config[name]), as_text(own[name])) for name in names if name in config]
    return [(name, theirs, ours) for name, theirs, ours in texts if theirs != ours]
