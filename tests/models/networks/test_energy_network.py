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
