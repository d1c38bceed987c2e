"""The ODE estimator against densities that are known, and its ways of giving up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, Linear, LinearWithDivergence, points, spd, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_estimators.call import Estimate
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}
ORDER = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


def gaussian(d: int = 3) -> Gaussian:
    return Gaussian(points(d, seed=3), spd(d))


def data(model: Any, n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x: Tensor = model.sample(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"])
def test_adaptive_solver_reaches_the_exact_density(solver: str) -> None:
    model = gaussian()
    x = data(model)
    tolerance = {"fehlberg2": 1e-5, "adaptive_heun": 1e-4, "bosh3": 1e-6}.get(solver, 1e-8)
    out = get("ode", solver=solver, rtol=tolerance, atol=tolerance, trace="closed").log_prob(model, x)
    assert out.status == "ok"
    assert out.log_prob.dtype == torch.float64
    assert float((out.log_prob - model.log_prob(x)).abs().mean()) < 300 * tolerance
    assert out.cost.accepted_steps > 0


@pytest.mark.parametrize("solver", list(EVALUATIONS))
def test_fixed_step_solver_spends_exactly_its_stages_and_converges_with_its_order(solver: str) -> None:
    model = gaussian()
    x = data(model)
    errors = []
    for steps in (32, 64):
        out = get("ode", solver=solver, steps=steps, trace="closed").log_prob(model, x)
        assert out.cost.forwards == EVALUATIONS[solver] * steps
        assert (out.cost.accepted_steps, out.cost.rejected_steps) == (steps, 0)
        errors.append(float((out.log_prob - model.log_prob(x)).abs().mean()))
    # asymptotic: this close to it, the observed order lies within a third of the true one
    assert torch.tensor(errors[0] / errors[1]).log2() == pytest.approx(ORDER[solver], abs=0.6)


@pytest.mark.parametrize("grid", ["uniform", "cosine", "logsnr", "ramped"])
@pytest.mark.parametrize("solver", ["midpoint", "rk4"])
def test_every_grid_converges_and_costs_the_same(solver: str, grid: str) -> None:
    model = gaussian()
    x = data(model)
    out = get("ode", solver=solver, steps=96, grid=grid, trace="closed").log_prob(model, x)
    assert out.cost.forwards == EVALUATIONS[solver] * 96
    assert float((out.log_prob - model.log_prob(x)).abs().mean()) < 5e-3


@pytest.mark.parametrize("solver", ["explicit_adams", "implicit_adams"])
@pytest.mark.filterwarnings("ignore:Functional iteration")
def test_multistep_solvers_work_on_a_uniform_grid(solver: str) -> None:
    model = gaussian()
    x = data(model)
    out = get("ode", solver=solver, steps=64, trace="closed").log_prob(model, x)
    assert float((out.log_prob - model.log_prob(x)).abs().mean()) < 1e-2


def test_heun_is_the_trapezoidal_rule() -> None:
    """One step of Heun for dx/dt = x: x_0 = x (1 - 1 + 1/2), log-determinant 2 exactly."""
    model = Linear(torch.eye(2, dtype=torch.float64))
    x = points(5, 2)
    out = get("ode", solver="heun", steps=1).log_prob(model, x)
    z = x * 0.5
    expected = -0.5 * z.square().sum(1) - torch.log(torch.tensor(2 * torch.pi)) - 2.0
    torch.testing.assert_close(out.log_prob, expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("trace", ["exact", "closed"])
def test_linear_field_has_its_matrix_exponential_density(trace: str) -> None:
    model = LinearWithDivergence(stable_matrix(3))
    x = points(7, 3)
    for event in ((3,), (1, 3), (3, 1, 1)):
        model.event_shape = event
        out = get("ode", rtol=1e-9, atol=1e-9, trace=trace).log_prob(model, x.view(7, *event))
        torch.testing.assert_close(out.log_prob, model.log_prob(x).detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("task", "median", "mean"),
    [("gmm-2d", 2e-5, 2e-4), ("thin-2d", 2e-5, 1e-3), ("checkerboard-2d", 2e-5, 1e-3)],
)
def test_default_tolerance_on_the_exact_fields(task: str, median: float, mean: float) -> None:
    model = closed_form(task)
    x = data(model, 500, seed=7, dtype=torch.float32)
    out = get("ode", trace="closed").log_prob(model, x)
    error = (out.log_prob - model.log_prob(x.double(), t=1.0 - model.eps)).abs()
    assert bool(out.valid.all())
    assert float(error.median()) < median
    assert float(error.mean()) < mean


def test_exact_trace_equals_the_closed_form_to_the_tolerance() -> None:
    model = closed_form("gmm-2d")
    x = data(model, 100, seed=7)
    estimates = parse_spec("ode[solver=dopri8,rtol=1e-9,atol=1e-9,trace=exact|closed]")
    exact, closed = (e.log_prob(model, x).log_prob for e in estimates)
    reference = model.log_prob(x)
    assert float((exact - reference).abs().mean()) < 1e-7
    assert float((closed - reference).abs().mean()) < 1e-7


@pytest.mark.parametrize(
    "spec", ["ode[rtol=1e-8,atol=1e-8,trace=closed]", "ode[solver=rk4,steps=64,grid=cosine,trace=closed]"]
)
def test_density_found_while_sampling_is_found_again_while_inverting(spec: str) -> None:
    model = closed_form("gmm-2d")
    (estimator,) = parse_spec(spec)
    drawn = estimator.sample(model, 50, dtype=torch.float64)
    assert drawn.log_prob is not None
    back = estimator.log_prob(model, drawn.x)
    tolerance = 1e-5 if "rtol" in spec else 2e-2
    torch.testing.assert_close(drawn.log_prob, back.log_prob, rtol=0, atol=tolerance)
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=tolerance)
    assert bool(drawn.valid.all())
    assert drawn.cost.forwards > 0


def test_samples_without_density_take_no_products() -> None:
    model = gaussian()
    drawn = get("ode").sample(model, 30, log_prob=False)
    with_density = get("ode").sample(model, 30)
    assert drawn.log_prob is None
    assert drawn.cost.vjps == 0
    torch.testing.assert_close(drawn.x, with_density.x, rtol=0, atol=1e-3)


def test_samples_have_the_moments_of_the_data() -> None:
    model = gaussian()
    x = get("ode", solver="rk4", steps=16).sample(model, 20_000, dtype=torch.float64, log_prob=False).x
    torch.testing.assert_close(x.mean(0), model.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(torch.cov(x.T), spd(3), rtol=0, atol=0.05)


def test_data_end_is_the_models_eps_unless_given() -> None:
    field = Field(lambda x, t: 0.0 * x, eps=0.25)
    get("ode", solver="euler", steps=2).log_prob(field, points(3, 2))
    assert float(field.seen[0][1].max()) == 0.75
    field.seen.clear()
    get("ode", solver="euler", steps=2, eps=0.1).log_prob(field, points(3, 2))
    assert float(field.seen[0][1].max()) == 0.9
    assert get("ode").data_end(field) == 0.75
    assert get("ode").data_end(object()) == 1.0


@pytest.mark.parametrize("spec", ["ode", "ode[solver=bosh3,rtol=0.5,atol=0.5]", "ode[solver=rk4,steps=3]"])
def test_field_is_never_asked_outside_its_times_nor_in_another_form(spec: str) -> None:
    (estimator,) = parse_spec(spec)
    for dtype in (torch.float32, torch.float64):
        field = Field(lambda x, t: 0.01 * x, eps=0.125)
        estimator.log_prob(field, points(4, 2, dtype=dtype))
        estimator.sample(field, 4, dtype=dtype)
        for x, t in field.seen:
            assert t.shape == (4,)
            assert x.shape == (4, 2)
            assert t.dtype == x.dtype == dtype
            assert 0.0 <= float(t.min()) <= float(t.max()) <= 0.875


def test_first_step_starts_at_the_data_where_the_field_is_finite() -> None:
    field = Field(lambda x, t: x)
    get("ode", solver="euler", steps=4).log_prob(field, points(3, 2))
    assert [float(t[0]) for _, t in field.seen] == [1.0, 0.75, 0.5, 0.25]


def test_cond_travels_with_the_batch() -> None:
    field = Field(lambda x, t, cond: cond[:, None] * x)
    cond = torch.tensor([-0.5, 0.0, 1.0], dtype=torch.float64)
    x = points(3, 2)
    out = get("ode", rtol=1e-9, atol=1e-9).log_prob(field, x, cond=cond)
    alone = [
        get("ode", rtol=1e-9, atol=1e-9).log_prob(field, x[i : i + 1], cond=cond[i : i + 1]).log_prob[0]
        for i in range(3)
    ]
    torch.testing.assert_close(out.log_prob, torch.stack(alone), rtol=0, atol=1e-7)


# --- giving up: a status, never an exception or a hang ---


def noise_field(x: Tensor, t: Tensor) -> Tensor:
    """Discontinuous everywhere: no controller can follow it."""
    return torch.sin(1e9 * (x + t[:, None])) * 1e3


@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "bosh3"])
def test_evaluation_limit_is_a_status_and_a_bill(solver: str) -> None:
    field = Field(noise_field)
    out = get("ode", solver=solver, max_nfe=200).log_prob(field, points(3, 2))
    assert out.status == "diverged"
    assert out.reason is not None
    assert "max_nfe = 200" in out.reason
    assert bool((torch.as_tensor(out.cost.forwards) <= 3 * 200).all())  # of all three rows, of two, of one
    assert not out.valid.any()
    assert bool(out.log_prob.isnan().all())
    drawn = get("ode", solver=solver, max_nfe=200).sample(field, 3)
    assert drawn.status == "diverged"
    assert bool((torch.as_tensor(drawn.cost.forwards) <= 3 * 200).all())
    assert bool(drawn.x.isnan().all())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, t: torch.where(t[:, None] < 0.5, torch.nan, 1.0) * x,
        lambda x, t: torch.full_like(x, torch.inf),
        lambda x, t: torch.full_like(x, torch.nan),
        lambda x, t: -1e4 * x**3,
        lambda x, t: -x / (t[:, None] - 0.4) ** 2,
    ],
    ids=["nan-half-way", "inf", "nan", "blow-up", "pole"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_field_that_breaks_is_a_status_with_a_reason(function: Any, dtype: torch.dtype) -> None:
    field = Field(function)
    for spec in ("ode[max_nfe=400]", "ode[solver=dopri8,max_nfe=400]"):
        (estimator,) = parse_spec(spec)
        out = estimator.log_prob(field, points(3, 2, dtype=dtype))
        assert out.status == "diverged", out.log_prob
        assert out.reason
        assert "\n" not in out.reason
        assert not out.valid.any()


def test_one_bad_item_of_a_fixed_step_solve_is_invalid_alone() -> None:
    field = Field(lambda x, t: torch.where(x > 10, torch.nan, x))
    x = torch.tensor([[0.0, 1.0], [20.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    out = get("ode", solver="midpoint", steps=4).log_prob(field, x)
    assert (out.status, out.valid.tolist()) == ("ok", [True, False, True])
    out = get("ode", solver="midpoint", steps=4).log_prob(field, x[1:2])
    assert out.status == "diverged"
    assert out.reason == "1 of 1 rows have no value: the model's velocity is NaN at t = 1 for finite x"


def test_errors_of_the_model_itself_are_not_swallowed() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("a bug of the model")

    with pytest.raises(AssertionError, match="a bug of the model"):
        get("ode").log_prob(Field(broken), points(3, 2))


def test_closed_trace_of_a_model_without_divergence_is_refused() -> None:
    out = get("ode", trace="closed").log_prob(Field(lambda x, t: x), points(3, 2))
    assert out.status == "refused"
    assert out.reason is not None
    assert "closed-form divergence" in out.reason
    assert out.cost.work == 0


# --- as a loss ---


@pytest.mark.parametrize(
    "spec",
    [
        "ode[solver=rk4,steps=12]",
        "ode[solver=heun,steps=64,grid=cosine]",
        "ode[solver=dopri5,rtol=1e-7,atol=1e-7]",
        "ode[solver=rk4,steps=12,trace=closed]",
    ],
)
def test_likelihood_is_differentiable_in_parameters_and_points(spec: str) -> None:
    (estimator,) = parse_spec(spec)
    model = LinearWithDivergence(stable_matrix(3))
    x = points(4, 3).requires_grad_()
    out = estimator.log_prob(model, x, differentiable=True)
    found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
    expected = torch.autograd.grad(model.log_prob(x).sum(), [model.matrix, x])
    tolerance = 2e-3 if "heun" in spec else 1e-5
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=tolerance, atol=tolerance)


def test_gradient_through_hutchinson_is_that_of_the_estimate() -> None:
    weight = (0.3 * points(3, 3, seed=9)).requires_grad_()
    field = Field(lambda x, t: torch.tanh(x @ weight.T) * (1 + t[:, None]), 3)
    x = points(4, 3)
    estimator = get("ode", solver="midpoint", steps=3, trace="hutchinson", probes=2)
    (gradient,) = torch.autograd.grad(
        estimator.log_prob(field, x, differentiable=True).log_prob.sum(), weight
    )
    step = 1e-6
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[0, 1] += sign * step
            values.append(float(estimator.log_prob(field, x).log_prob.sum()))
            weight[0, 1] -= sign * step
    assert float(gradient[0, 1]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_next_to_the_noise_of_probes_a_solve_takes_fewer_steps_and_leaves_nothing_that_counts() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)

    def solved(**options: Any) -> Estimate:
        estimator = get("ode", **{"rtol": 1e-5, "atol": 1e-5} | options)
        return estimator.log_prob(
            model, x, generator=torch.Generator().manual_seed(1), items=torch.arange(64)
        )

    probed, closed = solved(trace="hutchinson"), solved(trace="closed")
    assert probed.cost.nfe < closed.cost.nfe
    fine = solved(trace="hutchinson", rtol=1e-7, atol=1e-7)
    noise = (fine.log_prob - closed.log_prob).square().mean().sqrt()
    assert (probed.log_prob - fine.log_prob).square().mean().sqrt() < 0.02 * noise
