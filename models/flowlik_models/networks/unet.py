"""A time-conditioned U-Net of residual blocks, in the manner of DDPM++ (Song et al. 2021, arXiv 2011.13456).

Group norm and SiLU before every convolution, scale and shift by the time embedding, zero-initialised second
convolutions, self-attention at chosen resolutions. What it computes, and the maps built on it, are those of
`flowlik_models.networks.images`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.networks.attention import SelfAttention
from flowlik_models.networks.images import ClassField, FlowMap, ImageField, JointFlowMap, zeroed
from flowlik_models.networks.norm import group_norm

__all__ = ["ClassUNet", "FlowMapUNet", "JointFlowMapUNet", "UNet"]


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with scale and shift by the embedding, dropout, and a skip."""

    def __init__(self, inputs: int, outputs: int, embed: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embed, 2 * outputs)
        self.norm2 = group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        y = self.conv1(self.norm1.activated(h))
        y = self.conv2(self.dropout(self.norm2.activated(y, scale, shift)))
        out: Tensor = self.skip(h) + y
        return out


class AttentionBlock(nn.Module):
    """Group norm and self-attention over all pixels, with a skip; the identity at the start."""

    def __init__(self, channels: int, head: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = SelfAttention(channels, max(1, channels // head), zero=True)

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        out: Tensor = h + self.attention(tokens).transpose(1, 2).unflatten(2, h.shape[2:])
        return out


class UNet(ImageField):
    """A velocity field v(x, t) on images.

    Args:
        event_shape: (channels, height, width); height and width divisible by `2 ** (len(widths) - 1)`.
        widths: channels of each resolution, from the finest.
        blocks: residual blocks per resolution on the way down; as many on the way up.
        dropout: dropout in the residual blocks.
        attention: resolutions by their height, such as ``(16, 8)``: self-attention after each of their blocks, and
            in the middle where the lowest one is named.
        head: channels of an attention head.
        options: of `ImageField`.

    Raises:
        ValueError: the image cannot be halved often enough, or it has no such resolution for attention.
    """

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 8, 8),
        *,
        widths: Sequence[int] = (32, 48, 64),
        blocks: int = 1,
        dropout: float = 0.1,
        attention: Sequence[int] = (),
        head: int = 32,
        embed: int = 128,
        **options: Any,
    ) -> None:
        _, height, width = event_shape
        halvings = 2 ** (len(widths) - 1)
        if height % halvings or width % halvings:
            raise ValueError(f"a {height}x{width} image cannot be halved {len(widths) - 1} times")
        heights = [height // 2**level for level in range(len(widths))]
        if unknown := set(attention) - set(heights):
            raise ValueError(f"no resolution of height {min(unknown)} for attention (valid: {heights})")
        super().__init__(event_shape, embed=embed, **options)
        self.stem = nn.Conv2d(4 * event_shape[0], widths[0], 3, padding=1)
        down, skips, h = nn.ModuleList(), [widths[0]], widths[0]
        for level, w in enumerate(widths):
            for _ in range(blocks):
                down.append(ResBlock(h, w, embed, dropout))
                h = w
                if heights[level] in attention:
                    down.append(AttentionBlock(h, head))
                skips.append(h)
            if level < len(widths) - 1:
                down.append(nn.AvgPool2d(2))
        self.down = down
        self.middle = ResBlock(h, h, embed, dropout)
        if heights[-1] in attention:
            self.middle_attention = AttentionBlock(h, head)
        bottom, up = h, nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                up.append(ResBlock(h + skips.pop(), w, embed, dropout))
                h = w
                if heights[level] in attention:
                    up.append(AttentionBlock(h, head))
            if level > 0:
                up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.up = up
        self.norm = group_norm(h)
        self._add_head(h, bottom)

    def _hidden(self, inputs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden layer (batch, widths[0], h, w), and the one at the lowest resolution."""
        h = self.stem(inputs)
        skips = [h]
        for layer in self.down:
            if isinstance(layer, ResBlock):
                h = layer(h, embedding)
                skips.append(h)
            elif isinstance(layer, AttentionBlock):
                h = skips[-1] = layer(h)
            else:
                h = layer(h)
        h = self.middle(h, embedding)
        if hasattr(self, "middle_attention"):
            h = self.middle_attention(h)
        bottom = h
        for layer in self.up:
            joined = isinstance(layer, ResBlock)
            h = layer(torch.cat((h, skips.pop()), dim=1), embedding) if joined else layer(h)
        return self.norm.activated(h), bottom


class ClassUNet(ClassField, UNet):
    """A velocity field v(x, t) of each class, and of all; the arguments are ``classes`` and those of `UNet`."""

    def __init__(self, event_shape: Sequence[int] = (1, 8, 8), *, classes: int, **options: Any) -> None:
        super().__init__(event_shape, classes=classes, **options)


class FlowMapUNet(FlowMap, UNet):
    """A flow map with average velocity u(x, t, s); the arguments are those of `UNet`."""

    def __init__(self, event_shape: Sequence[int] = (1, 8, 8), **options: Any) -> None:
        super().__init__(event_shape, **options)


class JointFlowMapUNet(JointFlowMap, UNet):
    """A flow map with a second head, the average divergence D(x, t, s); the arguments are those of `UNet`."""

    def __init__(self, event_shape: Sequence[int] = (1, 8, 8), **options: Any) -> None:
        super().__init__(event_shape, **options)
