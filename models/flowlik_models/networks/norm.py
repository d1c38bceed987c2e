"""Group norm that has forward-mode derivatives in every memory format."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group norm; under forward-mode differentiation on contiguous tensors, since torch 2.13 fails on others."""

    def forward(self, input: Tensor) -> Tensor:
        """Shaped like the input."""
        if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
            input = input.contiguous()
        return super().forward(input)


def group_norm(channels: int) -> GroupNorm:
    """Eight groups, or as many as divide the channels."""
    return GroupNorm(math.gcd(8, channels), channels)
