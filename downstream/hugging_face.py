"""Encoders in folders of transformers: config.json and safetensors, as `save_pretrained` writes them."""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from util.errors import UserError


def is_transformers_folder(path: str | os.PathLike) -> bool:
    """Whether a folder's config.json is one of transformers, and not of timm."""
    config = Path(path) / "config.json"
    return config.is_file() and "model_type" in json.loads(config.read_text(encoding="utf-8"))


class FolderEncoder(nn.Module):
    """The vision model in a folder, with the interface of timm's. Nothing is downloaded, and no code of the folder runs.

    Args:
        folder: as named by the user.
        img_size: side of the input in pixels; None: as its configuration says.

    Attributes:
        source: says where it comes from.
        architecture: the configuration, and the input's size.
        scaling: mean and std of the input, as preprocessor_config.json says; None without it.
        num_prefix_tokens: tokens before those of the patches; None for a model without tokens.

    Raises:
        UserError: transformers is not installed, or can't make the whole model from the folder.
    """

    def __init__(self, folder: str | os.PathLike, img_size: int | None = None):
        super().__init__()
        try:
            from transformers import AutoModel
        except ImportError:
            raise UserError(f"{folder}: a folder of transformers, which is missing: pip install transformers") from None
        self.source = f"{folder}, of transformers"
        try:
            model, report = AutoModel.from_pretrained(
                folder, output_loading_info=True, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder}: transformers can't load it: {' '.join(str(error).split())[:200]}") from None
        lacking = [str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind]]
        if lacking := [name for name in lacking if "pooler" not in name]:  # which is behind the tokens
            raise UserError(f"{folder}: lacks {len(lacking)} tensors of its model, such as {min(lacking)}")
        self.model = getattr(model, "vision_model", model).eval()
        config = self.model.config
        config.mask_ratio = 0.0  # of a masked autoencoder
        size = np.broadcast_to(img_size or config.image_size, 2).tolist()
        self.pretrained_cfg = {"input_size": [3, *size]}
        self.architecture = [config.to_json_string(), size]
        scaling = Path(folder, "preprocessor_config.json")
        scaling = json.loads(scaling.read_text(encoding="utf-8")) if scaling.is_file() else {}
        self.scaling = (scaling["image_mean"], scaling["image_std"]) if "image_mean" in scaling else None
        accepted = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if img_size and "interpolate_pos_encoding" in accepted else {}
        patch = getattr(config, "patch_size", None)
        self.n_patches = (size[0] // patch) * (size[1] // patch) if patch else 0
        self.shuffles = "noise" in accepted
        self.fc_norm = nn.Identity()
        with torch.no_grad():
            found = self.forward_features(torch.zeros(1, 3, *size))
        self.num_prefix_tokens = found.shape[1] - self.n_patches if found.ndim == 3 else None
        self.cls_token = self.num_prefix_tokens or None

    def forward_features(self, images: Tensor) -> Tensor:
        """The last hidden state: tokens [B, N, D], or maps [B, D, h, w]."""
        options = dict(self.options)
        if self.shuffles:  # a masked autoencoder leaves its patches in the order of the noise
            options["noise"] = torch.arange(self.n_patches, device=images.device).expand(len(images), -1).float()
        return self.model(pixel_values=images, **options).last_hidden_state

    def forward_head(self, found: Tensor, pre_logits: bool = True) -> Tensor:
        """The mean over the map."""
        return found.mean((2, 3))
