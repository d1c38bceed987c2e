"""Mixtures with common axes: the same flow as mixtures with axes of their own, and exact at any size."""

from __future__ import annotations

import math

import pytest
import torch

from flowlik_estimators import get
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.closed_forms.shared_basis import SharedBasisMixture

K, SHAPE = 3, (1, 3, 4)
D = math.prod(SHAPE)


def parameters(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    weights = torch.rand(K, **draw) + 0.2
    basis = torch.linalg.qr(torch.randn(D, D, **draw))[0]
    return weights / weights.sum(), torch.randn(K, D, **draw), torch.rand(K, D, **draw) ** 3 + 1e-3, basis


@pytest.fixture
def model() -> SharedBasisMixture:
    return SharedBasisMixture(*parameters(), SHAPE)


@pytest.fixture
def plain() -> GaussianMixture:
    weights, means, spectra, basis = parameters()
    return GaussianMixture(weights, means, spectra.sqrt(), basis.expand(K, D, D).clone())


def points(n: int = 24) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("time", [0.0, 0.3, 0.97, 1.0, None])
def test_it_is_the_mixture_with_the_same_axes_for_every_component(
    model: SharedBasisMixture, plain: GaussianMixture, time: float | None
) -> None:
    x = points()
    t = (
        torch.linspace(0, 1, len(x), dtype=x.dtype)
        if time is None
        else torch.full((len(x),), time, dtype=x.dtype)
    )
    velocity, divergence = model.velocity_and_divergence(x, t)
    expected, div = plain.velocity_and_divergence(x.flatten(1), t)
    assert velocity.flatten(1).numpy() == pytest.approx(expected.numpy(), abs=1e-9)
    assert divergence.numpy() == pytest.approx(div.numpy(), rel=1e-9, abs=1e-9)
    assert model.log_prob(x, t).numpy() == pytest.approx(plain.log_prob(x.flatten(1), t).numpy(), abs=1e-9)
    assert torch.equal(model.velocity(x, t), velocity)


def test_the_divergence_is_the_trace_of_the_velocitys_jacobian(model: SharedBasisMixture) -> None:
    x, t = points(4), torch.full((4,), 0.9, dtype=torch.float64)
    for row in range(4):
        one = x[row : row + 1]
        jacobian = torch.func.jacrev(lambda y: model.velocity(y, t[:1]).flatten())(one)
        trace = jacobian.reshape(D, D).trace()
        assert float(model.divergence(one, t[:1])) == pytest.approx(float(trace), rel=1e-9)


def test_single_precision_keeps_the_log_density_to_rounding(model: SharedBasisMixture) -> None:
    x = points(8).float()
    exact = model.log_prob(x.double())
    assert model.log_prob(x).dtype == torch.float64
    assert model.log_prob(x).numpy() == pytest.approx(exact.numpy(), rel=1e-4)
    t = torch.full((8,), 0.9)
    velocity, divergence = model.velocity_and_divergence(x, t)
    assert velocity.dtype == torch.float32
    assert divergence.numpy() == pytest.approx(model.divergence(x.double(), t.double()).numpy(), rel=1e-4)


def test_gradients_with_respect_to_the_times_of_single_rows(model: SharedBasisMixture) -> None:
    x = points(3)
    t = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(model.velocity(x, t).sum(), t)
    step = torch.tensor([0.0, 1e-6, 0.0], dtype=torch.float64)
    with torch.no_grad():
        expected = (model.velocity(x, t + step) - model.velocity(x, t - step)).sum() / 2e-6
    assert float(found[1]) == pytest.approx(float(expected), rel=1e-5)


def test_draws_have_the_stated_moments_and_components(model: SharedBasisMixture) -> None:
    x, component = model.sample_with_component(
        40_000, generator=torch.Generator().manual_seed(0), t=0.7, dtype=torch.float64
    )
    mean, covariance = model.mean_and_covariance()
    flat = x.flatten(1)
    assert flat.mean(0).numpy() == pytest.approx(0.7 * mean.numpy(), abs=0.03)
    expected = 0.49 * covariance + 0.09 * torch.eye(D, dtype=torch.float64)
    assert torch.cov(flat.T).numpy() == pytest.approx(expected.numpy(), abs=0.05)
    assert torch.equal(component, model.draw_components(40_000, torch.Generator().manual_seed(0)))
    share = torch.bincount(component, minlength=K) / len(component)
    assert share.numpy() == pytest.approx(model.weights.numpy(), abs=0.01)


def test_the_ode_finds_the_exact_log_density(model: SharedBasisMixture) -> None:
    x = model.sample(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for trace in ("closed", "exact"):
        out = get("ode", rtol=1e-8, atol=1e-8, trace=trace).log_prob(model, x)
        assert out.log_prob.numpy() == pytest.approx(model.log_prob(x).numpy(), abs=1e-5)


def test_wrong_shapes_and_parameters_are_refused(model: SharedBasisMixture) -> None:
    weights, means, spectra, basis = parameters()
    with pytest.raises(ValueError, match="must be \\(K,\\)"):
        SharedBasisMixture(weights, means, spectra[:2], basis, SHAPE)
    with pytest.raises(ValueError, match="means have 12 dimensions"):
        SharedBasisMixture(weights, means, spectra, basis, (1, 4, 4))
    with pytest.raises(ValueError, match="must be positive"):
        SharedBasisMixture(weights, means, 0 * spectra, basis, SHAPE)
    with pytest.raises(ValueError, match="sum to"):
        SharedBasisMixture(2 * weights, means, spectra, basis, SHAPE)
    with pytest.raises(ValueError, match="t must be"):
        model.velocity(points(4), torch.zeros(3, dtype=torch.float64))
