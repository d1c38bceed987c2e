"""Targets of one hidden number: against numerical integrals of their own, far points, and times close to the data."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik_models.closed_forms.moving_nodes import posterior
from flowlik_models.closed_forms.targets import Funnel, ManyWell, forty_modes

Array = NDArray[np.float64]


def well(u: Array) -> Array:
    return np.asarray(np.exp(-(u**4) + 6 * u**2 + u / 2))


@pytest.mark.parametrize("t", [0.02, 0.3, 0.8, 0.97, 0.999])
def test_a_double_well_is_the_convolution_of_its_density(t: float) -> None:
    u = np.linspace(-5, 5, 2_000_001)
    step = u[1] - u[0]
    density = well(u) / (well(u).sum() * step)
    y = np.array([[-2.4, 0.3], [-0.1, -1.0], [1.9, 2.0], [4.0, 0.0]])
    found = ManyWell(1).log_prob(torch.from_numpy(y), t).numpy()
    for row, value in zip(y, found, strict=True):
        kernel = -0.5 * ((row[0] - t * u) / (1 - t)) ** 2 - math.log(1 - t) - 0.5 * math.log(2 * math.pi)
        top = kernel.max()
        first = top + math.log((np.exp(kernel - top) * density).sum() * step)
        variance = t**2 + (1 - t) ** 2
        second = -0.5 * (row[1] ** 2 / variance + math.log(2 * math.pi * variance))
        assert value == pytest.approx(first + second, abs=1e-8)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.8, 0.97])
def test_a_funnel_is_the_integral_over_its_first_coordinate(t: float) -> None:
    u = np.linspace(-40, 40, 2_000_001)
    y = np.array(
        [[-6.0, 0.1, -0.2, 0.05], [0.0, 1.0, 2.0, -1.0], [5.0, 30.0, -8.0, 12.0], [3.0, 0.01, 0.0, 0.0]]
    )
    found = Funnel(4).log_prob(torch.from_numpy(y), t).numpy()
    for row, value in zip(y, found, strict=True):
        variance = t**2 * np.exp(u) + (1 - t) ** 2
        log = -0.5 * ((u / 3) ** 2 + ((row[0] - t * u) / (1 - t)) ** 2 + (row[1:] ** 2).sum() / variance)
        log = log - 1.5 * np.log(variance) - math.log(3) - math.log(1 - t) - 2.5 * math.log(2 * math.pi)
        top = log.max()
        assert value == pytest.approx(top + math.log(np.exp(log - top).sum() * (u[1] - u[0])), abs=1e-8)


@pytest.mark.parametrize("model", [ManyWell(3), Funnel(6)])
def test_the_density_at_the_data_is_the_limit_of_those_before(model: ManyWell | Funnel) -> None:
    x = model.sample(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    at_the_data = model.log_prob(x)
    for t, most in ((1 - 1e-4, 0.02), (1 - 1e-5, 1e-3), (1 - 1e-6, 5e-4), (1 - 1e-9, 5e-4)):
        assert float((model.log_prob(x, t) - at_the_data).abs().median()) < most
    assert bool(model.log_prob(x * 50, 0.999).isfinite().all())
    v, divergence = model.velocity_and_divergence(x * 50, torch.full((300,), 0.999))
    assert bool(v.isfinite().all() and divergence.isfinite().all())


@pytest.mark.parametrize("model", [ManyWell(2), Funnel(3), forty_modes()])
def test_samples_have_the_moments_that_are_told(model: ManyWell | Funnel) -> None:
    x = model.sample(400_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mean, covariance = model.mean_and_covariance()
    scale = covariance.diag().sqrt()
    assert float(((x.mean(0) - mean) / scale).abs().max()) < 0.02
    found = torch.cov(x.T) / scale[:, None] / scale
    far = 0.5 if isinstance(model, Funnel) else 0.01  # a log-normal's variance converges slowly
    assert float((found - covariance / scale[:, None] / scale).abs().max()) < far


def test_wells_are_drawn_from_their_density() -> None:
    x = ManyWell(1).sample(400_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)[:, 0]
    edges = np.linspace(-2.6, 2.6, 27)
    share = np.histogram(x.numpy(), edges)[0] / len(x)
    fine = np.linspace(-4, 4, 800_001)
    total = well(fine).sum()
    exact = [well(fine[(fine >= a) & (fine < b)]).sum() / total for a, b in pairwise(edges)]
    assert np.abs(share - np.array(exact)).max() < 5 * math.sqrt(0.2 / len(x))


def test_nodes_find_what_is_narrow_and_what_has_two_maxima() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    centre = torch.tensor([-7.3, 0.0, 8.1], dtype=torch.float64)
    width = torch.tensor([1e-6, 1e-2, 3.0], dtype=torch.float64)

    def one(u: Tensor) -> Tensor:
        return -0.5 * ((u - centre[:, None]) / width[:, None]).square()

    log_mass, u, weight = posterior(one, zero - 50, zero + 50)
    expected = width.log() + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_mass, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close((weight * u).sum(1), centre, rtol=0, atol=1e-9)
    log_mass, u, weight = posterior(
        lambda u: torch.logaddexp(-8 * (u - 2).square(), -8 * (u + 2).square()), zero - 9, zero + 9
    )
    torch.testing.assert_close(log_mass.exp(), zero + 2 * math.sqrt(math.pi / 8), rtol=1e-9, atol=0)
