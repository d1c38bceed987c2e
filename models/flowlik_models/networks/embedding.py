"""Time features: smooth ones for the path and one that resolves the last stretch before the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowlik_models.numerics.reparametrised_time import ReparametrisedTime


class TimeFeatures(nn.Module):
    """Fixed features of a time in [0, 1]: sines and cosines of t and of the reparametrised time, and both plain.

    Maps (batch,) to (batch, size). ``delta`` is the smallest distance 1 - t that matters for the data at hand.
    """

    def __init__(self, frequencies: int = 4, delta: float = 5e-3) -> None:
        super().__init__()
        self.delta = delta
        self.frequencies = frequencies
        self.size = 2 + 4 * frequencies

    def forward(self, t: Tensor) -> Tensor:
        """The features, (batch, size)."""
        reparametrised = ReparametrisedTime(self.delta)
        low, high = reparametrised.at(torch.zeros_like(t)), reparametrised.at(torch.ones_like(t))
        unit = (reparametrised.at(t) - low) / (high - low)
        scales = torch.pi * 2.0 ** torch.arange(self.frequencies, device=t.device, dtype=t.dtype)
        waves = torch.stack((t, unit), 1)[:, :, None] * scales
        plain = torch.stack((2 * t - 1, 2 * unit - 1), 1)
        return torch.cat((plain, waves.sin().flatten(1), waves.cos().flatten(1)), 1)
