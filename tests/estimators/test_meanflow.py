"""The plain map: exact where its rule is, and off by a known amount where it is not."""

from __future__ import annotations

import math

import pytest
import torch
from toy_flows import Field, LinearMap, points, spd, stable_matrix

from flowlik_estimators import get
from flowlik_models.closed_forms.gaussian import Gaussian


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_plain_map_carries_points_exactly_and_reports_the_trace_of_its_jacobian(steps: int) -> None:
    """For a linear field: u = (exp(h A) - I) x/h, so the log-determinant reported is N tr(exp(-A/N) - I)."""
    model = LinearMap(stable_matrix(3))
    x = points(5, 3)
    out = get("meanflow", steps=steps).log_prob(model, x)
    matrix = model.matrix.detach()
    step = torch.matrix_exp(-matrix / steps) - torch.eye(3, dtype=torch.float64)
    expected = model.log_prob(x).detach() + matrix.trace() + steps * step.trace()
    torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-9)
    assert (out.cost.forwards, out.cost.vjps) == (steps, 3 * steps)


def test_thin_gaussian_gets_an_impossible_likelihood() -> None:
    """N(0, diag(1, 0.02^2)): truth -0.775 bits/dim, the published rule about -33, -16, -7.6, -3.7."""
    model = Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 0.02**2])))
    x = model.sample(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def bits(log_prob: torch.Tensor) -> float:
        return -float(log_prob.mean()) / (2 * math.log(2))

    assert bits(model.log_prob(x)) == pytest.approx(-0.775, abs=0.05)
    for steps, published in ((1, -33.0), (2, -16.0), (4, -7.6), (8, -3.7)):
        # the mean x^2 term is of the sample, the rest of the rule; both signs say "impossible"
        assert bits(get("meanflow", steps=steps).log_prob(model, x).log_prob) == pytest.approx(
            published, rel=0.1
        )


def test_hutchinson_averages_to_the_exact_trace_with_its_error_bar() -> None:
    model = Gaussian(torch.zeros(4), spd(4))
    x = points(6, 4)
    noisy = get("meanflow", steps=2, trace="hutchinson", probes=64).log_prob(model, x)
    exact = get("meanflow", steps=2).log_prob(model, x)
    assert noisy.stderr is not None
    assert bool(((noisy.log_prob - exact.log_prob).abs() < 5 * noisy.stderr).all())
    assert noisy.cost.vjps == 2 * 64
    assert get("meanflow", trace="hutchinson").log_prob(model, x).stderr is None


def test_samples_are_exact_and_carry_no_density() -> None:
    model = Gaussian(points(3, seed=2), spd(3))
    drawn = get("meanflow", steps=3).sample(model, 20, dtype=torch.float64)
    joint = get("f2d2", steps=1).sample(model, 20, dtype=torch.float64)
    torch.testing.assert_close(drawn.x, joint.x, rtol=0, atol=1e-9)
    assert drawn.log_prob is None
    assert (drawn.cost.forwards, drawn.cost.vjps) == (3, 0)


def test_model_without_a_map_is_refused() -> None:
    out = get("meanflow").log_prob(Field(lambda x, t: x), points(3, 2))
    assert out.status == "refused"
    assert out.reason is not None
    assert "average_velocity" in out.reason


def test_value_is_differentiable_in_parameters() -> None:
    model = LinearMap(stable_matrix(3))
    x = points(4, 3)
    out = get("meanflow", steps=2).log_prob(model, x, differentiable=True)
    (found,) = torch.autograd.grad(out.log_prob.sum(), model.matrix)
    matrix = model.matrix
    step = torch.matrix_exp(-matrix / 2) - torch.eye(3, dtype=torch.float64)
    value = model.log_prob(x).sum() + 4 * (matrix.trace() + 2 * step.trace())
    (expected,) = torch.autograd.grad(value, matrix)
    torch.testing.assert_close(found, expected)
