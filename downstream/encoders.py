"""The encoders that are compared: named files, ImageNet weights, random weights, and no encoder at all."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from downstream.data.images import normalisation
from downstream.hugging_face import FolderEncoder, is_transformers_folder
from util.download import address_name, local_file
from util.errors import UserError
from util.export import MISFITS, Encoder, build_encoder, create_timm, named_encoder, read_encoder, split_model
from util.weights import key_report

RANDOM, IMAGENET, PIXELS = "random", "imagenet", "pixels"
DEFAULT_MODEL = "vit_base_patch16_224"  # of random weights that stand alone
PIXEL_SIDE = 56  # of the baseline without a network: a quarter of 224
Scale = tuple[Sequence[float], Sequence[float]]  # mean and std of the input's three channels


class Pixels(nn.Module):
    """No encoder: the features are gray values."""

    source = f"no encoder, gray values of {PIXEL_SIDE} x {PIXEL_SIDE} px"
    architecture = ()
    scaling = (0.0,) * 3, (1.0,) * 3
    patch_embed = SimpleNamespace(img_size=(224, 224))

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images[:, 0], PIXEL_SIDE)

    def forward_head(self, found: Tensor, pre_logits: bool = True) -> Tensor:
        return found.flatten(1)


@dataclass(frozen=True)
class Candidate:
    """One line of the results: a name and an encoder.

    Attributes:
        kind: "file", or one of the three words.
        encoder: what is loaded; for "random" whose architecture it has; None if there is a module.
        module: for "pixels" and a folder of transformers, the model itself.
    """

    name: str
    kind: str
    encoder: Encoder | None = None
    module: nn.Module | None = None

    @property
    def seen(self) -> frozenset[str]:
        """`subject_marks` of the subjects whose images trained it, as far as its file says."""
        return self.encoder.source.seen if self.encoder and self.kind != RANDOM else frozenset()

    @property
    def architecture(self) -> Sequence:
        """What the weights' own numbers don't show of the model, such as how many heads share them: plain content."""
        encoder = self.encoder
        return [encoder.timm_name, encoder.timm_args, encoder.block] if encoder else self.module.architecture

    def normalisation(self, name: str | None) -> Scale:
        """Mean and std of the input, by --normalisation or, without it, as the encoder's configuration says."""
        if self.kind == IMAGENET:  # timm's configuration says 0.5, whatever ours were pretrained with
            return normalisation("half")
        own = (self.encoder or self.module).scaling
        return own if self.kind == PIXELS or (own and name is None) else normalisation(name or "half")

    def build(self, n_outputs: int = 0, *, seed: int = 0, **options) -> nn.Module:
        """The model; of an inner tap with the blocks up to that tap only, as its norm was trained.

        Args:
            n_outputs: of a linear head; 0: none.
            seed: of "random" weights; those that stay frozen are the same for all seeds of the heads, which are the
                caller's to start.
            options: of `timm.create_model`.
        """
        if self.module:
            return self.module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_encoder(self.encoder, n_outputs, trained=self.kind != RANDOM, **options)
        if self.encoder.block is not None:
            model.blocks = model.blocks[: self.encoder.block + 1]
        return model


def named_files(texts: Sequence[str]) -> list[tuple]:
    """(name, path, timm's model or None) of NAME=FILE or NAME=FILE@TIMM_MODEL, or without NAME, which is then the
    file's; addresses are downloaded (`local_file`).

    Raises `UserError` for a name twice, before anything is downloaded.
    """
    found = {}
    for text in texts:
        file, model = split_model(text)
        alone = address_name(file)  # an address may have an equals sign in it
        name, equals, path = ("", "", file) if alone else file.partition("=")
        if not equals:
            name, path = text if file == RANDOM else Path(alone or file).stem, file
        if not (name and path and name.isprintable()):
            raise UserError(f"--weights {text!r}: expected NAME=FILE, NAME=FILE@TIMM_MODEL, imagenet, random or pixels")
        if name in found:
            raise UserError(f"--weights: {name} is named twice; give each NAME=FILE a name of its own")
        found[name] = path, model
    return [(name, local_file(path), model) for name, (path, model) in found.items()]


def read_candidates(
    texts: Sequence[str], *, imagenet: str | Path, img_size: int | None = None, num_heads: int | None = None
) -> list[Candidate]:
    """What `--weights` names: each NAME=FILE, FILE, FILE@TIMM_MODEL, a folder of transformers, imagenet, random,
    random@TIMM_MODEL or pixels.

    `random` copies the architecture of the first file, cut off at its tap likewise.

    Raises:
        UserError: a name twice, a file that can't be read, or less than a whole encoder in it.
    """
    candidates = []
    for text, (name, path, model) in zip(texts, named_files(texts), strict=True):
        kind, encoder, module = text if text in (RANDOM, IMAGENET, PIXELS) else "file", None, None
        if path == RANDOM and model:
            kind, encoder = RANDOM, _untrained(model, img_size)
        elif kind == PIXELS:
            module = Pixels()
        elif kind == IMAGENET:
            path = local_file(imagenet)
            if not Path(path).exists():
                raise UserError(
                    f"--weights imagenet: {path} is not there; scripts/fetch_weights.py makes it, or give its path with --imagenet"
                )
            encoder = read_encoder(path, img_size=img_size)
        elif kind == "file" and is_transformers_folder(path):
            module = FolderEncoder(path, img_size)
        elif kind == "file":
            encoder = read_encoder(path, model, img_size=img_size, num_heads=num_heads)
        candidates.append(Candidate(name, kind, encoder, module))
    files = [c.encoder for kind in ("file", IMAGENET) for c in candidates if c.kind == kind and c.encoder]

    def alike() -> Encoder:
        return files[0] if files else replace(_untrained(DEFAULT_MODEL, img_size), scaling=None)

    return [c if c.encoder or c.module else replace(c, encoder=alike()) for c in candidates]


def _untrained(timm_model: str, img_size: int | None) -> Encoder:
    try:
        model, args = create_timm(timm_model, img_size=img_size, num_classes=0)
    except MISFITS as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--weights random@{timm_model}: timm can't make it: {message}; e.g. {DEFAULT_MODEL}") from None
    return named_encoder(timm_model, model, args)


def input_size(model: nn.Module) -> tuple[int, int]:
    """Height and width that a model takes."""
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return tuple(fixed or model.pretrained_cfg["input_size"][-2:])


def pooled(model: nn.Module, found: Tensor) -> dict[str, Tensor]:
    """The features [B, D] that a head may see, by name, of what a model's `forward_features` gives.

    They are the class token, if there is one, and the mean of the patches' tokens, without registers and the like; and
    of a model without tokens, such as a ResNet, its own pooling.
    """
    n_before = getattr(model, "num_prefix_tokens", None)
    if n_before is None or found.ndim != 3:
        return {"pooled": model.forward_head(found, pre_logits=True)}
    features = {"cls": found[:, 0]} if getattr(model, "cls_token", None) is not None else {}
    features["mean of patches"] = found[:, n_before:].mean(1)
    return {name: model.fc_norm(feature) for name, feature in features.items()}


def digest_of(model: nn.Module) -> str:
    """SHA-256 of a model's tensors by name, in hexadecimal: the same for the same numbers from any file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(candidate: Candidate, normalisation: str | None = None) -> str:
    """What was found in a file, or what stands in for one."""
    encoder = candidate.encoder
    mean, std = (", ".join(f"{value:g}" for value in values) for values in candidate.normalisation(normalisation))
    scaled = f"input {input_size(candidate.build())[0]} px, mean {mean}, std {std}"
    if encoder is None:
        return f"{candidate.name}: {candidate.module.source}; {scaled}"
    if candidate.kind == RANDOM:
        return f"{candidate.name}: random weights, {encoder.timm_name}; {scaled}"
    heads = f", {encoder.num_heads} heads ({encoder.heads_from})" if encoder.num_heads else ""
    keys = key_report(matched=list(encoder.state), missing=[], ignored=encoder.ignored)
    return f"{candidate.name}: {encoder.source.path}, {encoder.timm_name}{heads}; {scaled}\n{keys}"
