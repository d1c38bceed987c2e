"""Pixels: dequantisation and augmentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def dequantise(levels: Tensor, n_levels: int, uniforms: Tensor) -> Tensor:
    """Continuous images `2 (k + U)/L - 1` in [-1, 1], in the dtype of `uniforms`.

    Args:
        levels: integers k in 0..n_levels - 1, any shape.
        n_levels: L.
        uniforms: U in [0, 1), of the same shape.

    Raises:
        ValueError: if the shapes differ or a level lies outside 0..n_levels - 1.

    >>> dequantise(torch.tensor([0, 1]), 2, torch.tensor([0.5, 0.5])).tolist()
    [-0.5, 0.5]
    """
    if levels.shape != uniforms.shape:
        raise ValueError(f"levels {tuple(levels.shape)} and uniforms {tuple(uniforms.shape)} differ in shape")
    if levels.numel() and (int(levels.min()) < 0 or int(levels.max()) >= n_levels):
        raise ValueError(f"levels must lie in 0..{n_levels - 1}")
    return continuous(levels, n_levels, uniforms)


def continuous(levels: Tensor, n_levels: int, uniforms: Tensor) -> Tensor:
    """The same of levels known to be right: nothing is looked at, so a GPU need not wait."""
    return 2 * (levels.to(uniforms) + uniforms) / n_levels - 1


def normal_noise(uniforms: Tensor, tau: float) -> Tensor:
    """Truncated-normal noise in the same cells, from uniform noise in [0, 1]; shape and dtype of ``uniforms``.

    A normal about the middle of the cell, cut where the cell ends, ``tau`` standard deviations off (arXiv 2305.03935;
    docs/math.md section 13). Increasing; the ends and the middle stay.

    >>> normal_noise(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64), 3.0).mul(1e3).round().tolist()
    [0.0, 388.0, 500.0, 1000.0]
    """
    low = torch.special.ndtr(uniforms.new_tensor(-tau))
    deviations: Tensor = torch.special.ndtri(low + uniforms * (1 - 2 * low))
    return ((deviations / tau + 1) / 2).clamp(0, 1)


def normal_noise_log_density(noise: Tensor, tau: float) -> Tensor:
    """Its log-density with respect to uniform noise, of each number.

    >>> normal_noise_log_density(torch.tensor([0.0, 0.5, 1.0]), 1.0).mul(1e3).round().tolist()
    [-344.0, 156.0, -344.0]
    """
    inside = math.erf(tau / math.sqrt(2))
    return math.log(2 * tau / (math.sqrt(2 * math.pi) * inside)) - 0.5 * (tau * (2 * noise - 1)).square()


def mirrored(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w), each mirrored left to right with probability one half."""
    coin = torch.rand(len(levels), generator=generator, device=generator.device) < 0.5
    return torch.where(coin[:, None, None, None], levels.flip(-1), levels)


def shifted(levels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the images (n, c, h, w) moved by at most one pixel each way, zeros filled in."""
    n, _, height, width = levels.shape
    device = generator.device
    moved = torch.rand(n, generator=generator, device=device) < share
    dy, dx = (
        torch.where(moved, torch.randint(0, 3, (n,), generator=generator, device=device), 1)[:, None]
        for _ in range(2)
    )
    rows, columns = dy + torch.arange(height, device=device), dx + torch.arange(width, device=device)
    padded = F.pad(levels, (1, 1, 1, 1))
    image = torch.arange(n, device=device)[:, None, None]
    return padded.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
