"""best.pth: a fine-tuned model with its labels, for timm, for other programs, and to be judged on other data."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from downstream.encoders import Candidate
from util.errors import UserError
from util.export import attention_heads_of
from util.files import atomic_write
from util.weights import read_state_dict

BEST = "best.pth"


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model as best.pth has it.

    Attributes:
        labels: what its outputs are.
        mean, std: of its input.
        reading: options of `downstream.data.images.Reading` that mattered to its images.
        dataset, fraction, seed: what it was trained on, with which share of the labels and seed.
        seen: `subject_marks` of the subjects that trained or validated it, or pretrained its encoder.
    """

    model: VisionTransformer
    labels: list[str]
    task: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    reading: dict[str, Any]
    dataset: str
    fraction: float
    seed: int
    seen: frozenset[str]


def write_tuned(
    path: Path,
    state: Mapping[str, Tensor],
    candidate: Candidate,
    model: VisionTransformer,
    *,
    pool: str,
    labels: Sequence[str],
    **facts: Any,
) -> None:
    """Write `state` and what `read_tuned` and `timm.create_model(timm_model, **timm_args, checkpoint_path=...)`
    need; whole or not at all.

    Args:
        facts: the other fields of `Tuned`, and more to be kept.
    """
    name, arguments = candidate.model
    arguments = arguments | {"num_classes": len(labels)}
    if "cls_token" in candidate.encoder.state:
        arguments["global_pool"] = pool
    if candidate.encoder.block is not None:
        arguments["depth"] = len(model.blocks)
    heads = attention_heads_of(model)
    metadata = {
        "timm_model": name,
        "timm_args": json.dumps(arguments),
        **({} if heads is None else {"num_heads": str(heads)}),
        "labels": json.dumps(list(labels)),
        "weights": candidate.name,
    } | {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    buffer = io.BytesIO()
    torch.save({"state_dict": dict(state), "metadata": metadata}, buffer)
    try:
        with atomic_write(path) as file:
            file.write(buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; make room") from None


def read_tuned(path: str | os.PathLike) -> Tuned:
    """The model of a best.pth, on the CPU.

    Raises:
        UserError: another kind of file, one that is damaged, or of a model that this timm lacks.
    """
    state, info = read_state_dict(path)
    facts = info.metadata
    try:
        model = timm.create_model(facts["timm_model"], **json.loads(facts["timm_args"]))
        model.load_state_dict(state)
        return Tuned(
            model,
            json.loads(facts["labels"]),
            facts["task"],
            tuple(json.loads(facts["mean"])),
            tuple(json.loads(facts["std"])),
            json.loads(facts["reading"]),
            facts["dataset"],
            float(facts["fraction"]),
            int(facts["seed"]),
            info.seen,
        )
    except KeyError as error:
        raise UserError(
            f"{info.path}: not a {BEST} of --method finetune ({error} is not in its metadata); "
            "only those can be judged without training"
        ) from None
    except RuntimeError as error:  # timm's, of names and tensors
        raise UserError(f"{info.path}: not a model of this timm: {' '.join(str(error).split())[:200]}") from None
