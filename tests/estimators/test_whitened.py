"""The ODE in whitened coordinates: nothing to integrate for a Gaussian, the same density as `ode` for anything else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, points, spd, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_estimators.call import PROBE_STREAM
from flowlik_estimators.whitened import SolverTime
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.moments.moments import attach, estimate, from_covariance
from flowlik_models.numerics.random import draw_key, rademacher

FIXED = ("euler", "midpoint", "heun", "heun3", "rk4")
CLOCKS = ("time", "stretched")


def with_moments(model: Any, rank: int | None = None) -> Any:
    mean, cov = model.mean_and_covariance()
    return attach(model, from_covariance(mean, cov, "exact", rank))


def gaussian(d: int = 5) -> Any:
    return with_moments(Gaussian(points(d, seed=3), spd(d)))


def mixture(d: int = 4) -> Any:
    rotations = torch.stack([torch.linalg.qr(points(d, d, seed=k))[0] for k in (5, 6)])
    stds = torch.stack([torch.linspace(0.3, 1.2, d), torch.linspace(1.0, 0.4, d)])
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    return GaussianMixture(weights, 1.5 * points(2, d, seed=4), stds.double(), rotations)


class Image:
    """A closed form on vectors as a model of images."""

    def __init__(self, model: Any, *event: int) -> None:
        self.event_shape, self.model, self.moments = event, model, model.moments

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        v: Tensor = self.model.velocity(x.flatten(1), t)
        return v.view_as(x)


def data(model: Any, n: int = 20, dtype: torch.dtype = torch.float64) -> Tensor:
    x: Tensor = model.sample(n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x


@pytest.mark.parametrize("rank", [None, 2])
def test_moments_of_training_points_do_for_a_model_of_ones_own(rank: int | None) -> None:
    model = mixture()
    assert get("whitened-ode").log_prob(model, data(model)).status == "refused"
    attach(model, estimate(data(model, 400), "own", rank))
    out = get("whitened-ode", rtol=1e-7, atol=1e-7).log_prob(model, data(model))
    torch.testing.assert_close(out.log_prob, model.log_prob(data(model)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("trace", ["exact", "hutchinson", "closed"])
def test_one_step_of_any_solver_is_exact_for_a_gaussian(solver: str, clock: str, trace: str) -> None:
    model = gaussian()
    x = data(model)
    estimator = get("whitened-ode", solver=solver, steps=1, clock=clock, trace=trace)
    out = estimator.log_prob(model, x)
    torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-9)
    drawn = estimator.sample(model, 20, dtype=torch.float64)
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=1e-9)


def test_gaussian_with_a_low_rank_covariance_is_exact_too() -> None:
    vectors = torch.linalg.qr(points(6, 2, seed=2))[0]
    cov = (
        0.3 * torch.eye(6, dtype=torch.float64)
        + vectors @ torch.diag(vectors.new_tensor([4.0, 1.0])) @ vectors.T
    )
    model = with_moments(Gaussian(points(6, seed=3), cov), rank=2)
    assert model.moments.eigenvectors.shape == (6, 2)
    x = data(model)
    for trace in ("exact", "closed"):
        out = get("whitened-ode", solver="euler", steps=1, trace=trace).log_prob(model, x)
        torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("floor", [None, 0.5])
def test_any_moments_agree_with_the_exact_density_at_a_tight_tolerance(
    rank: int | None, clock: str, floor: float | None
) -> None:
    """Whitening is a change of variables, so moments decide the cost of a solve and not its answer."""
    model = with_moments(mixture(), rank)
    x = data(model)
    estimator = get("whitened-ode", rtol=1e-8, atol=1e-8, clock=clock, floor=floor, trace="closed")
    torch.testing.assert_close(estimator.log_prob(model, x).log_prob, model.log_prob(x), rtol=0, atol=2e-5)
    traced = get("whitened-ode", solver="rk4", steps=3, clock=clock, floor=floor)
    closed = get("whitened-ode", solver="rk4", steps=3, clock=clock, floor=floor, trace="closed")
    torch.testing.assert_close(
        traced.log_prob(model, x).log_prob, closed.log_prob(model, x).log_prob, rtol=0, atol=1e-9
    )


def test_stretched_clock_resolves_the_last_stretch_to_thin_data() -> None:
    """Two components along one axis whose widths across it, 0.02 and 0.06, no Gaussian can follow."""
    axes = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    stds = torch.tensor([[0.5, 0.02], [0.5, 0.06]], dtype=torch.float64)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    model = with_moments(GaussianMixture(torch.full((2,), 0.5, dtype=torch.float64), means, stds, axes))
    x = data(model, 200)
    errors = {}
    for clock in CLOCKS:
        out = get("whitened-ode", solver="rk4", steps=8, clock=clock, trace="closed").log_prob(model, x)
        errors[clock] = float((out.log_prob - model.log_prob(x)).abs().mean())
    assert errors["stretched"] < 0.3 * errors["time"]


@pytest.mark.parametrize(
    ("solver", "grid"),
    [
        *((solver, "uniform") for solver in FIXED),
        ("midpoint", "cosine"),
        ("rk4", "logsnr"),
        ("adams_pec", "ramped"),
    ],
)
@pytest.mark.parametrize("clock", CLOCKS)
def test_every_rule_converges_and_counts_the_networks_evaluations(solver: str, grid: str, clock: str) -> None:
    model = with_moments(mixture())
    x = data(model)
    out = get("whitened-ode", solver=solver, steps=32, grid=grid, clock=clock).log_prob(model, x)
    evaluations = {"euler": 32, "midpoint": 64, "heun": 64, "heun3": 96, "rk4": 128, "adams_pec": 33}[solver]
    assert (out.cost.forwards, out.cost.vjps, out.cost.accepted_steps) == (evaluations, 4 * evaluations, 32)
    assert float((out.log_prob - model.log_prob(x)).abs().mean()) < (0.5 if solver == "euler" else 0.1)


def test_density_found_while_sampling_is_found_again_while_inverting() -> None:
    model = with_moments(mixture())
    estimator = get("whitened-ode", rtol=1e-8, atol=1e-8, trace="closed", clock="stretched")
    drawn = estimator.sample(model, 30, dtype=torch.float64)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=2e-5)
    torch.testing.assert_close(drawn.log_prob, estimator.log_prob(model, drawn.x).log_prob, rtol=0, atol=2e-5)
    plain = get("ode", rtol=1e-8, atol=1e-8).sample(model, 30, dtype=torch.float64, log_prob=False)
    torch.testing.assert_close(drawn.x, plain.x, rtol=0, atol=1e-5)
    only = estimator.sample(model, 30, dtype=torch.float64, log_prob=False)
    assert only.log_prob is None
    torch.testing.assert_close(only.x, drawn.x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("clock", CLOCKS)
def test_eps_moves_the_end_where_the_density_is_taken(clock: str) -> None:
    model = with_moments(mixture())
    x = data(model)
    out = get("whitened-ode", rtol=1e-8, atol=1e-8, eps=0.2, clock=clock, trace="closed").log_prob(model, x)
    torch.testing.assert_close(out.log_prob, model.log_prob(x, t=0.8), rtol=0, atol=2e-5)


def test_images_and_float32_give_the_density_of_the_vectors() -> None:
    model = with_moments(mixture())
    x = data(model)
    vectors = get("whitened-ode", solver="rk4", steps=4).log_prob(model, x).log_prob
    image = Image(model, 1, 2, 2)
    for spec in parse_spec("whitened-ode[solver=rk4,steps=4]"):
        found = spec.log_prob(image, x.view(-1, 1, 2, 2))
        torch.testing.assert_close(found.log_prob, vectors, rtol=0, atol=1e-9)
        rounded = spec.log_prob(image, x.view(-1, 1, 2, 2).float())
        torch.testing.assert_close(rounded.log_prob, vectors, rtol=0, atol=1e-4)
        assert spec.sample(image, 3).x.shape == (3, 1, 2, 2)


@pytest.mark.parametrize("control", ["gaussian", "none"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_probes_see_the_jacobian_in_the_coordinates_of_the_data(control: str, clock: str) -> None:
    """One Euler step from t = 1 - eps: the only random part is e^T J e, J the model's minus what is controlled."""
    model, d, eps = with_moments(mixture()), 4, 0.25
    x = data(model)
    options: dict[str, Any] = {"solver": "euler", "steps": 1, "eps": eps, "clock": clock}
    estimator = get("whitened-ode", **options, trace="hutchinson", probes=3, control=control)
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(7))
    t = torch.full((1,), 1 - eps, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y: model.velocity(y[None], t)[0]))(x)
    if control == "gaussian":
        cov = model.mean_and_covariance()[1]
        identity = torch.eye(d, dtype=torch.float64)
        w = (1 - t) ** 2 * identity + t**2 * cov
        jacobian = jacobian - torch.linalg.solve(w, t * cov - (1 - t) * identity)
    key = draw_key(torch.Generator().manual_seed(7))
    probes = rademacher(key, torch.arange(len(x)), (3, d), stream=PROBE_STREAM, dtype=torch.float64)
    forms = torch.einsum("bki,bij,bkj->bk", probes, jacobian, probes)
    off = out.log_prob - get("whitened-ode", **options).log_prob(model, x).log_prob
    width = float(torch.linalg.eigvalsh(model.mean_and_covariance()[1])[0].sqrt())
    speed = float(SolverTime(width, 1 - eps)(t)[1]) if clock == "stretched" else 1.0
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    step = speed * (1 - eps)
    torch.testing.assert_close(off, step * (trace - forms.mean(1)), rtol=0, atol=1e-9)
    torch.testing.assert_close(out.stderr, step * forms.std(1) / math.sqrt(3), rtol=0, atol=1e-9)


@pytest.mark.parametrize("end", [1.0, 0.9])
def test_stretched_clock_keeps_its_ends_and_its_speed_is_its_derivative(end: float) -> None:
    clock = SolverTime(0.03, end)
    u = torch.linspace(0, end, 101, dtype=torch.float64)
    t, speed = clock(u)
    torch.testing.assert_close(t[[0, -1]], torch.tensor([0.0, end], dtype=torch.float64), rtol=0, atol=1e-12)
    assert bool((t.diff() > 0).all())
    inside, step = u[1:-1], 1e-6
    slope = (clock(inside + step)[0] - clock(inside - step)[0]) / (2 * step)
    torch.testing.assert_close(speed[1:-1], slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "quadrature"},
        {"divergence": "quadrature", "clock": "stretched", "trace": "hutchinson", "nodes": 33, "probes": 8},
        {"divergence": "quadrature", "trace": "hutchinson", "nodes": 33, "probes": 8, "control": "auto"},
        {"trace": "hutchinson", "noise": "orthogonal", "probes": 4, "rtol": 1e-6, "atol": 1e-6},
        {"trace": "hutchinson", "basis": "pca", "control": "auto", "probes": 16},
        {"solver": "rk4", "steps": 16, "richardson": True},
    ],
)
def test_options_of_the_ode_hold_here_too(options: dict[str, Any]) -> None:
    model = with_moments(mixture())
    x = data(model, 400)
    out = get("whitened-ode", **options).log_prob(model, x)
    error = out.log_prob - model.log_prob(x)
    if out.stderr is None or not bool((out.stderr > 0).any()):
        assert float(error.abs().mean()) < 2e-3
    else:
        assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(len(x))
        assert float(error.std()) == pytest.approx(float(out.stderr.square().mean().sqrt()), rel=0.3)


@pytest.mark.parametrize("clock", CLOCKS)
def test_likelihood_is_differentiable_in_points_and_parameters(clock: str) -> None:
    """The gradient is that of the value itself, for a graph that is kept is not the one a probe sees."""
    matrix = torch.nn.Parameter(stable_matrix(3))
    model = attach(
        Field(lambda x, t: x @ matrix.T + 0.1 * x.sin() * t[:, None], d=3),
        from_covariance(points(3, seed=3), spd(3), "abc"),
    )
    x = points(4, 3).requires_grad_()
    estimator = get("whitened-ode", solver="rk4", steps=2, clock=clock)

    def value() -> Tensor:
        total: Tensor = estimator.log_prob(model, x, differentiable=True).log_prob.sum()
        return total

    found = torch.autograd.grad(value(), [matrix, x])
    with torch.no_grad():
        for tensor, gradient in zip((matrix, x), found, strict=True):
            direction, step = points(*tensor.shape, seed=9), 1e-5
            ends = []
            for sign in (1, -1):
                tensor += sign * step * direction
                ends.append(float(estimator.log_prob(model, x.detach()).log_prob.sum()))
                tensor -= sign * step * direction
            assert float((gradient * direction).sum()) == pytest.approx(
                (ends[0] - ends[1]) / (2 * step), rel=1e-5
            )


def test_model_without_moments_or_with_those_of_another_shape_is_refused() -> None:
    bare = Field(lambda x, t: x)
    out = get("whitened-ode").log_prob(bare, points(3, 2))
    assert (out.status, out.reason) == (
        "refused",
        "needs the moments of its training data (a `moments` attribute)",
    )
    assert get("whitened-ode").sample(bare, 3).status == "refused"
    bare.__dict__["moments"] = from_covariance(torch.zeros(3), torch.eye(3), "abc")
    out = get("whitened-ode").log_prob(bare, points(3, 2))
    assert out.status == "refused"
    assert "moments of 3 dimensions, expected 2" in str(out.reason)
    out = get("whitened-ode", trace="closed").log_prob(
        attach(Field(lambda x, t: x, d=3), bare.moments), points(3, 3)
    )
    assert out.status == "refused"
    assert "closed-form divergence" in str(out.reason)


def test_velocity_of_another_shape_is_an_error_not_a_broadcast() -> None:
    model = attach(Field(lambda x, t: x[:, :1], d=2), from_covariance(torch.zeros(2), torch.eye(2), "abc"))
    with pytest.raises(ValueError, match=r"velocity has shape \(3, 1\), expected \(3, 2\)"):
        get("whitened-ode", solver="euler", steps=1).log_prob(model, points(3, 2))


def test_a_pilot_cannot_choose_the_control_on_another_clock() -> None:
    with pytest.raises(ValueError, match="whitened-ode: control=auto needs clock=time"):
        get("whitened-ode", trace="hutchinson", control="auto", clock="stretched")


@pytest.mark.parametrize("floor", [0.0, -1.0])
def test_floor_must_be_positive(floor: float) -> None:
    with pytest.raises(ValueError, match="whitened-ode: floor must be positive"):
        get("whitened-ode", floor=floor)
