"""A flow of zuko's that is no field, by its transform's own inverse and log-determinant."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class WrappedFlow(nn.Module):
    """x (batch, d) to noise and back, for the family ``exact-flow``; `flowlik.wrap` makes it of an exact flow.

    One evaluation are all its transforms, once. ``passes_to_sample``: an autoregressive transform's way back takes one
    a coordinate.
    """

    networks = ("transforms",)

    def __init__(self, flow: Any, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.transforms, self.event_shape = _Transforms(flow), event_shape
        self.passes_to_sample = max(int(getattr(part, "passes", 1)) for part in flow.modules())

    def inverse(self, x: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise (batch, d) of x (batch, d), and the log-determinant (batch,)."""
        z, log_det = self.transforms(x, cond)
        return z, log_det

    def from_noise(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """x (batch, d) of noise z (batch, d)."""
        x: Tensor = self.transforms(z, cond, to_noise=False)
        return x


class _Transforms(nn.Module):
    """The flow's transforms in one call, which is what an evaluation is."""

    def __init__(self, flow: Any) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, cond: Tensor | None, *, to_noise: bool = True) -> Any:
        transform = self.flow(cond).transform
        return transform.call_and_ladj(x) if to_noise else transform.inv(x)
