"""From a radiograph to where radiologists look: an encoder of timm's, a decoder, the centre prior, a softmax.

    log p = log_softmax( network(image) + log_prior )

over the pixels of a map of a quarter of the input's side. `log_prior` is the logarithm of the training readings'
mean map, fixed; the network's last layer starts at zero, so that training starts from the centre prior and learns what
departs from it (the centre bias of saliency models; Kümmerer et al., "DeepGaze", 2015, use it likewise).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from util.checkpoint import load_checkpoint, restoring
from util.errors import UserError
from util.export import MISFITS, create_timm

STRIDE = 4  # pixels of the input for one of the map: a degree of visual angle is about 2 of the map's at 224 px
PRIOR_FLOOR = 1e-3  # share of a flat map in the prior, so that its logarithm is finite


class GazeNet(nn.Module):
    """Predicts a gaze density.

    The decoder adds each of the encoder's feature maps, from the coarsest to the finest, to what came from above (after
    Lin et al., "Feature Pyramid Networks", CVPR 2017). A ViT has four of stride 16, and gets two upsampling steps
    behind them.

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
        self.input_size, self.map_size = input_size, input_size // STRIDE
        self.encoder = feature_maps(backbone, input_size, args)
        channels, strides = self.encoder.feature_info.channels(), self.encoder.feature_info.reduction()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels[::-1])  # coarsest first
        self.mix = nn.ModuleList(_mix(width) for _ in channels)
        self.up = nn.ModuleList(_mix(width) for _ in range((strides[0] // STRIDE).bit_length() - 1))
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
        for feature, lateral, mix in zip(features[::-1], self.lateral, self.mix, strict=True):
            here = lateral(feature)
            y = mix(here if y is None else here + _resize(y, here.shape[-2:]))
        for mix in self.up:
            y = mix(_resize(y, (2 * y.shape[-2], 2 * y.shape[-1])))
        logits = self.out(_resize(y, (self.map_size, self.map_size)))[:, 0].float() + self.log_prior
        return logits.flatten(1).log_softmax(1).view_as(logits)


def feature_maps(backbone: str, input_size: int, args: Mapping[str, Any]) -> nn.Module:
    """timm's features-only model with random weights: its maps of stride 4 and coarser, or, if all are of one stride as
    a ViT's, those of four evenly spaced blocks.

    Raises:
        UserError: timm has no such model, or can't give its feature maps.
    """
    # "getter": the plain model inside, under its own names, with channels first, whatever its kind.
    create = partial(create_timm, backbone, img_size=input_size, features_only=True, feature_cls="getter", **args)
    try:
        probe, _ = create(out_indices=(0,))
        strides = [info["reduction"] for info in probe.feature_info.info]
        chosen = [i for i, stride in enumerate(strides) if stride >= STRIDE]
        if len({*strides}) == 1:
            chosen = sorted(chosen[:: -max(1, len(chosen) // 4)][:4])
        return create(out_indices=chosen)[0]
    except MISFITS as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {backbone}: timm can't make feature maps of it: {message}") from None


def load_gaze_net(path: str | os.PathLike) -> GazeNet:
    """`gaze_net_of` a checkpoint's file."""
    return gaze_net_of(load_checkpoint(path), path)


def gaze_net_of(state: Mapping[str, Any], path: str | os.PathLike) -> GazeNet:
    """The model of a checkpoint of run_gaze.py, read from `path`, on the CPU in eval mode.

    Raises:
        UserError: a file of something else, or of a backbone that timm doesn't have.
    """
    if "config" not in state:
        raise UserError(f"{path}: not a gaze predictor; pass a checkpoint of run_gaze.py")
    with restoring(path):
        model = GazeNet(**state["config"])
        model.load_state_dict(state["model"])
        model.seen, model.encoder_seen = state["seen"], state["encoder_seen"]
    return model.eval()


def _mix(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
