"""A model: any module with an `event_shape` and the methods that an estimator asks for (interfaces.py lists them)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AxisMap(nn.Module):
    """N(0, diag(widths^2)) with its exact joint flow map; the widths can be trained (docs/math.md section 5)."""

    def __init__(self, widths: Sequence[float]) -> None:
        super().__init__()
        self.event_shape = (len(widths),)  # of one item, without the batch
        self.log_widths = nn.Parameter(torch.tensor(widths).log())

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average velocity (batch, d) and average divergence (batch,) from time t to time s, both (batch,).

        Time 0 is noise, time 1 data; at s = t they are the velocity and its divergence.
        """
        widths2 = (2 * self.log_widths).exp()
        t, s = t[:, None], s[:, None]
        w_t, w_s = ((1 - r) ** 2 + r**2 * widths2 for r in (t, s))  # variances at t and s
        apart = torch.where(s == t, 1.0, s - t)
        rate = (t * widths2 - (1 - t)) / w_t  # the limit of both at s = t
        u = torch.where(s == t, rate, ((w_s / w_t).sqrt() - 1) / apart)
        div = torch.where(s == t, rate, (w_s / w_t).log() / 2 / apart)
        return u * x, div.sum(1)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The field itself (batch, d), for estimators that integrate it."""
        return self.joint(x, t, t, cond=cond)[0]
