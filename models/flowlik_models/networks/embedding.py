"""Time features: smooth ones for the path and one that resolves the last stretch before the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def reparametrised_time(t: Tensor, delta: float) -> Tensor:
    """log((t + 0.1)/(1 - t + delta)): uniform steps in it put most nodes within ``delta`` of the data end."""
    return torch.log((t + 0.1) / (1 - t + delta))


def original_time(a: Tensor, delta: float) -> Tensor:
    """Inverse of ``reparametrised_time``."""
    ratio = a.exp()
    return (ratio * (1 + delta) - 0.1) / (1 + ratio)


class TimeFeatures(nn.Module):
    """Fixed features of a time in [0, 1]: sines and cosines of t and of its stretched form, and both plain.

    Maps (batch,) to (batch, size). ``delta`` is the smallest distance 1 - t that matters for the data at hand.
    """

    def __init__(self, frequencies: int = 4, delta: float = 5e-3) -> None:
        super().__init__()
        self.delta = delta
        self.frequencies = frequencies
        self.size = 2 + 4 * frequencies

    def forward(self, t: Tensor) -> Tensor:
        """The features, (batch, size)."""
        low = reparametrised_time(torch.zeros_like(t), self.delta)
        high = reparametrised_time(torch.ones_like(t), self.delta)
        unit = (reparametrised_time(t, self.delta) - low) / (high - low)
        scales = torch.pi * 2.0 ** torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        waves = torch.stack((t, unit), 1)[:, :, None] * scales
        plain = torch.stack((2 * t - 1, 2 * unit - 1), 1)
        return torch.cat((plain, waves.sin().flatten(1), waves.cos().flatten(1)), 1)
