"""Policies are fields: their divergence is autograd's in every layout, and the true posterior is one of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from toy_flows import points, random_policy

from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.policies import MixturePolicy, Positions, PredictionPolicy

SHAPES = {"vector": (6,), "image": (2, 2, 2)}


def traced(policy: MixturePolicy | PredictionPolicy, x: Tensor, t: Tensor) -> Tensor:
    """The divergence by autograd, (batch,)."""
    x = x.clone().requires_grad_()
    flat = policy.velocity(x, t).flatten(1)
    rows = [
        torch.autograd.grad(flat[:, i].sum(), x, retain_graph=True)[0].flatten(1)
        for i in range(flat.shape[1])
    ]
    return torch.stack([row[:, i] for i, row in enumerate(rows)], 1).sum(1)


@pytest.mark.parametrize("time", [0.0, 0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    ("shape", "layout", "variance", "anchored"),
    list(itertools.product(SHAPES, ["whole", "position"], ["component", "shared"], [False, True])),
)
def test_divergence_is_that_of_autograd(
    shape: str, layout: str, variance: str, anchored: bool, time: float
) -> None:
    event = SHAPES[shape]
    policy = random_policy(event, layout, variance, anchored=anchored)
    x, t = points(5, *event, seed=4), torch.full((5,), max(time, 0.3 * anchored), dtype=torch.float64)
    velocity, divergence = policy.velocity_and_divergence(x, t)
    assert velocity.shape == x.shape
    torch.testing.assert_close(divergence, traced(policy, x, t), rtol=1e-9, atol=1e-9)
    assert torch.equal(divergence, policy.divergence(x, t))


def test_rotated_positions_have_the_divergence_of_autograd() -> None:
    policy = random_policy((6,), "position", "component", anchored=False, rotated=True)
    x, t = points(5, 6), torch.full((5,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(policy.divergence(x, t), traced(policy, x, t), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["whole", "position"])
@pytest.mark.parametrize("variance", ["component", "shared"])
@pytest.mark.parametrize("start", [0.0, 0.4, 0.95])
def test_prior_anchored_at_any_point_is_the_same_field(layout: str, variance: str, start: float) -> None:
    """The anchored form with the posterior of a prior at (x_a, t_a), followed in both directions."""
    prior = random_policy((6,), layout, variance, anchored=False)
    anchor, time = points(5, 6, seed=9), torch.full((5,), start, dtype=torch.float64)
    zeta = (time / (1 - time)).square()[:, None, None]
    nu = (time / (1 - time).square())[:, None, None, None] * prior.positions.split(anchor)[:, :, None]
    grown = 1 + prior.variances * zeta
    means = (prior.means + prior.variances[..., None] * nu) / grown[..., None]
    inner = (prior.means * nu).sum(3) - 0.5 * zeta * prior.means.square().sum(3)
    inner = inner + 0.5 * prior.variances * nu.square().sum(3)
    weights = prior.log_weights + inner / grown - 0.5 * prior.positions.channels * grown.log()
    posterior = MixturePolicy(prior.positions, weights, means, prior.variances / grown, anchor, time)
    x = points(5, 6, seed=10)
    for now in (0.0, 0.2, 0.4, 0.6, 0.99):
        t = torch.full((5,), now, dtype=torch.float64)
        found, expected = (policy.velocity_and_divergence(x, t) for policy in (posterior, prior))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    assert bool(posterior.usable(torch.zeros(5, dtype=torch.float64)).all())


def test_true_posterior_of_a_mixture_is_a_policy() -> None:
    truth = closed_form("gmm-2d")
    policy = MixturePolicy(
        Positions((2,), "whole"),
        truth.weights.log().expand(50, 1, -1),
        truth.means.expand(50, 1, -1, -1),
        truth.stds[:, 0].square().expand(50, 1, -1),
    )
    x, t = 2 * points(50, 2), torch.linspace(0, 1, 50, dtype=torch.float64)
    torch.testing.assert_close(policy.velocity_and_divergence(x, t), truth.velocity_and_divergence(x, t))


@pytest.mark.parametrize("anchored", [False, True])
def test_fields_stay_accurate_in_single_precision_near_the_data(anchored: bool) -> None:
    policy = random_policy((6,), "position", "component", anchored=anchored)
    x, t = points(5, 6), torch.full((5,), 0.999, dtype=torch.float64)
    exact = policy.velocity_and_divergence(x, t)
    single = policy._mapped(lambda tensor: tensor.float())
    for found, expected in zip(single.velocity_and_divergence(x.float(), t.float()), exact, strict=True):
        assert float((found - expected).abs().max()) < 2e-2 * float(expected.abs().max())


def test_predictions_have_a_divergence_that_does_not_see_x() -> None:
    times = [torch.full((5,), value, dtype=torch.float64) for value in (0.9, 0.2, 0.55)]
    policy = PredictionPolicy(points(5, 3, 6), *times[:2])
    x = points(5, 6, seed=5)
    torch.testing.assert_close(policy.divergence(x, times[2]), traced(policy, x, times[2]))
    torch.testing.assert_close(policy.divergence(x, times[2]), policy.divergence(2 * x, times[2]))
    for time, expected in zip(
        times, (policy.predictions[:, 0], policy.predictions[:, 2], policy.predictions[:, 1]), strict=True
    ):
        found = x + (1 - time)[:, None] * policy.velocity(x, time)
        torch.testing.assert_close(found, expected)


def test_thinning_leaves_at_least_one_component_and_never_changes_the_parameters() -> None:
    policy = random_policy((6,), "whole", "component", anchored=False)
    thin = policy.thinned(0.9, torch.Generator().manual_seed(0))
    gone = thin.log_weights == -math.inf
    assert bool(gone.any())
    assert not bool(gone.all(2).any())
    assert torch.equal(thin.log_weights[~gone], policy.log_weights[~gone])
    assert bool(torch.isfinite(thin.velocity(points(5, 6), torch.full((5,), 0.5, dtype=torch.float64))).all())


def test_policies_that_cannot_be_followed_say_so_by_row() -> None:
    policy = random_policy((6,), "position", "component", anchored=True)
    policy.variances[1, 2, 0] = math.nan
    policy.variances[2, 0, 0] = -0.1
    policy.means[3, 0, 0, 0] = math.inf
    later, earlier = (torch.full((5,), value, dtype=torch.float64) for value in (0.9, 0.0))
    assert policy.usable(later).tolist() == [True, False, False, False, True]
    policy.variances[0] = 100.0  # more than the path has told by then: no prior has this posterior
    assert policy.usable(earlier).tolist()[0] is False


def test_shapes_that_do_not_fit_are_refused() -> None:
    good = random_policy((6,), "whole", "component", anchored=False)
    with pytest.raises(ValueError, match="variances have shape"):
        MixturePolicy(good.positions, good.log_weights, good.means, good.variances[:, :, :2])
    with pytest.raises(ValueError, match="means"):
        MixturePolicy(good.positions, good.log_weights, good.means[..., :3], good.variances)
    with pytest.raises(ValueError, match="an anchor needs its time"):
        MixturePolicy(good.positions, good.log_weights, good.means, good.variances, anchor=points(5, 6))
