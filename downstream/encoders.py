"""The encoders that are compared: named files, ImageNet weights, random weights, and no encoder at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from util.download import address_name, local_file
from util.errors import UserError
from util.export import Backbone, build_backbone, read_backbone
from util.weights import summarize_keys

RANDOM, IMAGENET, PIXELS = "random", "imagenet", "pixels"
RANDOM_SEED = 0  # of random weights that stay frozen: the same for all seeds of the heads
DEFAULT_MODEL = "vit_base_patch16_224"  # of random weights that stand alone


@dataclass(frozen=True)
class Candidate:
    """One line of the results: a name and an encoder.

    Attributes:
        kind: "file", or one of the three words.
        backbone: what is loaded; for "random" the architecture that it copies, or None; None for "pixels".
        timm_name: for "random" weights that copy none.
    """

    name: str
    kind: str
    backbone: Backbone | None = None
    timm_name: str = DEFAULT_MODEL

    @property
    def seen(self) -> frozenset[str]:
        """`subject_marks` of the subjects whose images trained it, as far as its file says."""
        return frozenset() if self.backbone is None or self.kind == RANDOM else self.backbone.source.seen

    @property
    def model(self) -> tuple[str, dict]:
        """Name and arguments of `timm.create_model`."""
        return (self.timm_name, {}) if self.backbone is None else (self.backbone.timm_name, self.backbone.timm_args)

    @property
    def architecture(self) -> list:
        """What the weights' own numbers don't tell of the model, such as how many heads share them: plain content."""
        return [self.timm_name] if self.backbone is None else [*self.model, self.backbone.block]

    def build(self, n_outputs: int = 0, *, seed: int = RANDOM_SEED, **options) -> VisionTransformer:
        """timm's model; of an inner tap with the blocks up to that tap only, as its norm was trained.

        Args:
            n_outputs: of a linear head; 0: none.
            seed: of "random" weights. (A head is the caller's to start.)
            options: of `timm.create_model`.
        """
        if self.kind != RANDOM:
            model = build_backbone(self.backbone, n_outputs, **options)
        else:
            name, args = self.model
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = timm.create_model(name, num_classes=n_outputs, **args, **options)
        if self.backbone is not None and self.backbone.block is not None:
            model.blocks = model.blocks[: self.backbone.block + 1]
        return model


def named_files(texts: Sequence[str]) -> list[tuple[str, str]]:
    """(name, path) of NAME=FILE, or of FILE, which then gives the name; addresses are downloaded (`local_file`).

    Raises `UserError` for a name twice, before anything is downloaded.
    """
    found = []
    for text in texts:
        alone = address_name(text)  # an address may have an equals sign in it
        name, equals, path = ("", "", "") if alone else text.partition("=")
        if equals and not (name and path):
            raise UserError(f"--weights {text}: expected NAME=FILE, imagenet, random or pixels")
        if not equals:
            name, path = Path(alone or text).stem, text
        if not name.isprintable() or name != name.strip():
            raise UserError(f"--weights {name!r}: a name of printable characters without blanks around it")
        if name in (other for other, _ in found):
            raise UserError(f"--weights: {name} is named twice; give each NAME=FILE a name of its own")
        found.append((name, path))
    return [(name, local_file(path)) for name, path in found]


def read_candidates(
    texts: Sequence[str],
    *,
    imagenet: str | Path,
    random_model: str | None = None,
    tap: str = "last",
    img_size: int | None = None,
    num_heads: int | None = None,
) -> list[Candidate]:
    """What `--weights` names, each NAME=FILE, FILE, imagenet, random or pixels; read, and reported in print.

    `random` copies the architecture of the first file, cut off at its tap likewise, unless `random_model` names one
    of timm's.

    Raises:
        UserError: a name twice, a file that can't be read, less than a whole encoder in it, or a model that is no ViT
            of timm's.
    """
    if random_model is not None:
        _check_model(random_model, texts)
    candidates = []
    for text, (name, path) in zip(texts, named_files(texts), strict=True):
        kind = text if text in (RANDOM, IMAGENET, PIXELS) else "file"
        backbone = None
        if kind == IMAGENET:
            imagenet = local_file(imagenet)
            if not Path(imagenet).exists():
                raise UserError(
                    f"--weights imagenet: {imagenet} is not there; scripts/fetch_weights.py makes it, or name it "
                    "by --imagenet"
                )
            backbone = read_backbone(imagenet, img_size=img_size)
        elif kind == "file":
            backbone = read_backbone(path, tap=tap, img_size=img_size, num_heads=num_heads)
        candidates.append(Candidate(name, kind, backbone))
    if random_model is not None:
        return [replace(c, timm_name=random_model) if c.kind == RANDOM else c for c in candidates]
    templates = [c.backbone for kind in ("file", IMAGENET) for c in candidates if c.kind == kind]
    template = templates[0] if templates else None
    return [replace(c, backbone=template) if c.kind == RANDOM else c for c in candidates]


def _check_model(name: str, texts: Sequence[str]) -> None:
    """`UserError` for a --random_model that names no ViT, or that no `random` among --weights asks for."""
    if RANDOM not in texts:
        raise UserError(f"--random_model {name}: has no effect without random among --weights; leave it out")
    if name not in timm.list_models(module="vision_transformer"):
        raise UserError(f"--random_model {name}: no such ViT in timm; e.g. {DEFAULT_MODEL}")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    if type(model) is not VisionTransformer or model.cls_token is None or model.num_prefix_tokens != 1:
        raise UserError(f"--random_model {name}: has no cls token before its patches; e.g. {DEFAULT_MODEL}")


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's tensors by name, in hexadecimal: the same for the same numbers from any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(candidate: Candidate) -> str:
    """What was found in a file, or what stands in for one."""
    backbone = candidate.backbone
    if candidate.kind == PIXELS:
        return f"{candidate.name}: no encoder, gray values of 56 x 56 px"
    if candidate.kind == RANDOM:
        depth = "" if backbone is None else f" of {backbone.depth} blocks"
        return f"{candidate.name}: random weights, {candidate.model[0]}{depth}"
    lines = [
        f"{candidate.name}: {backbone.source.path}, {backbone.timm_name}, {backbone.num_heads} heads ({backbone.heads_from})"
        + (f", prefix {backbone.prefix}" if backbone.prefix else "")
    ]
    for title, names in (("matched", list(backbone.state)), ("missing", []), ("ignored", list(backbone.ignored))):
        lines.append(f"  {title:8s}{len(names):4d}  {summarize_keys(names)[:160]}".rstrip())
    return "\n".join(lines)
