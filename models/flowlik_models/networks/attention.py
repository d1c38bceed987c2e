"""Self-attention written out, so that forward-mode and second derivatives exist; fused where training needs neither."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Tokens (batch, n, width) to tokens, without the residual; the last layer starts at zero where ``zero`` says so.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int, *, zero: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.fused = heads, False
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor) -> Tensor:
        """(batch, n, width)."""
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, n, c)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)
            mixed = weights.to(v.dtype) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def fuse_attention(network: nn.Module, on: bool) -> None:
    """Fused kernels in every attention layer: faster on a GPU, without forward-mode and second derivatives."""
    for part in network.modules():
        if isinstance(part, SelfAttention):
            part.fused = on
