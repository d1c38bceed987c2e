"""Self-guidance on maps whose likelihood is known: what the noise does, what it costs, what the controls do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowlik_estimators import get
from flowlik_models.closed_forms.gaussian import Gaussian

N = 40


class Still:
    """The map that moves nothing and says D(x, t, s) = pull . x, so samples are the guided noise itself."""

    event_shape = (3,)

    def __init__(self, pull: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
        self.pull = torch.tensor(pull, dtype=torch.float64)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x), x @ self.pull.to(x)


def noise(model: object) -> Tensor:
    return get("f2d2", steps=1).sample(model, N, dtype=torch.float64).x


def guided(model: object, **options: object) -> Tensor:
    return get("self-guidance", **options).sample(model, N, dtype=torch.float64).x


def test_the_prior_alone_shrinks_every_coordinate_by_the_step_size() -> None:
    x0 = noise(Still())
    assert torch.allclose(guided(Still(), direction="prior", step_size=0.1), x0 - 0.1 * x0.sign(), atol=1e-6)


def test_on_a_gaussian_the_divergence_is_constant_and_guidance_is_the_prior_alone() -> None:
    model = Gaussian(torch.tensor([1.0, -2.0]), torch.diag(torch.tensor([0.5, 0.01])))
    for updates in (1, 5):
        towards, shrunk = (
            guided(model, updates=updates, step_size=0.2, direction=name) for name in ("likelihood", "prior")
        )
        assert torch.allclose(towards, shrunk, atol=1e-9)


def test_one_update_goes_against_the_sign_of_noise_plus_slope_of_the_divergence() -> None:
    model = Still((2.0, -2.0, 0.0))
    x0 = noise(model)
    expected = x0 - 0.05 * (x0 + model.pull).sign()
    assert torch.allclose(guided(model), expected, atol=1e-6)


def test_several_updates_reach_the_mode_of_the_predicted_likelihood() -> None:
    """The predicted log-density of the latent is -|x|^2/2 - pull . x, largest at -pull."""
    model = Still((0.5, -1.0, 0.0))
    far = guided(model, updates=400, step_size=0.05)
    assert (far + model.pull).abs().max() < 0.02


def test_the_random_control_goes_as_far_in_another_direction() -> None:
    model = Still((2.0, -2.0, 0.0))
    x0 = noise(model)
    moves = [guided(model, direction=name, updates=3) - x0 for name in ("likelihood", "random")]
    assert torch.allclose(*(move.norm(dim=1) for move in moves))
    cosine = torch.nn.functional.cosine_similarity(*moves)
    assert abs(float(cosine.mean())) < 4 / math.sqrt(3 * N)


@pytest.mark.parametrize(
    ("options", "forwards", "vjps"),
    [
        ({"steps": 2}, 3, 1),
        ({"steps": 4, "updates": 3}, 7, 3),
        ({"steps": 2, "updates": 3, "direction": "prior"}, 2, 0),
        ({"steps": 2, "direction": "random"}, 3, 1),
    ],
)
def test_an_update_costs_one_forward_and_one_vjp(
    options: dict[str, object], forwards: int, vjps: int
) -> None:
    cost = get("self-guidance", **options).sample(Still(), N).cost
    assert (cost.forwards, cost.vjps, cost.jvps) == (forwards, vjps, 0)


def test_guided_samples_have_no_density_and_points_have_that_of_the_map() -> None:
    model = Gaussian(torch.zeros(2), torch.diag(torch.tensor([0.5, 0.01])))
    assert get("self-guidance").sample(model, N).log_prob is None
    x = model.sample(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (get(name, steps=2).log_prob(model, x).log_prob for name in ("self-guidance", "f2d2"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("direction", ["likelihood", "prior", "random"])
def test_samples_are_keyed_by_item(direction: str) -> None:
    estimator = get("self-guidance", direction=direction, updates=2)
    model = Still((1.0, 0.0, -1.0))
    whole = estimator.sample(model, 6, dtype=torch.float64).x
    part = estimator.sample(model, 2, items=torch.tensor([4, 1]), dtype=torch.float64).x
    assert torch.equal(part, whole[[4, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0.0}, "step_size must be positive"),
        ({"updates": 0}, "updates must be at least 1"),
        ({"direction": "priors"}, "prior"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("self-guidance", **options)
