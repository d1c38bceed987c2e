"""Group norm that has forward-mode derivatives in every memory format, and trains fast in bfloat16 on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group norm; under forward-mode differentiation on contiguous tensors, since torch 2.13 fails on others."""

    def forward(self, input: Tensor) -> Tensor:
        """Shaped like the input."""
        return super().forward(input.contiguous() if _forward_mode() else input)

    def activated(self, input: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """``silu(norm(input) * (1 + scale) + shift)``, shaped like the input; scale and shift are (batch, channels)."""
        if _is_slow(input) and not _forward_mode():
            rows = (input.shape[0], input.shape[1])
            weight, bias = self.weight.expand(rows), self.bias.expand(rows)
            if scale is not None and shift is not None:
                weight, bias = weight * (1 + scale), torch.addcmul(bias + shift, bias, scale)
            normed: Tensor = _NormSiLU.apply(input, weight.float(), bias.float(), self.num_groups, self.eps)  # type: ignore[no-untyped-call]
            return normed
        y = self(input)
        if scale is not None and shift is not None:
            y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return F.silu(y)


def _forward_mode() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _is_slow(x: Tensor) -> bool:
    """Whether torch's own kernel takes several times what the convolutions beside it take."""
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_compiling()
    )


class _NormSiLU(torch.autograd.Function):
    """Group norm, scale and shift of every row's channels, and SiLU, by sums that are matrix products.

    With the mean m, the inverse deviation r of a group and ``y = (x - m) r``, the gradient in x of a loss whose
    gradient in ``w y + b`` is g is ``r (w g - mean(w g) - y mean(w g y))``, means taken over the group.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        rows = _rows(x)
        mean = _group_mean(_sums(rows) / rows.shape[1], groups)
        square = _group_mean(_sums(rows * rows) / rows.shape[1], groups)
        inverse = (square - mean.square()).clamp_min(0).add(eps).rsqrt()
        gain = weight * inverse
        before = _affine(rows, gain, bias - mean * gain)
        ctx.save_for_backward(rows, before, weight, mean, inverse)
        ctx.groups, ctx.size = groups, x.shape[2:]
        return _images(F.silu(before), x.shape[2:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, before, weight, mean, inverse = ctx.saved_tensors
        g = torch.ops.aten.silu_backward(_rows(gradients[0]), before)
        shift = _sums(g)
        scale = (_sums(g * rows) - mean * shift) * inverse
        level = _group_mean(weight * shift, ctx.groups) / rows.shape[1]
        slope = _group_mean(weight * scale, ctx.groups) / rows.shape[1]
        pull = -inverse.square() * slope
        found = _affine(rows, pull, -inverse * level - pull * mean)
        found = found.addcmul_(g, (inverse * weight).to(g.dtype)[:, None])
        return _images(found, ctx.size), scale, shift, None, None


def _rows(x: Tensor) -> Tensor:
    """Images (batch, c, h, w) as (batch, h w, c); a view of those laid out channels last."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1])


def _images(rows: Tensor, size: torch.Size) -> Tensor:
    return rows.view(rows.shape[0], *size, rows.shape[2]).permute(0, 3, 1, 2)


def _sums(rows: Tensor) -> Tensor:
    """Over the pixels, (batch, c) in float32: a product with ones, which keeps its sum in float32."""
    ones = rows.new_ones(1, 1, 1).expand(rows.shape[0], 1, rows.shape[1])
    return torch.bmm(ones, rows)[:, 0].float()


def _group_mean(values: Tensor, groups: int) -> Tensor:
    """Every channel's value replaced by the mean over its group, (batch, c)."""
    grouped = values.view(len(values), groups, -1)
    return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def _affine(rows: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset.to(rows.dtype)[:, None], rows, gain.to(rows.dtype)[:, None])


def group_norm(channels: int) -> GroupNorm:
    """Eight groups, or as many as divide the channels."""
    return GroupNorm(math.gcd(8, channels), channels)
