"""From a radiograph to where radiologists look: an encoder of timm's, a decoder, the centre prior, a softmax.

    log p = log_softmax( network(image) + log_prior )

over the pixels of a map of a quarter of the input's side. `log_prior` is the logarithm of the training readings'
mean map, fixed; the network's last layer starts at zero, so that training starts from the centre prior and learns what
departs from it (the centre bias of saliency models; Kümmerer et al., "DeepGaze", 2015, use it likewise).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from util.checkpoint import load_checkpoint, restoring
from util.errors import UserError
from util.export import MISFITS
from util.weights import is_behind, resample_pos_embed, summarize_keys

STRIDE = 4  # pixels of the input for one of the map: a degree of visual angle is about 2 of the map's at 224 px
PRIOR_FLOOR = 1e-3  # share of a flat map in the prior, so that its logarithm is finite


class GazeNet(nn.Module):
    """Predicts a gaze density.

    The decoder adds each of the encoder's feature maps, from the coarsest to the finest, to what came from above (after
    Lin et al., "Feature Pyramid Networks", CVPR 2017). Maps of the input's stride 4 and coarser are used; a ViT has four
    of stride 16, and gets two upsampling steps behind them.

    Args:
        backbone: a timm name, or the same with `backbone_args` for an encoder of another size.
        input_size: side of the square that the whole image is resized to, a multiple of 32, at least 64.
        width: channels of the decoder, a multiple of 8.
        backbone_args: further arguments of `timm.create_model`.

    Attributes:
        encoder: timm's features-only model.
        seen: marks of the subjects that trained or validated it (`GazeStudy.seen`); checkpoints keep them.
        encoder_seen: marks of the subjects that pretrained its encoder.

    Raises:
        UserError: no such backbone, or another size.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        input_size: int = 224,
        width: int = 64,
        backbone_args: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if input_size % 32 or input_size < 64:
            raise UserError(f"--input_size {input_size}: must be divisible by 32, and at least 64")
        args = dict(backbone_args or {})
        self.config = {"backbone": backbone, "input_size": input_size, "width": width, "backbone_args": args}
        self.seen: list[str] = []
        self.encoder_seen: list[str] = []
        self.input_size = input_size
        self.map_size = input_size // STRIDE
        self.encoder = build_encoder(backbone, input_size, args)
        strides, channels = self.encoder.feature_info.reduction(), self.encoder.feature_info.channels()
        self.used = [i for i, stride in enumerate(strides) if stride >= STRIDE][::-1]  # coarsest first
        self.lateral = nn.ModuleList(nn.Conv2d(channels[i], width, 1) for i in self.used)
        self.mix = nn.ModuleList(_mix(width) for _ in self.used)
        finest = strides[self.used[-1]]
        self.up = nn.ModuleList(_mix(width) for _ in range((finest // STRIDE).bit_length() - 1))
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("log_prior", torch.zeros(self.map_size, self.map_size))
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None], persistent=False)

    def set_prior(self, prior: Tensor) -> None:
        """Take the centre prior, a density [G, G]."""
        flat = torch.full_like(prior, 1 / prior.numel())
        self.log_prior.copy_(((1 - PRIOR_FLOOR) * prior + PRIOR_FLOOR * flat).log())

    def forward(self, img: Tensor) -> Tensor:
        """Logarithm of the predicted density.

        Args:
            img: gray, uint8 0..255, [B, 1, S, S].

        Returns:
            float32 [B, G, G], G = S / 4; its exponential sums to 1 over the map.
        """
        features = self.encoder((img.float() / 255 - self.mean) / self.std)
        y = None
        for i, lateral, mix in zip(self.used, self.lateral, self.mix, strict=True):
            here = lateral(features[i])
            y = mix(here if y is None else here + _resize(y, here.shape[-2:]))
        for mix in self.up:
            y = mix(_resize(y, (2 * y.shape[-2], 2 * y.shape[-1])))
        logits = self.out(_resize(y, (self.map_size, self.map_size)))[:, 0].float() + self.log_prior
        return logits.flatten(1).log_softmax(1).view_as(logits)


def build_encoder(backbone: str, input_size: int, args: Mapping[str, Any]) -> nn.Module:
    """timm's features-only model with random weights; of a plain ViT, four evenly spaced blocks.

    Raises:
        UserError: timm has no such model, or can't give its feature maps.
    """

    def create(**options: Any) -> nn.Module:
        # "getter": the plain model inside, under its own names, with channels first, whatever its kind.
        return timm.create_model(
            backbone, pretrained=False, features_only=True, feature_cls="getter", **args, **options
        )

    try:
        try:
            size = {"img_size": input_size}
            probe = create(**size, out_indices=(0,))
        except TypeError:  # a convolutional network takes any size, and no img_size
            size = {}
            probe = create(out_indices=(0,))
        strides = [info["reduction"] for info in probe.feature_info.info]
        if len(set(strides)) > 1:
            return create(**size)
        last, step = len(strides) - 1, max(1, len(strides) // 4)
        return create(**size, out_indices=[last - k * step for k in range(min(4, len(strides)))][::-1])
    except MISFITS as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {backbone}: timm can't make feature maps of it: {message}") from None


def load_encoder(encoder: nn.Module, state: Mapping[str, Tensor], path: object) -> str:
    """Load an encoder's weights, under timm's names, into a features-only model; returns a line about it.

    The file must have every tensor of the model. It may have others outside of the model's parts (the head), which the
    line names. A ViT's position embedding is resampled to the input's size.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place inside the encoder.
    """
    own = encoder.model.state_dict()
    parts = {name.split(".")[0] for name in own}
    unused = [name for name in state if name not in own]
    attends = any("attn" in name for name in own)  # a transformer computes with tokens and tables of any name
    behind = [
        name for name in unused if is_behind(name) or name.startswith("norm.")
    ]  # timm's feature maps have no norm
    if more := [name for name in unused if name.split(".")[0] in parts or (attends and name not in behind)]:
        raise UserError(f"{path}: not the weights of this backbone, which has no {more[0]}; name theirs by --backbone")
    found = {name: state[name] for name in own if name in state}
    try:
        if "pos_embed" in found and found["pos_embed"].shape != own["pos_embed"].shape:
            side = round((own["pos_embed"].shape[1] - 1) ** 0.5)
            found["pos_embed"] = resample_pos_embed(found["pos_embed"], (side, side))
        encoder.model.load_state_dict(found)
    except (RuntimeError, ValueError) as error:
        message = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not the weights of this backbone, or not for this --input_size: {message}") from None
    rest = f", not used: {summarize_keys(unused)[:80]}" if unused else ""
    return f"encoder weights from {path}: {len(found)} tensors{rest}"


def load_gaze_net(path: str | os.PathLike) -> GazeNet:
    """The model of a checkpoint file of run_gaze.py, on the CPU in eval mode; see `restore_gaze_net`."""
    return restore_gaze_net(load_checkpoint(path), path)


def restore_gaze_net(state: Mapping[str, Any], path: str | os.PathLike) -> GazeNet:
    """The model of a checkpoint's content, on the CPU in eval mode.

    Raises:
        UserError: a checkpoint of something else, or of a backbone that timm doesn't have; names `path`.
    """
    if "config" not in state:
        raise UserError(f"{path}: not a gaze predictor; pass a checkpoint of run_gaze.py")
    with restoring(path):
        model = GazeNet(**state["config"])
        model.load_state_dict(state["model"])
        model.seen, model.encoder_seen = list(state["seen"]), list(state["encoder_seen"])
    return model.eval()


def _mix(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
