"""One step of RK4: its order, its integrals, and the slope that is known beforehand."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowlik_models.numerics.cosine_transform import cosines
from flowlik_models.numerics.runge_kutta import rk4_increments
from flowlik_models.numerics.standard_normal import standard_normal_log_prob


def growth(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """dx/dt = x, and the integral of cos t along the way."""
    return x, torch.full_like(x, math.cos(t))


def test_error_of_a_step_is_of_fifth_order() -> None:
    errors = []
    for step in (0.2, 0.1):
        moved, added = rk4_increments(growth, torch.ones(1, dtype=torch.float64), step, (0.0, step / 2, step))
        errors.append((float(moved) - math.expm1(step), float(added) - math.sin(step)))
    for coarse, fine in zip(*errors, strict=True):
        assert 4.8 < math.log2(coarse / fine) < 5.2


def test_a_known_first_slope_is_not_evaluated_again() -> None:
    seen = []

    def slope(x: Tensor, k: int) -> tuple[Tensor]:
        seen.append(k)
        return (x,)

    x = torch.ones(1)
    known = rk4_increments(slope, x, 0.5, (0, 1, 2), first=(x,))
    assert seen == [1, 1, 2]
    assert torch.equal(known[0], rk4_increments(slope, x, 0.5, (0, 1, 2))[0])


def test_standard_normal_is_in_double_precision() -> None:
    x = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(x), expected)


def test_cosines_are_orthonormal_rows() -> None:
    torch.testing.assert_close(cosines(5) @ cosines(5).T, torch.eye(5, dtype=torch.float64))
    assert float(cosines(5)[0].std()) < 1e-15
