"""MeanFlow and MeanFlow-F2D2: the Eulerian condition with a stopped gradient (docs/math.md section 3).

``u`` regresses ``sg[v + (s - t) du/dt]`` and ``D`` regresses ``sg[div v + (s - t) dD/dt]``, d/dt the total
derivative in the source time along v. Sources: Geng et al. 2025 (MeanFlow) and arXiv 2512.02636 (F2D2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from .batch import Batch

Derivative = Literal["jvp", "difference"]
Outputs = tuple[Tensor, ...]


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def _scale(size: Tensor, relative: float | None) -> Tensor:
    return torch.ones_like(size) if relative is None else 1 + size / relative**2


def total_derivative(
    function: Callable[[Tensor, Tensor, Tensor], Outputs],
    batch: Batch,
    *,
    method: Derivative,
    end: float,
    step: float = 1e-2,
    delta: float = 5e-3,
) -> Outputs:
    """d/dt of ``function(x, t, s)`` with dx/dt = velocity and s fixed, no graph.

    ``jvp`` is exact and costs about three evaluations; ``difference`` takes two evaluations in one batch, a central
    difference whose step shrinks with the distance to the data end (``step * (1 - t + delta)``) and with the speed.
    In float32 its error is near 1e-3 relative, far below the error of the regression it serves.
    """
    x, t, s, velocity = batch.x, batch.t, batch.s, batch.velocity
    with torch.no_grad():
        if method == "jvp":
            pair = torch.func.jvp(lambda x, t: function(x, t, s), (x, t), (velocity, torch.ones_like(t)))
            return tuple(pair[1])
        speed = velocity.flatten(1).square().mean(1).sqrt()
        h = step * torch.minimum(1 - t + delta, 1 / (1 + speed))
        h = torch.where(t + h > end + delta / 2, h / 2, h)
        shift = _column(h, x) * velocity
        outputs = function(torch.cat((x + shift, x - shift)), torch.cat((t + h, t - h)), torch.cat((s, s)))
        ahead_behind = (output.chunk(2) for output in outputs)
        return tuple((ahead - behind) / _column(2 * h, ahead) for ahead, behind in ahead_behind)


def meanflow_loss(
    network: Any,
    batch: Batch,
    *,
    method: Derivative,
    end: float,
    delta: float = 5e-3,
    relative: float | None = None,
) -> dict[str, Tensor]:
    """Squared errors (batch,) of the average velocity, mean over dimensions, and of the average divergence per
    dimension where the batch carries divergences. With ``relative`` each is divided by ``1 + (target/relative)^2``.
    """
    joint = batch.divergence is not None

    def evaluate(x: Tensor, t: Tensor, s: Tensor) -> Outputs:
        return tuple(network.joint(x, t, s)) if joint else (network.average_velocity(x, t, s),)

    outputs = evaluate(batch.x, batch.t, batch.s)
    targets = [batch.velocity] if batch.divergence is None else [batch.velocity, batch.divergence]
    for output, target in zip(outputs, targets, strict=True):
        # (batch,) against (batch, 1) would broadcast and pull every value to the batch mean
        assert output.shape == target.shape
    gap = batch.s - batch.t
    moving = batch.moving()  # on the diagonal the derivative has no weight
    if len(moving):
        rates = total_derivative(evaluate, batch.rows(moving), method=method, end=end, delta=delta)
        steps = [_column(gap[moving], rate) * rate for rate in rates]
        targets = [target.index_add(0, moving, step) for target, step in zip(targets, steps, strict=True)]
    size = targets[0].flatten(1).square().mean(1)
    errors = {"velocity": (outputs[0] - targets[0]).flatten(1).square().mean(1) / _scale(size, relative)}
    if joint:
        dim = batch.x[0].numel()
        size = (targets[1] / dim).square()
        errors["divergence"] = ((outputs[1] - targets[1]) / dim).square() / _scale(size, relative)
    return errors
