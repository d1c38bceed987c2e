"""One step of the classical Runge-Kutta method (Kutta 1901), of fourth order in four evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

Where = TypeVar("Where")
Slopes = tuple[Tensor, ...]


def rk4_increments(
    slope: Callable[[Tensor, Where], Slopes],
    x: Tensor,
    step: float,
    nodes: tuple[Where, Where, Where],
    first: Slopes | None = None,
) -> Slopes:
    """What one step adds to x and to every integral along the path.

    Args:
        slope: (x, node) -> the derivative of x, and of any integrals that x does not depend on.
        x: state at the first node.
        step: length in the variable of the derivatives, of either sign.
        nodes: beginning, middle and end of the step, in whatever form ``slope`` takes them.
        first: ``slope`` at x and the first node, where it is known already.
    """
    start, middle, end = nodes
    k1 = slope(x, start) if first is None else first
    k2 = slope(x + step / 2 * k1[0], middle)
    k3 = slope(x + step / 2 * k2[0], middle)
    k4 = slope(x + step * k3[0], end)
    return tuple(step / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(k1, k2, k3, k4, strict=True))
