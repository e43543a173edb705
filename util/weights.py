"""Reading weights of several origins safely, and starting a model from them.

A weights file may be a plain timm ViT state dict, an MAE checkpoint, a CXR-MIM checkpoint of the
published code or of this one, a `.safetensors` file, or a Hugging Face-style folder. None of them is
ever allowed to run code: files are opened with `weights_only=True`, and beside tensors and plain types
only `argparse.Namespace` and NumPy scalars are accepted, which MAE-style programs store under "args".
Nothing is guessed where the shapes of tensors don't tell: it is an error that names the option which says it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from util.checkpoint import check_weights, verify_archive
from util.errors import UserError

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPER_KEYS = ("model", "state_dict", "teacher", "student")  # where checkpoints keep the tensors
ENCODER_PREFIXES = ("cls_token", "pos_embed", "patch_embed.", "blocks.")
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
# (width, depth) -> (size, attention heads, patch size of timm's model), as timm and the ViT and MAE papers define the
# sizes. Heads are not in the shapes of any tensor, so theirs are for files that don't say how many they have.
VIT_SIZES = {
    (192, 12): ("tiny", 3, 16),
    (384, 12): ("small", 6, 16),
    (768, 12): ("base", 12, 16),
    (1024, 24): ("large", 16, 16),
    (1280, 32): ("huge", 16, 14),
}
# Sizes that others use with other heads: MoCo v3's small and several MAE forks' tiny have 12.
SEVERAL_HEADS = ("tiny", "small")
# Choices of training that a model may change without its weights meaning something else.
FREE_CONFIG = ("gaze_weighted", "gaze_temperature", "masking")

_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # left by DistributedDataParallel and torch.compile
_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [
    argparse.Namespace,
    # NumPy moved this function between versions; files name whichever place it had when they were written.
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]


@dataclass(frozen=True)
class WeightsInfo:
    """What a weights file says about itself, beside its tensors.

    Attributes:
        path: the file read (inside the folder, where a folder was named).
        kind: "cxr-mim" (one norm per tap), "mae", "vit" (timm names, one norm) or "unknown".
        args: the training arguments stored in it, as a plain dict.
        epoch: last finished epoch stored in it, or None.
        world_size: number of processes it was trained with.
        config: arguments of the model's constructor (`CXRMIM.config`), {} for a file of another program.
        metadata: further text entries, as exports of this program carry them.
        samples: digest of the samples that it was trained on (`GazeTree.identity`), or None.
        unchanged_since: see `util.resume.unchanged_since`.
        device: "cuda" or "cpu", where its masks were drawn, or None.
        seen: `subject_marks` of the subjects whose images trained it, as far as the file says.
    """

    path: Path
    kind: str
    args: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    world_size: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    samples: str | None = None
    unchanged_since: tuple[int, int] = (0, 0)
    device: str | None = None
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class LoadReport:
    """Which keys of a file went into a model. `str()` gives the few lines that are printed.

    Attributes:
        path: the weights file.
        matched: names copied from the file into the model.
        missing: names of the model that the file lacks: they keep their values.
        ignored: names of the file that the model has no place for.
        notes: lines on what else was done or should be known.
    """

    path: Path
    matched: list[str]
    missing: list[str]
    ignored: list[str]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"Initial weights from {self.path}:"]
        for title in ("matched", "missing", "ignored"):
            keys = getattr(self, title)
            lines.append(f"  {title:8s}{len(keys):4d}  {summarize_keys(keys)}".rstrip())
        return "\n".join(lines + [f"  {note}" for note in self.notes])


def summarize_keys(keys: Iterable[str]) -> str:
    """Group state-dict names into a short text: "cls_token, patch_embed, blocks.0-11, norm.0-3"."""
    groups: dict[str, set[int]] = {}
    for key in keys:
        head, number, *_ = f"{key}..".split(".")
        groups.setdefault(head, set()).update([int(number)] if number.isdigit() else [])
    texts = []
    for head, numbers in groups.items():
        runs = [[n for _, n in run] for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])]
        spans = ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)
        texts.append(f"{head}.{spans}" if spans else head)
    return ", ".join(texts)


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Read the tensors of a weights file or folder, on the CPU, without running any code from it.

    Args:
        path: a file of torch.save (plain state dict, or a dict that keeps it under one of `WRAPPER_KEYS`), a
            `.safetensors` file, or a folder with one of `FOLDER_FILES`.

    Returns:
        Names without wrapper prefixes -> tensors, and what the file says about itself.

    Raises:
        UserError: the file is missing, cut short, damaged as far as its checksums tell, of another kind, holds no
            tensors by name, weights that are no finite numbers, or Python objects that could run code.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}; name a weights file")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    content = (_read_safetensors if path.suffix == ".safetensors" else _read_torch)(path)
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
    wrapper = next((key for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
    more = content if wrapper else {}
    state = {
        re.sub(_WRAPPED, "", str(name)): value for name, value in (content[wrapper] if wrapper else content).items()
    }
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        what = f"{other[0]!r} is no tensor" if other else "it is empty"
        raise UserError(
            f"{path}: no state dict in it ({what}); expected name -> tensor, plain or under "
            f"{' or '.join(map(repr, WRAPPER_KEYS))}"
        )
    check_weights(path, state)

    def entry(name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """What the file has under a name; another program's may be anything."""
        return more[name] if isinstance(more.get(name), kind) else default

    args = entry("args", (Mapping, argparse.Namespace), {})
    epoch = entry("epoch", (int, np.integer), None)
    metadata = {str(key): str(value) for key, value in entry("metadata", Mapping, {}).items()}
    return state, WeightsInfo(
        path=path,
        kind=_kind(state),
        args=dict(vars(args) if isinstance(args, argparse.Namespace) else args),
        epoch=None if epoch is None else int(epoch),
        world_size=entry("world_size", int, 1),
        config=dict(entry("model_config", Mapping, {})),
        metadata=metadata,
        samples=entry("samples", str, None),
        unchanged_since=tuple(entry("unchanged_since", list, (0, 0))),
        device=("cuda" if more["threads"] is None else "cpu") if "threads" in more else None,
        seen=frozenset(entry("seen", list, None) or json.loads(metadata.get("seen", "[]"))),
    )


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return {"state_dict": safetensors.torch.load_file(path), "metadata": metadata}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or export it again") from None


def _read_torch(path: Path) -> Any:
    verify_archive(path)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol: the errors below say what comes of it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: what torch raises depends on where a damaged file ends
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(Trying to [^\n]*)", str(error))
        if found:
            raise UserError(
                f"{path}: refused, it holds a Python object that could run code when opened "
                f"({found.group(1)}); save its state dict (tensors only) and pass that"
            ) from None
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable weights file, or cut short ({reason}); download or copy it again"
        ) from None


def _kind(state: Mapping[str, Tensor]) -> str:
    if not any(name.startswith("blocks.") for name in state):
        return "unknown"
    if any(re.fullmatch(r"norm\.\d+\.weight", name) for name in state):
        return "cxr-mim"
    return "mae" if any(name.startswith("decoder_") for name in state) else "vit"


def numbers(state: Iterable[str], group: str) -> set[int]:
    """The N of all names `group.N.*`."""
    matches = (re.match(rf"{re.escape(group)}\.(\d+)\.", name) for name in state)
    return {int(match.group(1)) for match in matches if match}


def refusal(path: object, unknown: list[str]) -> UserError:
    """Why a file with these unknown names is not read."""
    more = f" and {len(unknown) - 1} more names" if unknown[1:] else ""
    return UserError(
        f"{path}: {unknown[0]}{more} may belong to an encoder that is no plain ViT, which this program would compute "
        "wrongly; if not, save the encoder's state dict without them"
    )


def is_unknown(name: str) -> bool:
    """Whether a name, in timm's layout, is neither an encoder's nor known to stand behind one."""
    return not (ENCODER.fullmatch(name) or BEHIND.match(name.partition(".")[0]))


def resample_pos_embed(pos_embed: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resample a position embedding with one class row [1, 1+N, D] (square grid) to [1, 1+h*w, D].

    Bicubic with antialiasing (timm.layers.resample_abs_pos_embed); the same tensor where sizes agree.

    Raises:
        ValueError: N is not a square number, or another shape.
    """
    if pos_embed.ndim != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[1] < 2:
        raise ValueError(f"a position embedding of shape {list(pos_embed.shape)}")
    count = pos_embed.shape[1] - 1
    if count == grid[0] * grid[1]:
        return pos_embed
    if math.isqrt(count) ** 2 != count:
        raise ValueError(f"{count} patches are no square grid")
    return resample_abs_pos_embed(pos_embed, new_size=list(grid), num_prefix_tokens=1)


def load_initial_weights(model: nn.Module, path: str | os.PathLike) -> LoadReport:
    """Copy the weights in `path` into a CXRMIM model, in place, and report every key.

    The encoder (cls_token, pos_embed, patch_embed, blocks) comes from any kind of file. A timm or MAE
    file's single `norm` and its head are ignored, since the model has one norm for each tap (as
    published); MAE's decoder is ignored; a CXR-MIM checkpoint fills the decoders and norms too, less
    its fixed filters `hog_enc.*`. At another input size pos_embed is resampled, and the decoders' own
    pos_embed, which is a formula, stays.

    Args:
        model: unwrapped CXRMIM.
        path: whatever `read_state_dict` takes.

    Raises:
        UserError: a tensor has another shape than the model's, the encoder was trained with another
            number of heads or an unknown one, the file lacks a part of the model's encoder, or has tensors that may
            belong to another kind of encoder.
    """
    state, info = read_state_dict(path)
    own = model.state_dict()
    if not any(name.startswith("blocks.") and name in own for name in state):
        raise UserError(
            f"{info.path}: matches no transformer block of the model (its keys: "
            f"{summarize_keys(state)[:100]}); expected timm ViT names such as blocks.0.norm1.weight"
        )
    if unknown := [name for name in state if name not in own and is_unknown(name)]:
        raise refusal(info.path, unknown)
    notes: list[str] = []
    taken: dict[str, Tensor] = {}
    for name in filter(state.__contains__, own):
        tensor, wanted = state[name], own[name].shape
        if name.startswith("decoder.") and name.endswith("pos_embed") and tensor.shape != wanted:
            continue
        if name == "pos_embed" and tensor.shape != wanted and tensor.shape[-1] == wanted[-1]:
            try:
                tensor = resample_pos_embed(tensor, model.grid_size)
            except ValueError as error:
                raise UserError(f"{info.path}: pos_embed cannot be resampled: {error}") from None
            height, width = model.grid_size
            notes.append(f"pos_embed resampled from {state[name].shape[1] - 1} patches to {height} x {width} (bicubic)")
        if tensor.shape != wanted:
            found, needed = ("x".join(map(str, shape)) or "scalar" for shape in (tensor.shape, wanted))
            flags = "--hog_nbins, --scale_list or decoder" if name.startswith("decoder.") else "--model"
            raise UserError(
                f"{info.path}: {name} has shape {found}, the model needs {needed}; choose the {flags} it was trained with"
            )
        taken[name] = tensor
    lacking = [name for name in own if name.startswith(ENCODER_PREFIXES) and name not in taken]
    if lacking:
        raise UserError(
            f"{info.path}: lacks {summarize_keys(lacking)} of the model (first: {lacking[0]}); "
            "likely a file of another model size: choose the --model it was trained with"
        )
    heads, _ = attention_heads(state, info)
    if heads != model.config["num_heads"]:
        raise UserError(
            f"{info.path}: its encoder has {heads} attention heads, the model {model.config['num_heads']}; "
            "choose the --model it was trained with"
        )
    if info.kind == "cxr-mim":
        names = ("decoder_num_heads", "id_list", "scale_list")
        for name, theirs, ours in _differences({**info.args, **info.config}, model.config, names):
            notes.append(f"note: the file was trained with {name} {theirs}, this model has {ours}")

    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    model.seen = sorted(info.seen)
    matched, ignored = ([name for name in state if (name in taken) == wanted] for wanted in (True, False))
    return LoadReport(info.path, matched, [name for name in own if name not in taken], ignored, tuple(notes))


def check_same_model(config: Mapping[str, Any], own: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Whether weights saved by a model of `config` mean the same in a model of `own` (`CXRMIM.config`).

    Raises:
        UserError: they differ in more than `FREE_CONFIG`, though shapes may agree. {} passes.
    """
    differs = [
        f"{name} {theirs} there, {ours} here"
        for name, theirs, ours in _differences(config, own, [name for name in own if name not in FREE_CONFIG])
    ]
    if differs:
        raise UserError(f"{path}: of another model ({'; '.join(differs)}); choose the --model it was made with")


def _differences(config: Mapping[str, Any], own: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, theirs, ours) of what differs, as text; a list and a tuple of the same values don't."""
    texts = [
        (name, *(" ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in (config[name], own[name])))
        for name in names
        if name in config
    ]
    return [(name, theirs, ours) for name, theirs, ours in texts if theirs != ours]


def attention_heads(state: Mapping[str, Tensor], info: WeightsInfo, num_heads: int | None = None) -> tuple[int, str]:
    """Attention heads of a file's encoder, which no tensor's shape tells, and where they are known from.

    Args:
        num_heads: what the user says, for files that don't.

    Raises:
        UserError: the file doesn't say, and its size is none of `VIT_SIZES`, or one of `SEVERAL_HEADS`, or what the
            file says of its own size is another; or `num_heads` contradicts the file or does not divide the width.
    """
    width, depth = state["patch_embed.proj.weight"].shape[0], len(numbers(state, "blocks"))
    stored = info.config.get("num_heads", info.metadata.get("num_heads"))
    if stored is not None:
        if not (str(stored).isdecimal() and int(stored) and width % int(stored) == 0):
            raise UserError(
                f"{info.path}: says that its encoder has {stored!r} attention heads, which don't divide its width {width}"
            )
        if num_heads not in (None, int(stored)):
            raise UserError(f"--num_heads {num_heads}: {info.path} says that it has {stored}")
        return int(stored), "stored in the file"
    if num_heads is not None:
        if num_heads < 1 or width % num_heads:
            raise UserError(f"--num_heads {num_heads}: does not divide the width {width} of {info.path}")
        return num_heads, "--num_heads"
    size, heads, _ = VIT_SIZES.get((width, depth), ("", 0, 0))
    name = str(info.args.get("model") or f"vit_{size}")  # of its class, as MAE and this program store it
    ours = f"cxrmim_vit_{size}" in name
    if not size or f"vit_{size}" not in name or (size in SEVERAL_HEADS and not ours):
        raise UserError(
            f"{info.path}: the file does not say how many attention heads its encoder has (width {width}, "
            f"{depth} blocks{', ' + name if 'model' in info.args else ''}); say it with --num_heads "
            "(visualize.py, export_backbone.py, run_downstream.py; the other programs read the export)"
        )
    return heads, f"of {name}" if ours else f"of every ViT-{size}; the file does not say"
