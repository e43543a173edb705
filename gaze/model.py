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

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from util.checkpoint import CheckpointError, load_checkpoint, restoring
from util.errors import UserError
from util.export import MISFITS, create_timm, load_timm
from util.weights import summarize_keys

STRIDE = 4  # pixels of the input for one of the map: a degree of visual angle is about 2 of the map's at 224 px
PRIOR_FLOOR = 1e-3  # share of a flat map in the prior, so that its logarithm is finite


class GazeNet(nn.Module):
    """Predicts a gaze density.

    The decoder adds each of the encoder's feature maps, from the coarsest to the finest, to what came from above (after
    Lin et al., "Feature Pyramid Networks", CVPR 2017). Maps of the input's stride 4 and coarser are used; a ViT has four
    of stride 16, and gets two upsampling steps behind them.

    Args:
        backbone: a timm name, or the same with `backbone_args` for an encoder of another size.
        input_size: side of the square that the whole image is resized to, a multiple of 32.
        width: channels of the decoder, a multiple of 8.
        backbone_args: further arguments of `timm.create_model`.

    Attributes:
        encoder: timm's features-only model.
        seen: who trained or validated it, as `GazeStudy.seen` tells them; checkpoints keep it.
        encoder_seen: likewise, whose images and gaze pretrained its encoder.

    Raises:
        UserError: no such backbone, or a size that is no multiple of 32.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        input_size: int = 224,
        width: int = 64,
        backbone_args: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if input_size % 32:
            raise UserError(f"--input_size {input_size}: must be divisible by 32")
        args = dict(backbone_args or {})
        self.config = {"backbone": backbone, "input_size": input_size, "width": width, "backbone_args": args}
        self.seen: list[str] = []
        self.encoder_seen: list[str] = []
        self.input_size = input_size
        self.map_size = input_size // STRIDE
        self.encoder, _ = create_timm(backbone, **encoder_options(backbone, input_size, args))
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
            found = features[i]
            if found.shape[1] != lateral.in_channels:  # Swin and its kin: channels last
                found = found.permute(0, 3, 1, 2)
            here = lateral(found)
            y = mix(here if y is None else here + _resize(y, here.shape[-2:]))
        for mix in self.up:
            y = mix(_resize(y, (2 * y.shape[-2], 2 * y.shape[-1])))
        logits = self.out(_resize(y, (self.map_size, self.map_size)))[:, 0].float() + self.log_prior
        return logits.flatten(1).log_softmax(1).view_as(logits)


def encoder_options(backbone: str, input_size: int, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `create_timm` for the features-only model; of a plain ViT four blocks are taken, evenly spaced.

    Raises:
        UserError: timm has none of this name, or can't give its feature maps.
    """
    options = {**args, "img_size": input_size, "features_only": True}
    try:
        probe, _ = create_timm(backbone, **options, out_indices=(0,))
    except MISFITS as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"--backbone {backbone}: timm can't make feature maps of it: {message}") from None
    strides = [info["reduction"] for info in probe.feature_info.info]
    if len(set(strides)) == 1:
        last, step = len(strides) - 1, max(1, len(strides) // 4)
        options["out_indices"] = [last - k * step for k in range(min(4, len(strides)))][::-1]
    return options


def load_encoder(model: GazeNet, state: Mapping[str, Tensor], path: object) -> str:
    """Put a file's tensors into the encoder; returns a line about it.

    Raises:
        UserError: these are not the weights of this backbone, whole and without more (`load_timm`).
    """
    name, size, args = (model.config[key] for key in ("backbone", "input_size", "backbone_args"))
    encoder, _, ignored = load_timm(name, state, path, num_classes=0, **encoder_options(name, size, args))
    model.encoder = encoder.train(model.training)
    rest = f", not used: {summarize_keys(ignored)[:80]}" if ignored else ""
    return f"encoder weights from {path}: {len(state) - len(ignored)} tensors{rest}"


def load_gaze_net(path: str | os.PathLike) -> GazeNet:
    """The model of a checkpoint of run_gaze.py, on the CPU in eval mode.

    Raises:
        UserError: a file that can't be read, or a checkpoint of something else.
    """
    state = load_checkpoint(path)
    config, weights = state.get("config"), state["model"]
    if not isinstance(config, dict) or "log_prior" not in weights:
        raise UserError(f"{path}: not a gaze predictor; pass best.pth of run_gaze.py")
    try:
        with restoring(path):
            model = GazeNet(**config)
            model.load_state_dict(weights)
            model.seen = list(state.get("seen", []))
            model.encoder_seen = list(state.get("encoder_seen", []))
    except CheckpointError:
        raise
    except UserError as error:  # of a backbone that timm doesn't have
        raise UserError(f"{path}: {error}") from None
    return model.eval()


def _mix(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU())


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
