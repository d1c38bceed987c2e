"""A small diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748): patches as tokens, modulated by the time.

What it computes, and the maps built on it, are those of `flowlik_models.networks.images`; tokens are unfolded to a
hidden layer of the image's own size, on which the shared heads work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.networks.attention import SelfAttention
from flowlik_models.networks.images import FlowMap, ImageField, JointFlowMap, zeroed

__all__ = ["DiT", "FlowMapDiT", "JointFlowMapDiT"]

_POSITION_SCALE = 0.02
_MLP_RATIO = 4


class Block(nn.Module):
    """Attention and MLP, each with scale, shift and gate by the embedding; the gates start at zero."""

    def __init__(self, width: int, heads: int, embed: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, _MLP_RATIO * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(_MLP_RATIO * width, width),
        )
        self.modulate = zeroed(nn.Linear(embed, 6 * width))

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(embedding)[:, None].chunk(6, dim=2)
        h = h + gate1 * self.attention(_normed(h) * (1 + scale1) + shift1)
        out: Tensor = h + gate2 * self.mlp(_normed(h) * (1 + scale2) + shift2)
        return out


def _normed(h: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:])


class DiT(ImageField):
    """A velocity field v(x, t) on images.

    Args:
        event_shape: (channels, height, width); height and width divisible by ``patch``.
        width: of a token. depth: number of blocks. heads: of the attention.
        patch: side of a patch in pixels.
        hidden: channels of the unfolded hidden layer.
        dropout: in the MLPs.
        options: of `ImageField`.

    Raises:
        ValueError: patches do not tile the image, or heads do not divide the width.
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 28, 28),
        *,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        patch: int = 2,
        hidden: int = 16,
        dropout: float = 0.0,
        embed: int = 128,
        **options: Any,
    ) -> None:
        channels, height, breadth = event_shape
        if height % patch or breadth % patch:
            raise ValueError(f"patches of {patch}x{patch} do not tile a {height}x{breadth} image")
        super().__init__(event_shape, embed=embed, **options)
        self.patch = patch
        self.stem = nn.Conv2d(4 * channels, width, patch, stride=patch)
        tokens = (height // patch) * (breadth // patch)
        self.position = nn.Parameter(_POSITION_SCALE * torch.randn(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, embed, dropout) for _ in range(depth))
        self.modulate = zeroed(nn.Linear(embed, 2 * width))
        self.unfold = nn.Linear(width, hidden * patch**2)
        self._add_head(hidden, width)

    def _hidden(self, inputs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The unfolded hidden layer (batch, hidden, h, w), and the tokens as an image."""
        patches = self.stem(inputs)
        h = patches.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            h = block(h, embedding)
        scale, shift = self.modulate(embedding)[:, None].chunk(2, dim=2)
        h = _normed(h) * (1 + scale) + shift
        bottom = h.transpose(1, 2).unflatten(2, patches.shape[2:])
        unfolded = self.unfold(h).transpose(1, 2).unflatten(2, patches.shape[2:])
        return F.silu(F.pixel_shuffle(unfolded, self.patch)), bottom


class FlowMapDiT(FlowMap, DiT):
    """A flow map with average velocity u(x, t, s); the arguments are those of `DiT`."""


class JointFlowMapDiT(JointFlowMap, DiT):
    """A flow map with a second head, the average divergence D(x, t, s); the arguments are those of `DiT`."""
