"""Scalar networks start as the Gaussian with the data's moments, and their loss knows values and slopes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.networks.energy import VectorEnergy
from flowlik_models.objectives.energy import SLOPE, energy_errors, exact_targets
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.recipes.table import RECIPES
from flowlik_models.zoo import build

TASKS = [task for task, models in RECIPES.items() if "energy" in models]


def points(task: str, n: int = 64) -> Tensor:
    drawn: Tensor = closed_form(task).sample(n, generator=torch.Generator().manual_seed(1))
    return drawn


@pytest.mark.parametrize("task", TASKS)
def test_it_starts_as_the_gaussian_with_the_moments_of_the_data(task: str) -> None:
    network, x = build(task, RECIPES[task]["energy"]), points(task)
    exact = Gaussian(*closed_form(task).mean_and_covariance()).log_prob(x.double())
    assert float((network.log_density(x) - exact).abs().max().detach()) < 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_it_is_no_larger_than_the_direct_map(task: str) -> None:
    sizes = [
        sum(p.numel() for p in build(task, RECIPES[task][model]).parameters())
        for model in ("energy", "direct-f2d2")
    ]
    assert sizes[0] <= sizes[1]


def test_errors_of_a_constant_offset_and_of_a_wrong_slope_are_what_they_are() -> None:
    truth = closed_form("gaussian-2d")
    mean, covariance = truth.mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance)
    network, x = VectorEnergy(mean, values, vectors), points("gaussian-2d")
    log_prob, score = exact_targets(truth, x, 1.0)
    assert float(energy_errors(network, x, log_prob, score).max().detach()) < 1e-6
    assert torch.allclose(
        energy_errors(network, x, log_prob + 3.0, score), torch.full((64,), 9.0 / 2), rtol=1e-3
    )
    axis = (vectors[:, 1] / values[1].sqrt()).float()
    wrong = energy_errors(network, x, log_prob, score + axis)
    assert torch.allclose(wrong, torch.full((64,), SLOPE / 2), rtol=1e-2)
    with pytest.raises(ValueError, match="expected log-densities"):
        energy_errors(network, x, log_prob[:, None], score)


def test_targets_that_are_large_are_fitted_to_relative_accuracy() -> None:
    """The same mistake counts for as much less as the target is larger than the bound."""
    network = Steep()
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    log_prob, score = torch.full((64,), -4000.0), torch.zeros(64, 2)
    plain = energy_errors(network, x, log_prob, score)
    torch.testing.assert_close(plain, torch.full((64,), 40.0**2 / 2))
    found = energy_errors(network, x, log_prob, score, relative=5.0)
    torch.testing.assert_close(found, plain / (1 + 400.0**2))
    steep = torch.tensor([3000.0, 4000.0]).expand(64, 2)
    slope = energy_errors(network, x, log_prob + 40.0, steep, relative=5.0)
    size = (steep**2 * network.eigenvalues).mean(1)
    torch.testing.assert_close(slope, SLOPE * size / (1 + size / 25.0))


class Steep:
    """A log-density of -3960 everywhere, of data with variances 1 and 4."""

    eigenvalues = torch.tensor([1.0, 4.0])
    eigenvectors = torch.eye(2)

    def log_density(self, x: Tensor) -> Tensor:
        return -3960.0 + 0.0 * x.sum(1)


@pytest.mark.parametrize("task", ["gmm-2d", "gmm-64d", "thin-2d"])
def test_targets_are_the_exact_density_and_its_gradient(task: str) -> None:
    truth = closed_form(task).double()
    t = 1 - truth.eps
    x = truth.sample(20, generator=torch.Generator().manual_seed(2), t=t, dtype=torch.float64)
    log_prob, score = exact_targets(truth, x, t)
    assert torch.equal(log_prob, truth.log_prob(x, t))
    step = 1e-6 * torch.ones_like(x)
    slope = (truth.log_prob(x + step, t) - truth.log_prob(x - step, t)) / 2e-6
    assert torch.allclose(score.sum(1), slope, rtol=1e-3, atol=1e-3 * float(slope.abs().max()))


def test_recipes_that_it_cannot_follow_are_refused() -> None:
    with pytest.raises(ValueError, match="energy regresses the log-density of a closed form"):
        Recipe(objective="energy", teacher="teacher")
    with pytest.raises(ValueError, match="energy regresses the log-density of a closed form"):
        Recipe(objective="energy", divergence=True)
