"""The pyramid's decoders: one small transformer for each encoder layer, with a head for its scale.

A scale is the number of target cells per patch side. `SCALES` is the one list of them: its functions
build the head that brings the decoder's tokens to the grid of that scale. Cell size, loss mask and
pictures follow from the number itself, so a further scale is one further entry (docs/extend.md).
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def quadruple(dim: int, out_channels: int) -> nn.Sequential:
    """Head of scale 4: [B, dim, h, w] -> [B, out_channels, 4h, 4w]."""
    return nn.Sequential(
        nn.ConvTranspose2d(dim, dim // 2, 2, 2),
        LayerNorm2d(dim // 2, eps=1e-6),
        nn.GELU(),
        nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2),
        nn.Conv2d(dim // 4, out_channels, 1),
    )


def double(dim: int, out_channels: int) -> nn.Sequential:
    """Head of scale 2: [B, dim, h, w] -> [B, out_channels, 2h, 2w]."""
    return nn.Sequential(nn.ConvTranspose2d(dim, dim // 2, 2, 2), nn.Conv2d(dim // 2, out_channels, 1))


def same(dim: int, out_channels: int) -> nn.Sequential:
    """Head of scale 1: [B, dim, h, w] -> [B, out_channels, h, w]."""
    return nn.Sequential(nn.Conv2d(dim, out_channels, 1))


def halve(dim: int, out_channels: int) -> nn.Sequential:
    """Head of scale 0.5: [B, dim, h, w] -> [B, out_channels, h/2, w/2]."""
    return nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(dim, out_channels, 1))


# Target cells per patch side, a whole number or one over it -> what builds the head.
SCALES = {4.0: quadruple, 2.0: double, 1.0: same, 0.5: halve}


class ScaleDecoder(nn.Module):
    """Decoder of one encoder layer: predicts the HOG of every cell at one scale.

    Args:
        scale: cells per patch side, one of `SCALES`.
        embed_dim: D, width of the encoder.
        dim: d, width of the decoder.
        grid_size: (h, w) of the patch grid.
        out_channels: channels of the target.
    """

    def __init__(
        self,
        scale: float,
        embed_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        grid_size: tuple[int, int],
        out_channels: int,
    ):
        super().__init__()
        layer_norm = partial(nn.LayerNorm, eps=1e-6)
        self.grid_size = grid_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = sincos_pos_embed(dim, grid_size)
        self.embed = nn.Linear(embed_dim, dim)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth)
        )
        self.norm = layer_norm(dim)
        self.pred = SCALES[scale](dim, out_channels)

    def forward(self, latent: Tensor, visible: Tensor) -> Tensor:
        """latent [B, 1+V, D], visible int64 [B, V] -> [B, cells, out_channels], cells row-major."""
        x = self.embed(latent)  # [B, 1+V, d]
        batch, count, dim = x.shape
        height, width = self.grid_size
        cls_token, seen = x.split([1, count - 1], 1)  # one operation backward, where two slices are five
        tokens = self.mask_token.to(x.dtype).expand(batch, height * width, dim)
        tokens = tokens.scatter(1, visible[..., None].expand(-1, -1, dim), seen)  # [B, L, d]
        x = torch.cat([cls_token, tokens], 1) + self.pos_embed  # [B, 1+L, d]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)[:, 1:]  # [B, L, d]
        x = self.pred(x.transpose(1, 2).reshape(batch, dim, height, width))  # [B, out, h*s, w*s]
        return x.flatten(2).transpose(1, 2)


def sincos_pos_embed(dim: int, grid_size: tuple[int, int]) -> nn.Parameter:
    """Fixed 2-D sin-cos position embedding, [1, 1 + h*w, dim], with a zero row for cls (MAE).

    The first half of the channels encodes the column, the second half the row; each half is
    [sin(position * w), cos(position * w)] with w_i = 10000^(-i / (dim/4)).
    """
    height, width = grid_size
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # [dim/4]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [position.reshape(-1, 1) * omega for position in (columns, rows)]  # 2 x [L, dim/4]
    embed = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)  # [L, dim]
    embed = torch.cat([torch.zeros(1, dim, dtype=torch.float64), embed]).float()
    return nn.Parameter(embed[None], requires_grad=False)
