"""Wrapped networks: every prediction on every path gives the density that the exact field has."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowlik
from flowlik_estimators import Estimate, Estimator, get
from flowlik_models import moments
from flowlik_models.adapters import (
    GaussianSource,
    Path,
    SourceWarning,
    cosine,
    ddpm,
    edm,
    reverse,
    straight,
    ve,
    vp,
)
from flowlik_models.adapters.paths import Clock, as_path, from_steps
from flowlik_models.interfaces import HasSource, ends_of
from flowlik_models.synthetic import closed_form

EXACT = closed_form("gmm-2d")
PATHS: dict[str, Path] = {
    "straight": straight(),
    "reversed": reverse(),
    "vp": vp(),
    "vp-cosine": vp("cosine"),
    "cosine": cosine(),
    "ddpm": ddpm(),
    "edm": edm(),
    "ve-80": ve(0.002, 80.0),
}
ALL = [
    (p, kind)
    for p in PATHS
    for kind in ("velocity", "noise", "data", "v", "score")
    if (p, kind) != ("ddpm", "velocity")
]


def column(value: Tensor) -> Tensor:
    return value[:, None]


def exact_network(path: Path, predicts: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A network on that path whose prediction is exact for gmm-2d."""

    def net(z: Tensor, u: Tensor) -> Tensor:
        a, s = path.scales(u)
        t, y = a / (a + s), z / column(a + s)
        v = EXACT.velocity(y, t)
        noise, data = y - column(t) * v, y + column(1 - t) * v
        a_, s_ = column(a), column(s)
        if predicts == "velocity":
            _, rate_a = torch.autograd.functional.jvp(path.alpha, u, torch.ones_like(u))
            _, rate_s = torch.autograd.functional.jvp(path.sigma, u, torch.ones_like(u))
            return column(rate_a) * data + column(rate_s) * noise
        return {"noise": noise, "data": data, "score": -noise / s_, "v": a_ * noise - s_ * data}[predicts]

    return net


def points(n: int = 200, t: float = 1.0, seed: int = 0) -> Tensor:
    return EXACT.sample(n, generator=torch.Generator().manual_seed(seed), t=t, dtype=torch.float64)


EXACT_MOMENTS = moments.from_covariance(*EXACT.mean_and_covariance(), "gmm-2d")
RK4 = get("ode", solver="rk4", steps=64)


@pytest.mark.parametrize(("name", "predicts"), ALL)
def test_exact_predictions_give_the_closed_form(name: str, predicts: str) -> None:
    path = PATHS[name]
    model = flowlik.wrap(
        exact_network(path, predicts), (2,), predicts=predicts, path=path, moments=EXACT_MOMENTS
    )
    x, t = points(), model.clean_end
    truth = EXACT.log_prob(t * x, t) + 2 * math.log(t)  # of x + (s/a) n: what the network knows
    error = (RK4.log_prob(model, x).log_prob - truth).abs()
    assert float(error.mean()) < 1e-3
    assert float(error.max()) < 1e-2


@pytest.mark.parametrize("name", ["vp", "ddpm", "edm", "cosine", "reversed", "straight"])
def test_a_name_and_scales_with_a_clock_are_the_same_path(name: str) -> None:
    named = as_path(name)
    given = as_path((named.alpha, named.sigma, named.clock))
    t = torch.linspace(0.02, 0.98, 41, dtype=torch.float64)
    torch.testing.assert_close(Clock(given).at(t), Clock(named).at(t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(PATHS))
def test_the_clock_is_inverted_to_rounding(name: str) -> None:
    path = PATHS[name]
    clock = Clock(path)
    t = clock.noisy_end + (clock.clean_end - clock.noisy_end) * torch.linspace(0, 1, 301, dtype=torch.float64)
    a, s = path.scales(clock.at(t))
    torch.testing.assert_close(a / (a + s), t, rtol=0, atol=1e-9)


def test_the_clock_is_differentiable() -> None:
    t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64, requires_grad=True)
    clock = Clock(vp())
    (slope,) = torch.autograd.grad(clock.at(t).sum(), t)
    step = 1e-5
    torch.testing.assert_close(
        slope, (clock.at(t + step) - clock.at(t - step)).detach() / (2 * step), rtol=1e-4, atol=0
    )


def test_steps_are_asked_at_fractions_between_them() -> None:
    asked: list[Tensor] = []

    def net(z: Tensor, u: Tensor) -> Tensor:
        asked.append(u)
        return z

    model = flowlik.wrap(net, (2,), predicts="noise", path="ddpm")
    model.velocity(torch.zeros(3, 2), torch.tensor([0.2, 0.5, 0.9]))
    (u,) = asked
    assert bool(((u > 0) & (u < 999)).all())
    assert bool((u != u.round()).all())
    assert u.diff().lt(0).all()


# --- the source and the ends ---


class ExactSource:
    """The law of gmm-2d at t."""

    def __init__(self, t: float) -> None:
        self.t = t

    def log_prob(self, x: Tensor) -> Tensor:
        return EXACT.log_prob(x, self.t)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return EXACT.sample(n, generator=generator, t=self.t)


def low_sigma(**options: Any) -> Any:
    path = ve(0.002, 2.0)
    return flowlik.wrap(exact_network(path, "noise"), (2,), predicts="noise", path=path, **options)


@pytest.mark.parametrize(
    "estimator",
    [RK4, get("ode", divergence="quadrature", nodes=65, rtol=1e-7, atol=1e-7)],
    ids=["augmented", "quadrature"],
)
def test_the_exact_source_makes_a_small_sigma_exact(estimator: Estimator) -> None:
    model = low_sigma(source=ExactSource(1 / 3))
    x = points()
    error = (estimator.log_prob(model, x).log_prob - EXACT.log_prob(x)).abs()
    assert float(error.mean()) < 1e-3


@pytest.mark.parametrize("known", ["moments", "data"])
def test_the_gap_of_a_gaussian_source_is_said_and_is_the_one_there_is(known: str) -> None:
    with pytest.warns(SourceWarning, match=r"log p is 0\.04\d nats off"):
        model = low_sigma(moments=EXACT_MOMENTS if known == "moments" else points(20_000, seed=1))
    x = points(1000)
    error = (RK4.log_prob(model, x).log_prob - EXACT.log_prob(x)).abs().mean()
    assert 0.03 < float(error) < 0.06
    assert model.source_gap == pytest.approx(float(error), rel=0.2)


def test_missing_moments_are_said_where_they_matter_only() -> None:
    with pytest.warns(SourceWarning, match="moments=train_x"):
        low_sigma()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in ("ddpm", "edm", "vp"):
            flowlik.wrap(lambda z, u: z, (2,), predicts="noise", path=path)


@pytest.mark.filterwarnings("ignore::flowlik_models.adapters.SourceWarning")
def test_whitening_changes_nothing_of_a_source_of_ones_own() -> None:
    model = low_sigma(moments=EXACT_MOMENTS)
    x = points(50)
    plain = get("ode", rtol=1e-7, atol=1e-7).log_prob(model, x).log_prob
    for clock in ("time", "stretched"):
        white = get("whitened-ode", rtol=1e-7, atol=1e-7, clock=clock).log_prob(model, x).log_prob
        torch.testing.assert_close(white, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", [ExactSource(1 / 3), GaussianSource((2,), 1 / 3, EXACT_MOMENTS)])
def test_samples_start_from_the_source_and_know_their_density(own: Any) -> None:
    model = low_sigma(source=own)
    drawn = get("ode", rtol=1e-6, atol=1e-6).sample(model, 20, dtype=torch.float64)
    assert drawn.status == "ok"
    again = get("ode", rtol=1e-6, atol=1e-6).log_prob(model, drawn.x)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, again.log_prob, rtol=0, atol=1e-3)
    parts = get("ode", solver="rk4", steps=8).sample(model, 2, items=torch.tensor([3, 5]))
    whole = get("ode", solver="rk4", steps=8).sample(model, 6)
    torch.testing.assert_close(parts.x, whole.x[[3, 5]])


def test_eps_keeps_its_meaning_and_no_time_beyond_the_ends_is_asked() -> None:
    model = low_sigma(source=ExactSource(1 / 3))
    x = points(20)
    out = get("ode", rtol=1e-7, atol=1e-7, eps=0.1).log_prob(model, x)
    torch.testing.assert_close(out.log_prob, EXACT.log_prob(x, 0.9), rtol=0, atol=1e-4)
    refused = get("ode", eps=0.0).log_prob(model, x)
    assert refused.status == "refused"
    assert "leave eps out" in str(refused.reason)


class FromStandardNormal(Estimator):
    """A family that knows nothing of sources."""

    name = "unaware"

    def _log_prob(self, model: Any, x: Tensor, run: Any) -> Estimate:
        model.velocity(x, run.at(0.5))
        return Estimate(log_prob=run.zeros())


def test_a_family_that_reads_no_source_is_refused() -> None:
    unaware = FromStandardNormal()
    assert unaware.log_prob(EXACT, points(3)).status == "ok"
    out = unaware.log_prob(low_sigma(source=ExactSource(1 / 3)), points(3))
    assert (out.status, "run.source_log_prob" in str(out.reason)) == ("refused", True)


def test_a_straight_path_has_no_source_of_its_own() -> None:
    model = flowlik.wrap(EXACT.velocity, (2,))
    assert isinstance(model, HasSource)
    assert ends_of(model) is None
    x = points(20).float()
    for estimator in (RK4, get("ode")):
        assert torch.equal(estimator.log_prob(model, x).log_prob, estimator.log_prob(EXACT, x).log_prob)


def test_ends_that_are_half_said_are_an_error() -> None:
    half = nn.Module()
    half.event_shape, half.noisy_end = (2,), 0.1  # type: ignore[assignment]
    with pytest.raises(ValueError, match="missing: clean_end"):
        ends_of(half)


# --- conditions, guidance, foreign signatures ---


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor([0.0, 1.0, 3.0]))

    def forward(self, z: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return self.shift[y][:, None] - z


def test_guidance_combines_two_evaluations_and_both_are_counted() -> None:
    net = Labelled()
    model = flowlik.wrap(net, (2,), guidance=0.5, null=0)
    x, t, y = torch.randn(4, 2), torch.full((4,), 0.5), torch.tensor([1, 2, 1, 2])
    expected = 1.5 * net(x, t, y) - 0.5 * net(x, t, torch.zeros_like(y))
    torch.testing.assert_close(model.velocity(x, t, cond=y), expected)
    cost = get("ode", solver="rk4", steps=3).log_prob(model, x, cond=y).cost
    assert (cost.forwards, cost.vjps) == (24.0, 48.0)
    plain = get("ode", solver="rk4", steps=3).log_prob(flowlik.wrap(net, (2,)), x, cond=y).cost
    assert (plain.forwards, plain.vjps) == (12.0, 24.0)
    with pytest.raises(ValueError, match="needs cond"):
        model.velocity(x, t)


class Output:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


@pytest.mark.parametrize("form", [lambda v: v, lambda v: (v, None), Output, lambda v: {"sample": v}])
def test_outputs_of_any_form_are_understood_and_counted_once(form: Callable[[Tensor], Any]) -> None:
    model = flowlik.wrap(lambda z, u: form(EXACT.velocity(z, u)), (2,))
    out = get("ode", solver="euler", steps=2).log_prob(model, points(3).float())
    assert out.cost.forwards == 2.0
    torch.testing.assert_close(
        out.log_prob, get("ode", solver="euler", steps=2).log_prob(EXACT, points(3).float()).log_prob
    )


def test_call_takes_a_foreign_signature() -> None:
    model = flowlik.wrap(EXACT, (2,), call=lambda net, z, u, cond: net.velocity(x=z, t=u))
    x, t = points(3), torch.full((3,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(model.velocity(x, t), EXACT.velocity(x, t))
    assert get("ode", solver="euler", steps=2).log_prob(model, x).cost.forwards == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predicts": "nois", "path": "vp"}, "did you mean 'noise'"),
        ({"predicts": "noise", "path": "vpp"}, "did you mean 'vp'"),
        ({"path": "vp"}, "say what the network predicts"),
        ({"predicts": "velocity", "path": "ddpm"}, "no meaning on integer steps"),
        ({"event_shape": None}, "give event_shape"),
        ({"path": (torch.ones_like, lambda u: u, (0.1, 1.0)), "predicts": "noise"}, "noisiest end"),
        ({"path": 3}, "path must be one of"),
        ({"moments": torch.zeros(4, 3)}, "data of shape"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"net": 3}, "cannot be called"),
    ],
)
def test_what_does_not_fit_is_one_line(options: dict[str, Any], message: str) -> None:
    given = {"net": lambda z, u: z, "event_shape": (2,), **options}
    with pytest.raises(ValueError, match=message) as caught:
        flowlik.wrap(given.pop("net"), given.pop("event_shape"), **given)
    assert "\n" not in str(caught.value)


def test_an_output_of_another_shape_is_an_error_with_its_cure() -> None:
    model = flowlik.wrap(lambda z, u: torch.cat([z, z], 1), (2,))
    with pytest.raises(ValueError, match=r"if the rest are variances"):
        model.velocity(torch.zeros(3, 2), torch.zeros(3))


# --- schedulers ---


class DDPMScheduler:
    def __init__(self, prediction_type: str) -> None:
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
        self.config = type("Config", (), {"prediction_type": prediction_type})()


class FlowMatchEulerDiscreteScheduler:
    config = type("Config", (), {"num_train_timesteps": 1000})()


@pytest.mark.parametrize(
    ("said", "predicts"), [("epsilon", "noise"), ("sample", "data"), ("v_prediction", "v")]
)
def test_a_scheduler_says_the_path_and_the_prediction(said: str, predicts: str) -> None:
    net = exact_network(ddpm(), predicts)
    model = flowlik.wrap(net, (2,), path=DDPMScheduler(said))
    t = torch.full((5,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(model.velocity(points(5), t), EXACT.velocity(points(5), t), rtol=0, atol=1e-3)


def test_a_flow_matching_scheduler_asks_at_thousandths() -> None:
    model = flowlik.wrap(
        lambda z, u: -EXACT.velocity(z, 1 - u / 1000), (2,), path=FlowMatchEulerDiscreteScheduler()
    )
    x, t = points(5), torch.full((5,), 0.7, dtype=torch.float64)
    torch.testing.assert_close(model.velocity(x, t), EXACT.velocity(x, t))


def test_steps_without_signal_at_the_last_one_are_a_path() -> None:
    path = from_steps(torch.linspace(0.999, 0.0, 100))
    assert Clock(path).noisy_end < 1e-9
    assert Clock(path, 1e-3).noisy_end == 1e-3


def test_wrapping_imports_no_other_library() -> None:
    flowlik.wrap(lambda z, u: z, (2,))
    assert not {"diffusers", "azula", "flow_matching", "torchcfm"} & set(sys.modules)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64])
def test_an_output_that_holds_no_real_numbers_is_refused_and_not_cast(kind: torch.dtype) -> None:
    model = flowlik.wrap(lambda z, u: EXACT.velocity(z, u).to(kind), (2,))
    with pytest.raises(ValueError, match=r"output is of .*, expected real floating-point numbers"):
        get("ode", solver="euler", steps=1).log_prob(model, torch.zeros(2, 2))


@pytest.mark.parametrize("event_shape", [(2.7,), "2", ("2",)])
def test_an_event_shape_of_no_whole_numbers_is_refused_and_not_rounded(event_shape: Any) -> None:
    with pytest.raises(ValueError, match="event_shape must be a tuple"):
        flowlik.wrap(lambda z, u: z, event_shape)


def shifted(z: Tensor, u: Tensor, cond: Any = None) -> Tensor:
    """The exact field of N(m, I), m the condition."""
    mean = cond["m"] if isinstance(cond, dict) else cond
    mean, t = 0.0 if mean is None else mean[:, None], u[:, None]
    return mean + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (z - t * mean)


@pytest.mark.parametrize(
    ("null", "cond", "mean"),
    [
        (0.5, torch.ones(3), 1.5),
        ([0.5], torch.ones(3), 1.5),
        (0, torch.ones(3, dtype=torch.int64), 2.0),
        (None, {"m": torch.ones(3)}, 2.0),
        ({"m": 0.5}, {"m": torch.ones(3)}, 1.5),
    ],
)
def test_guidance_of_a_normal_is_the_normal_of_the_guided_mean(null: Any, cond: Any, mean: float) -> None:
    model = flowlik.wrap(shifted, (2,), guidance=1.0, null=null)
    x = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]])
    out = get("ode", solver="rk4", steps=16).log_prob(model, x, cond=cond)
    truth = -0.5 * (x.double() - mean).square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(out.log_prob, truth, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("null", "cond", "said"),
    [
        (0.5, torch.ones(3, dtype=torch.int64), "null=0.5: cond holds whole numbers"),
        (torch.tensor(0.5), torch.ones(3, dtype=torch.int64), "cond holds whole numbers"),
        (0, {"m": torch.ones(3)}, "null=0: cond is a dict"),
        ({"n": 0}, {"m": torch.ones(3)}, "cond is a dict, expected one of m"),
        ("a", torch.ones(3), "null='a': expected a number"),
        (torch.zeros(4), torch.ones(3), "fits one row of cond"),
    ],
)
def test_a_null_that_is_no_condition_is_named_and_not_rounded(null: Any, cond: Any, said: str) -> None:
    model = flowlik.wrap(shifted, (2,), guidance=1.0, null=null)
    with pytest.raises(ValueError, match=said):
        model.velocity(torch.zeros(3, 2), torch.zeros(3), cond=cond)
