"""Self-attention written out, so that forward-mode and second derivatives exist; fused where training needs neither."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Past = list[tuple[Tensor, Tensor]]
"""Keys and values of the tokens that a causal layer was given one by one."""


class SelfAttention(nn.Module):
    """Tokens (batch, n, width) to tokens, without the residual; the last layer starts at zero where ``zero`` says so.

    ``causal``: a token sees itself and those before it.

    Raises:
        ValueError: ``heads`` does not divide ``width``.
    """

    def __init__(self, width: int, heads: int, *, zero: bool = False, causal: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide a width of {width}")
        self.heads, self.fused, self.causal = heads, False, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        if zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor, past: Past | None = None) -> Tensor:
        """(batch, n, width). With a ``past`` h holds one token, which sees those given before; it is added to them."""
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (batch, heads, n, c)
        if past is not None:
            past.append((k, v))
            k, v = (torch.cat(parts, 2) for parts in zip(*past, strict=True))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and past is None)
        else:
            weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
            if self.causal and past is None:
                later = torch.ones(weights.shape[2:], dtype=torch.bool, device=q.device).triu(1)
                weights = weights.masked_fill(later, -math.inf)
            mixed = weights.softmax(3).to(v.dtype) @ v
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


def fuse_attention(network: nn.Module, on: bool) -> None:
    """Fused kernels in every attention layer: faster on a GPU, without forward-mode and second derivatives."""
    for part in network.modules():
        if isinstance(part, SelfAttention):
            part.fused = on
