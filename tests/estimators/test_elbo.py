"""The simulation-free likelihood: unbiased for the true field, with bars that cover, and not the ODE's number."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from test_whitened import mixture, with_moments
from torch import Tensor
from toy_flows import Field, points, spd

from flowlik_estimators import elbo, get
from flowlik_estimators.call import Estimate
from flowlik_models.adapters.wrap import wrap
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.interfaces import source_of
from flowlik_models.moments.moments import estimate


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def known(task: str, n: int, seed: int = 11) -> tuple[Any, Tensor, Tensor]:
    """A closed form with its moments, fresh points, and their exact log-densities at its data end."""
    model = with_moments(closed_form(task))
    x = model.sample(n, generator=seeded(seed), t=1 - model.eps)
    return model, x, model.log_prob(x, 1 - model.eps).double()


def bits(out: Estimate, truth: Tensor, d: int) -> Tensor:
    return (truth - out.log_prob) / (d * math.log(2))


def covered(out: Estimate, truth: Tensor) -> float:
    assert out.stderr is not None
    half = torch.from_numpy(student.ppf(0.975, out.extra["dof"].numpy())) * out.stderr
    return float(((out.log_prob - truth).abs() <= half).double().mean())


def is_within_its_error(errors: Tensor) -> bool:
    return bool(errors.mean().abs() < 3 * errors.std() / math.sqrt(len(errors)))


def test_64_forwards_are_off_by_three_hundredths_of_a_bit_and_the_bar_covers() -> None:
    model, x, truth = known("gmm-64d", 1000)
    out = get("elbo").log_prob(model, x)
    errors = bits(out, truth, 64)
    assert (out.cost.forwards, out.cost.vjps, out.cost.jvps) == (64, 0, 0)
    assert float(errors.abs().mean()) < 0.032
    assert 0.93 <= covered(out, truth) <= 0.97
    assert is_within_its_error(errors)


@pytest.mark.parametrize(
    "options",
    [
        {"antithetic": False},
        {"levels": "uniform"},
        {"control": "none"},
        {"draws": 16, "replicates": 8},
        {"draws": 126, "replicates": 7},
    ],
)
@pytest.mark.parametrize("task", ["gmm-2d", "thin-2d", "checkerboard-2d"])
def test_no_option_biases_the_likelihood_of_a_true_field(task: str, options: dict[str, Any]) -> None:
    model, x, truth = known(task, 400 if task == "checkerboard-2d" else 2000)
    assert is_within_its_error(bits(get("elbo", **options).log_prob(model, x), truth, 2))


def test_a_gaussian_with_its_own_moments_has_no_noise_and_no_error() -> None:
    exact = with_moments(Gaussian(points(5, seed=3), spd(5)))
    x = exact.sample(50, generator=seeded(1), dtype=torch.float64)
    out = get("elbo", draws=8, replicates=2).log_prob(exact, x)
    assert float((out.log_prob - exact.log_prob(x)).abs().max()) < 1e-8


def test_more_draws_cost_more_and_the_noise_falls_with_their_root() -> None:
    model, x, truth = known("gmm-64d", 100)
    few, many = (bits(get("elbo", draws=n).log_prob(model, x), truth, 64).square().mean() for n in (32, 288))
    assert 2.0 < float((few / many).sqrt()) < 4.5


@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_before_the_data_end_it_is_the_density_there(eps: float) -> None:
    model = with_moments(mixture())
    x = model.sample(2000, generator=seeded(2), t=1 - eps, dtype=torch.float64)
    errors = bits(get("elbo", eps=eps).log_prob(model, x), model.log_prob(x, 1 - eps), model.event_shape[0])
    assert is_within_its_error(errors)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_moments_of_low_rank_are_a_control_as_good(rank: int) -> None:
    model = with_moments(mixture(), rank)
    x = model.sample(1000, generator=seeded(2), dtype=torch.float64)
    assert is_within_its_error(bits(get("elbo").log_prob(model, x), model.log_prob(x), model.event_shape[0]))


def wrapped(clean: float, noisy: float, *, moments: bool = True) -> tuple[Any, Any]:
    """A mixture's exact noise prediction between two levels of noise, as a network of somebody's own is wrapped."""
    truth = closed_form("gmm-2d").double()

    def net(z: Tensor, u: Tensor) -> Tensor:
        t = 1 / (1 + u)
        y = t[:, None] * z
        return y - t[:, None] * truth.velocity(y, t)

    train = truth.sample(200_000, generator=seeded(3), dtype=torch.float64)
    path = (torch.ones_like, lambda u: u, (noisy, clean))
    given = {"moments": train} if moments else {}
    return wrap(net, event_shape=(2,), predicts="noise", path=path, **given), truth


@pytest.mark.filterwarnings("ignore:the network's noisy end")
@pytest.mark.parametrize("noisy", [3.0, 60.0])
def test_a_wrapped_network_is_judged_between_its_own_ends(noisy: float) -> None:
    model, truth = wrapped(0.02, noisy)
    x = truth.sample(500, generator=seeded(4), dtype=torch.float64)
    expected = get("ode", rtol=1e-5, atol=1e-5).log_prob(model, x).log_prob
    errors = bits(get("elbo", draws=128).log_prob(model, x), expected, 2)
    assert is_within_its_error(errors)


def test_what_is_known_of_an_item_does_not_hang_on_its_batch() -> None:
    model, x, _ = known("gmm-64d", 12)
    whole = get("elbo", draws=16).log_prob(model, x, generator=seeded(5))
    part = get("elbo", draws=16).log_prob(model, x[5:7], generator=seeded(5), items=torch.tensor([5, 6]))
    assert float((whole.log_prob[5:7] - part.log_prob).abs().max()) < 1e-3


def test_noise_of_neighbouring_levels_is_orthogonal_and_each_normal() -> None:
    drawn = torch.randn(2, 5, 3000, 3, dtype=torch.float64, generator=seeded(0))
    turned = elbo._orthogonal(drawn)
    assert float((turned[0, 0] * turned[0, 2]).sum(1).abs().max()) < 1e-12
    assert torch.allclose(turned.norm(dim=3), drawn.norm(dim=3))
    moments = torch.einsum("rlbi,rlbj->rlij", turned, turned) / 3000
    assert float((moments - torch.eye(3, dtype=torch.float64)).abs().max()) < 0.15
    assert float(turned.mean(2).abs().max()) < 0.08


def test_it_can_be_a_loss() -> None:
    model, x, _ = known("gmm-64d", 4)
    x.requires_grad_()
    out = get("elbo", draws=16).log_prob(model, x, differentiable=True)
    (slope,) = torch.autograd.grad(out.log_prob.sum(), x)
    assert bool(slope.isfinite().all())
    assert float(slope.abs().max()) > 0


def test_what_it_cannot_work_with_is_refused_with_the_cure() -> None:
    x = points(4, 2)
    plain = get("elbo").log_prob(Field(lambda x, t: -x), x)
    assert (plain.status, plain.reason) == (
        "refused",
        "control=gaussian needs the data's moments (`model.moments`); control=none goes without",
    )
    no_field = type("NoField", (), {"event_shape": (2,)})()
    assert "velocity field" in str(get("elbo").log_prob(no_field, x).reason)
    other = Field(lambda x, t: -x, moments=estimate(points(9, 3), "another"))
    assert "another data set" in str(get("elbo").log_prob(other, x).reason)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"replicates": 1}, "replicates must be at least 2, got 1"),
        ({"draws": 12}, "draws must be a multiple of 4 replicates x 2 signs, got 12"),
        ({"draws": 0}, "draws must be a multiple of 4 replicates x 2 signs, got 0"),
        ({"draws": 6, "antithetic": False}, "draws must be a multiple of 4 replicates, got 6"),
        ({"lowest": 0.0}, "lowest must be positive, got 0.0"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        get("elbo", **options)


def test_a_field_with_a_clean_end_alone_starts_from_noise_like_any_other() -> None:
    exact = closed_form("gmm-2d")
    model = wrap(exact.velocity, (2,), predicts="velocity", path=(lambda u: u, lambda u: 1 - u, (0.0, 0.99)))
    assert source_of(model) is None
    x = exact.sample(400, generator=torch.Generator().manual_seed(5), t=0.99) / 0.99
    truth = exact.log_prob((0.99 * x).double(), 0.99) + 2 * math.log(0.99)
    found = get("elbo", draws=512, control="none").log_prob(model, x)
    assert found.status == "ok"
    error = found.log_prob - truth
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20
    assert get("self-guidance").supports(model) == get("f2d2").supports(model)  # no map, and nothing else
