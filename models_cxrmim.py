"""CXR-MIM: masked image modelling of chest X-rays, guided by radiologists' gaze.

`CXRMIM.forward` reads as the paper's figure: mask, encode the visible patches, decode four encoder
layers at four scales, compare with HOG targets, weight by gaze. Each step is a method of its own.

Source: Zhao et al., "Taming Masked Image Modeling for Chest X-ray Diagnosis by Incorporating
Clinical Visual Priors", IPMI 2025. Encoder and recipe follow MAE (He et al., CVPR 2022), the
multi-layer multi-scale reconstruction follows LocalMIM (Wang et al., CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models_decoder import SCALES, ScaleDecoder, sincos_pos_embed
from util.hog import HOGPyramid
from util.masking import MASKINGS, MaskRequest, draw_mask, mask_cells, masked_count
from util.precision import run_cast_once
from util.weights import VIT_SIZES


class CXRMIM(nn.Module):
    """Masked autoencoder with a pyramid of HOG decoders.

    Args:
        img_size: side of the square input in pixels, a multiple of `patch_size` and of every HOG cell.
        patch_size: p, side of a patch in pixels.
        in_chans: channels of the input image.
        embed_dim, depth, num_heads, mlp_ratio: the ViT encoder; D = embed_dim, a multiple of 4.
        decoder_embed_dim, decoder_depth, decoder_num_heads: each of the decoders; d = decoder_embed_dim.
        hog_nbins: orientation bins of the targets.
        id_list: 0-based encoder blocks whose output is decoded, one decoder each.
        scale_list: for each of them, target cells per patch side, each in `models_decoder.SCALES`.
        gaze_weighted: weight the loss by gaze.
        gaze_temperature: T of that weighting's softmax.
        masking: a name in `util.masking.MASKINGS`; "attention" is the paper's.

    Attributes:
        config: these arguments as plain types: `CXRMIM(**model.config)` has the same architecture.
            Checkpoints keep it under "model_config".
        seen: `util.subjects.subject_marks` of the subjects whose images trained it; checkpoints keep it too.

    Raises:
        ValueError: for values that don't fit together; the message names them.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 256,
        decoder_depth: int = 1,
        decoder_num_heads: int = 8,
        mlp_ratio: float = 4.0,
        hog_nbins: int = 9,
        id_list: Sequence[int] = (1, 3, 9, 11),
        scale_list: Sequence[float] = (4.0, 2.0, 1.0, 0.5),
        gaze_weighted: bool = False,
        gaze_temperature: float = 0.1,
        masking: str = "attention",
    ):
        id_list, scale_list = tuple(id_list), tuple(float(scale) for scale in scale_list)
        config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.config = config
        self.seen: list[str] = []
        _check(
            id_list and len(id_list) == len(scale_list),
            f"id_list has {len(id_list)} blocks and scale_list {len(scale_list)} scales; give as many of each",
        )
        _check(set(id_list) <= set(range(depth)), f"id_list {id_list} outside the encoder's blocks 0..{depth - 1}")
        known = ", ".join(map(str, SCALES))
        _check(SCALES.keys() >= set(scale_list), f"scale_list {scale_list} not among {known}")
        cells = [patch_size / scale for scale in scale_list]
        _check(not any(cell % 1 for cell in cells), f"scale_list: a patch of {patch_size} px has no whole cells")
        cell_sizes = list(map(int, cells))
        for divisor in (patch_size, *cell_sizes):
            _check(
                img_size % divisor == 0, f"input_size {img_size} is not a multiple of {divisor} (patch or HOG cell, px)"
            )
        _check(embed_dim % num_heads == 0, f"num_heads {num_heads} does not divide the width {embed_dim}")
        _check(
            decoder_embed_dim % decoder_num_heads == 0,
            f"decoder_num_heads {decoder_num_heads} does not divide the width {decoder_embed_dim}",
        )
        _check(masking in MASKINGS, f"masking {masking!r} is not one of {', '.join(MASKINGS)}")
        _check(gaze_temperature > 0, f"gaze_temperature {gaze_temperature} is not positive")

        self.img_size = img_size
        self.patch_size = patch_size
        self.id_list = id_list
        self.scale_list = scale_list
        self.gaze_weighted = gaze_weighted
        self.gaze_temperature = gaze_temperature
        self.masking = masking
        grid = img_size // patch_size
        self.grid_size = (grid, grid)
        self.num_patches = grid * grid  # L

        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = sincos_pos_embed(embed_dim, self.grid_size)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth)
        )
        for block in self.blocks[max(id_list) + 1 :]:
            block.requires_grad_(False)  # never run: no optimiser or DDP should wait for its gradient
        self.norm = nn.ModuleList(layer_norm(embed_dim) for _ in id_list)
        self.decoder = nn.ModuleList(
            ScaleDecoder(
                scale, embed_dim, decoder_embed_dim, decoder_depth, decoder_num_heads, self.grid_size, 3 * hog_nbins
            )
            for scale in scale_list
        )
        self.hog = HOGPyramid(hog_nbins, cell_sizes)
        # Not part of the state dict, whose names are the published ones.
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(1, -1, 1, 1), persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.patch_embed.proj.out_channels, -1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.cls_token, std=0.02)
        for decoder in self.decoder:
            nn.init.normal_(decoder.mask_token, std=0.02)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """As for any module; the published model's fixed filters `hog_enc.*` are accepted and ignored."""
        kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith("hog_enc.")}
        return super().load_state_dict(kept, strict, assign)

    def forward(
        self,
        batch: Mapping[str, Tensor],
        mask_ratio: float = 0.75,
        clinical_ratio: float = 0.5,
        mask: Tensor | None = None,
        *,
        n_visible: int | None = None,
        per_scale: bool = False,
    ) -> Tensor:
        """Loss of a batch.

        Args:
            batch: see `prepare_batch`.
            mask_ratio, clinical_ratio: see `draw_mask`, which is asked for epoch 0, step 0; not used when
                `mask` is given.
            mask: [B, L], 1 = masked, used as it is; every image must have equally many masked patches.
            n_visible: visible patches per image of a given mask; counted when absent, which on a GPU
                waits for the device.
            per_scale: return the [K] losses of the scales, whose sum is the loss.

        Returns:
            Scalar loss (or [K]). In distributed training the mean of the ranks' unweighted losses is
            the loss of the whole batch, since masked counts are equal. The gaze-weighted loss is
            normalised by each rank's own sum of weights, which differs a little between ranks at the
            coarse scales, so there the mean of ranks is close to the whole batch's loss but not equal.
        """
        batch = self.prepare_batch(batch)
        if mask is None:
            mask = self.draw_mask(batch, mask_ratio, clinical_ratio)
            n_visible = self.num_patches - masked_count(self.num_patches, mask_ratio)
        mask = mask.to(batch["img"].device)
        latents = self.forward_encoder(batch["img"], mask, n_visible)
        preds = self.forward_decoder(latents, mask)
        targets = self.hog_targets(batch.get("gray", batch["img"]))
        losses = self.scale_losses(preds, targets, mask, batch["attention"] if self.gaze_weighted else None)
        return losses if per_scale else losses.sum()

    def prepare_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring a batch to the model's device and to the values that the other methods take.

        Args:
            batch: "img": float [B, 3, H, W] normalised by ImageNet's mean and std, or as the data sets
                give it, uint8 [B, 1, H, W] gray, which is normalised and repeated here;
                "attention": [B, H, W] gaze heatmap, float 0..1 or uint8 0..255;
                optional "foreground": [B, H, W], any format of `util.masking.significant_patches`.

        Returns:
            The same keys with "img" float [B, 3, H, W] and "attention" float 0..1. For a gray image
            also "gray", [B, 1, H, W], one channel of "img". A prepared batch passes unchanged.
        """
        device = self.cls_token.device
        prepared = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        img, attention = prepared["img"], prepared["attention"]
        if img.shape[-2:] != (self.img_size, self.img_size):
            raise ValueError(f"images of {img.shape[-2]} x {img.shape[-1]} px, the model takes {self.img_size} px")
        if img.dtype == torch.uint8:
            prepared["img"] = (img.float() / 255 - self.mean) / self.std  # [B, 3, H, W]
            prepared["gray"] = prepared["img"][:, :1]
        if attention.dtype == torch.uint8:
            prepared["attention"] = attention.float() / 255
        return prepared

    def draw_mask(
        self, batch: Mapping[str, Tensor], mask_ratio=0.75, clinical_ratio=0.5, generator=None, **place
    ) -> Tensor:
        """Draw a mask for each image of a prepared batch, as `masking` says: float [B, L], 1 = masked.

        Where the batch has no foreground it is the Otsu foreground of its attention. The other arguments, and `epoch` and
        `step`, are those of `util.masking.MaskRequest`.
        """
        ask = MaskRequest(batch, self.patch_size, mask_ratio, clinical_ratio, generator=generator, **place)
        return draw_mask(self.masking, ask)

    def forward_encoder(self, img: Tensor, mask: Tensor, n_visible: int | None = None) -> list[Tensor]:
        """Encode the visible patches.

        Args:
            img: float [B, 3, H, W], normalised.
            mask: [B, L], 1 = masked; all zeros to encode the whole image.
            n_visible: see `forward`.

        Returns:
            For each tap the normalised tokens [B, 1 + visible, D], cls first, patches in ascending order.
        """
        visible = _visible_ids(mask, n_visible)  # [B, V]
        x = self.patch_embed(img, visible)  # [B, V, D]
        x = x + self.pos_embed[0, 1:][visible]
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token.to(x.dtype), x], 1)  # [B, 1+V, D]
        latents: list[Tensor | None] = [None] * len(self.id_list)
        for i, block in enumerate(self.blocks[: max(self.id_list) + 1]):
            x = run_cast_once(block, x)
            for k, tap in enumerate(self.id_list):
                if tap == i:
                    latents[k] = self.norm[k](x)
        return latents

    def forward_decoder(self, latents: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
        """Predict the HOG of every cell from each tap: list of [B, cells_k, 3*nbins], cells row-major."""
        visible = _visible_ids(mask, latents[0].shape[1] - 1)  # [B, V]
        pairs = zip(self.decoder, latents, strict=True)
        return [run_cast_once(decoder, latent, visible) for decoder, latent in pairs]

    def hog_targets(self, img: Tensor) -> list[Tensor]:
        """HOG of a normalised image for each scale: list of [B, cells_k, 3*nbins]; see `HOGPyramid`."""
        return self.hog(img)

    def scale_losses(
        self, preds: Sequence[Tensor], targets: Sequence[Tensor], mask: Tensor, attention: Tensor | None = None
    ) -> Tensor:
        """Weighted mean squared error of each scale, in float32.

        With M the mask on the grid of a scale's cells (repeated, or averaged where a cell spans
        patches) and e the error averaged over channels: sum(e * M) / sum(M) over the batch. With
        `attention` the weights are softmax(a / T) + M instead, a = M * the attention averaged over a
        cell, softmax over the cells of one image (CXR-MIM, gaze-weighted loss).

        Args:
            preds, targets: lists of [B, cells_k, 3*nbins].
            mask: [B, L], 1 = masked.
            attention: [B, H, W] float 0..1, or None for the unweighted loss.

        Returns:
            Float [K], one loss per scale.
        """
        mask = mask.view(-1, 1, *self.grid_size).float()  # [B, 1, h, w]
        losses = []
        for scale, pred, target in zip(self.scale_list, preds, targets, strict=True):
            weight = mask_cells(mask, scale).flatten(1)  # [B, cells_k]
            if attention is not None:
                attention_k = F.avg_pool2d(attention[:, None].float(), int(self.patch_size / scale)).flatten(1)
                weight = (attention_k * weight / self.gaze_temperature).softmax(1) + weight
            error = (pred.float() - target).square().mean(2)  # [B, cells_k]
            losses.append((error * weight).sum() / weight.sum())
        return torch.stack(losses)


class PatchEmbed(nn.Module):
    """Linear projection of chosen patches; the weights are those of timm's convolutional PatchEmbed.

    Only the patches asked for are projected: a quarter of the work at the default mask ratio.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, img: Tensor, ids: Tensor) -> Tensor:
        """img [B, C, H, W], ids int64 [B, V] of patches, row-major -> tokens [B, V, D]."""
        p = self.proj.kernel_size[0]
        batch, channels, height, width = img.shape
        patches = img.view(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # a view
        rows, columns = ids // (width // p), ids % (width // p)
        images = torch.arange(batch, device=ids.device)[:, None]
        chosen = patches[images, rows, columns].flatten(2)  # [B, V, C*p*p]
        return F.linear(chosen, self.proj.weight.flatten(1), self.proj.bias)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _visible_ids(mask: Tensor, n_visible: int | None) -> Tensor:
    """Indices of the visible patches of each image in ascending order: [B, L] -> int64 [B, V]."""
    if n_visible is None:
        counts = (mask == 0).sum(1)
        n_visible = int(counts[0])
        if not bool((counts == n_visible).all()):
            raise ValueError(f"masks with unequal numbers of visible patches: {counts.tolist()}")
    return (mask != 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :n_visible]


# Names of --model. The heads of each are its own; nothing derives them from the width.
ENCODERS = {
    f"cxrmim_vit_{size}_patch16": partial(CXRMIM, patch_size=16, embed_dim=width, depth=depth, num_heads=heads)
    for (width, depth), (size, heads, patch_size) in VIT_SIZES.items()
    if patch_size == 16
}
# The published ways to construct them.
cxrmim_vit_tiny_patch16, cxrmim_vit_small_patch16, cxrmim_vit_base_patch16, cxrmim_vit_large_patch16 = ENCODERS.values()
