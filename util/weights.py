"""Reading weights of several origins safely, and starting a model from them.

A weights file may be a plain timm ViT state dict, an MAE checkpoint, a CXR-MIM checkpoint of the
published code or of this one, a `.safetensors` file, or a Hugging Face-style folder. None of them is
ever allowed to run code: files are opened with `weights_only=True`, and beside tensors and plain types
only `argparse.Namespace` and NumPy scalars are accepted, which MAE-style programs store under "args".
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from util.architecture import FREE_CONFIG, config_of_older_file, notes_on_config
from util.checkpoint import check_weights, verify_archive
from util.errors import UserError
from util.foreign_weights import is_unknown, refusal

FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
WRAPPER_KEYS = ("model", "state_dict", "teacher", "student")  # where checkpoints keep the tensors
WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # left by DistributedDataParallel and torch.compile

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
        args: the training arguments stored in it as a plain dict, {} where there are none.
        epoch: last finished epoch stored in it, or None.
        world_size: number of processes it was trained with.
        config: arguments of the model's constructor (`CXRMIM.config`), {} where the file has none:
            one of another program, or of this one before it kept them.
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
        head, _, rest = key.partition(".")
        number = rest.partition(".")[0]
        groups.setdefault(head, set())
        if number.isdigit():
            groups[head].add(int(number))
    texts = []
    for head, numbers in groups.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        texts.append(f"{head}.{spans}" if spans else head)
    return ", ".join(texts)


def read_state_dict(path: str | os.PathLike) -> tuple[dict[str, Tensor], WeightsInfo]:
    """Read the tensors of a weights file or folder, on the CPU, without running any code from it.

    Args:
        path: a file of torch.save (plain state dict, or a dict that keeps it under "model" or
            "state_dict"), a `.safetensors` file, or a folder with one of `FOLDER_FILES`.

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
    content: Mapping[str, Any]
    state_is_wrapped = False
    if path.suffix == ".safetensors":
        content, metadata = _read_safetensors(path)
        state = content
    else:
        verify_archive(path)
        content = _read_torch(path)
        if not isinstance(content, Mapping):
            raise UserError(f"{path}: holds a {type(content).__name__}, not a state dict")
        wrapper = next((key for key in WRAPPER_KEYS if isinstance(content.get(key), Mapping)), None)
        state_is_wrapped = wrapper is not None
        state = content[wrapper] if wrapper else content
        metadata = content.get("metadata") if wrapper else None
        metadata = metadata if isinstance(metadata, Mapping) else {}  # another program's may be anything
    state = {_strip_prefixes(str(name)): value for name, value in state.items()}
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other or not state:
        what = f"{other[0]!r} is no tensor" if other else "it is empty"
        raise UserError(
            f"{path}: no state dict in it ({what}); expected name -> tensor, plain or under "
            f"{' or '.join(map(repr, WRAPPER_KEYS))}"
        )
    check_weights(path, state)
    more = content if state_is_wrapped else {}
    args = more.get("args")
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    epoch, world_size, config = more.get("epoch"), more.get("world_size"), more.get("model_config")
    return state, WeightsInfo(
        path=path,
        kind=_kind(state),
        args=dict(args) if isinstance(args, Mapping) else {},
        epoch=int(epoch) if isinstance(epoch, (int, np.integer)) else None,
        world_size=world_size if isinstance(world_size, int) else 1,
        config=dict(config) if isinstance(config, Mapping) else {},
        metadata={str(key): str(value) for key, value in metadata.items()},
        samples=samples if isinstance(samples := more.get("samples"), str) else None,
        unchanged_since=tuple(more.get("unchanged_since", (0, 0))),
        device=("cuda" if more["threads"] is None else "cpu") if "threads" in more else None,
        seen=_marks(more.get("seen") or metadata.get("seen")),
    )


def _marks(told: Any) -> frozenset[str]:
    """`WeightsInfo.seen` from a list, or from its JSON in an export; empty for another program's entry."""
    with contextlib.suppress(ValueError):
        told = json.loads(told) if isinstance(told, str) else told
    return frozenset(map(str, told)) if isinstance(told, list) else frozenset()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return safetensors.torch.load_file(path), metadata
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy or export it again") from None


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol: what comes of it is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: what torch raises depends on where a damaged file ends
        found = re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"Trying to [^\n]*", str(error))
        if found:
            raise UserError(
                f"{path}: refused, it holds a Python object that could run code when opened "
                f"({found.group(found.lastindex or 0)}); save its state dict (tensors only) and pass that"
            ) from None
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(
            f"{path}: not a readable weights file, or cut short ({reason}); download or copy it again"
        ) from None


def _strip_prefixes(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _kind(state: Mapping[str, Tensor]) -> str:
    if not any(name.startswith("blocks.") for name in state):
        return "unknown"
    if any(re.fullmatch(r"norm\.\d+\.weight", name) for name in state):
        return "cxr-mim"
    return "mae" if any(name.startswith("decoder_") for name in state) else "vit"


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
            number of heads or an unknown one, the file has no transformer block that the model has, lacks some of
            its blocks, or has tensors that may belong to another kind of encoder.
    """
    state, info = read_state_dict(path)
    own = model.state_dict()
    encoder_blocks = {name for name in own if name.startswith("blocks.")}
    if not encoder_blocks & state.keys():
        raise UserError(
            f"{info.path}: matches no transformer block of the model (its keys: "
            f"{_shorten(summarize_keys(state))}); expected timm ViT names such as blocks.0.norm1.weight"
        )

    if unknown := [name for name in state if name not in own and is_unknown(name)]:
        raise UserError(refusal(info.path, unknown))
    notes: list[str] = []
    taken: dict[str, Tensor] = {}
    ignored: list[str] = []
    for name, tensor in state.items():
        if name not in own:
            ignored.append(name)
            continue
        wanted = own[name].shape
        if tensor.shape != wanted and name.startswith("decoder.") and name.endswith("pos_embed"):
            ignored.append(name)
            continue
        if name == "pos_embed" and tensor.shape != wanted and tensor.shape[-1] == wanted[-1]:
            grid = model.grid_size
            try:
                tensor = resample_pos_embed(tensor, grid)
            except ValueError as error:
                raise UserError(
                    f"{info.path}: pos_embed of shape {_shape(tensor)} cannot be resampled: {error}"
                ) from None
            notes.append(
                f"pos_embed resampled from {state[name].shape[1] - 1} patches to {grid[0]} x {grid[1]} (bicubic)"
            )
        if tensor.shape != wanted:
            raise UserError(_shape_message(info.path, name, tensor, own[name]))
        taken[name] = tensor
    lacking = sorted(encoder_blocks - taken.keys())
    if lacking:
        raise UserError(
            f"{info.path}: lacks {summarize_keys(lacking)} of the model (first: {lacking[0]}); "
            "likely a file of another model size: choose the --model it was trained with"
        )
    notes = [*notes_on_config(state, info, model.config), *notes]

    with torch.no_grad():
        for name, tensor in taken.items():
            own[name].copy_(tensor)
    model.seen = sorted(info.seen)
    missing = [name for name in own if name not in taken]
    return LoadReport(info.path, list(taken), missing, ignored, tuple(notes))


def build_model(
    constructor: Callable[..., nn.Module],
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build the CXRMIM that a CXR-MIM checkpoint was trained as, and load all its weights.

    The constructor's arguments are those stored in the file. Where it has none (published checkpoints,
    and those of this program from before it stored them), sizes are read off the tensors, and what
    tensors don't tell (id_list, scale_list, attention heads) comes from the stored command line.

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
    if _kind(state) != "cxr-mim" or not any(name.startswith("decoder.0.") for name in state):
        raise UserError(
            f"{path}: not a CXR-MIM checkpoint with decoders (its keys: "
            f"{_shorten(summarize_keys(state))}); pass a checkpoint-*.pth of pretraining"
        )
    args = {**info.args, **(args or {})}
    free = {name: args[name] for name in FREE_CONFIG if args.get(name) is not None}
    try:
        config = info.config or config_of_older_file(state, info, args)
        model = constructor(**config | free)
        model.load_state_dict(state)
    except KeyError as error:
        raise UserError(f"{path}: an incomplete CXR-MIM checkpoint, it lacks {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: its tensors and arguments don't fit together: {' '.join(str(error).split())[:300]}"
        ) from None
    return model.eval()


def _shape_message(path: Path, name: str, found: Tensor, wanted: Tensor) -> str:
    if not name.startswith("decoder."):
        cause = "a file of another model size: choose the --model it was trained with"
    elif ".pred." in name:
        cause = "a checkpoint trained with other --hog_nbins, --scale_list or decoder width"
    else:
        cause = "a checkpoint trained with another decoder width"
    return f"{path}: {name} has shape {_shape(found)}, the model needs {_shape(wanted)}; likely {cause}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
