"""The divergence by a nested quadrature: rules, their error estimate, allocation, and the estimator built on them."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, LinearWithDivergence, moments_of, points, spd, stable_matrix, with_moments

from flowlik_estimators import get, parse_spec
from flowlik_estimators.integration.clenshaw_curtis import (
    LEVELS,
    allocate,
    angle_rule,
    error_estimate,
    integral,
    stretched_rule,
)
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian


@pytest.mark.parametrize("end", [1.0, 0.999, 0.5])
@pytest.mark.parametrize("nodes", LEVELS)
def test_rule_is_nested_in_the_next_and_spans_the_time(nodes: int, end: float) -> None:
    times, weights = angle_rule(nodes, end)
    assert (float(times[0]), float(times[-1])) == (0.0, end)
    assert bool((times.diff() > 0).all())
    assert bool((weights > 0).all())
    if nodes > 3:
        torch.testing.assert_close(times[::2], angle_rule((nodes + 1) // 2, end)[0])
    if nodes >= 17:
        assert float(weights @ times.pow(3)) == pytest.approx(end**4 / 4, abs=1e-9)


@pytest.mark.parametrize("variance", [4.0, 0.04, 0.0025])
def test_error_estimate_of_a_gaussian_coordinate_follows_the_error_down(variance: float) -> None:
    """int_0^1 (t s - (1 - t))/w dt = log(s)/2."""
    for nodes in (17, 33, 65):
        t = angle_rule(nodes, 1.0)[0]
        values = ((t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance))[None]
        error = float((integral(values, 1.0) - math.log(variance) / 2).abs())
        estimate = float(error_estimate(values, 1.0))
        assert error <= 2 * estimate + 1e-12
        halved = float((integral(values, 1.0) - integral(values[:, ::2], 1.0)).abs())
        assert estimate <= halved + 1e-12


@pytest.mark.parametrize("thin", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 4.0])
def test_rule_for_stiff_fields_does_not_care_how_thin_the_data_are(thin: float) -> None:
    for end in (1.0, 0.999999):
        t, weights = stretched_rule(65, end)
        assert (float(t[0]), float(t[-1])) == (0.0, end)
        values = (t * thin**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * thin**2)
        truth = math.log((1 - end) ** 2 + end**2 * thin**2) / 2
        assert float(weights @ values) == pytest.approx(truth, abs=1e-8)
        coarse = stretched_rule(33, end)[1] @ values[::2]
        assert float((coarse - truth).abs()) < 1e-4
        estimate = float(error_estimate(values[None, ::2], end, stretched_rule))
        assert float((coarse - truth).abs()) <= estimate < 3e-3


@pytest.mark.parametrize("thin", [3e-3, 1e-3, 3e-4, 1e-4])
@pytest.mark.parametrize("trace", ["closed", "exact"])
def test_thin_axes_are_integrated_to_the_tolerance(thin: float, trace: str) -> None:
    """Eight of sixteen axes: the rule in the angle ends at 129 nodes, the one for stiff fields at 33 or 65."""
    variances = torch.ones(16, dtype=torch.float64)
    variances[:8] = thin**2
    model = Gaussian(torch.zeros(16, dtype=torch.float64), torch.diag(variances))
    x = model.sample(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimator = get("ode", trace=trace, divergence="quadrature", rtol=1e-8, atol=1e-8)
    out = estimator.log_prob(model, x)
    assert (out.status, out.reason) == ("ok", None)
    assert bool((out.extra["quadrature_error"] <= 3e-3).all())
    assert float((out.log_prob - model.log_prob(x)).abs().max()) < 3e-3


def test_thin_axes_at_the_default_tolerances() -> None:
    variances = torch.ones(16, dtype=torch.float64)
    variances[:8] = 1e-6
    model = Gaussian(torch.zeros(16, dtype=torch.float64), torch.diag(variances))
    x = model.sample(64, generator=torch.Generator().manual_seed(0))
    out = get("ode", trace="closed", divergence="quadrature").log_prob(model, x)
    assert out.reason is None
    assert float((out.log_prob - model.log_prob(x.double())).abs().max()) < 1e-3


def test_missed_tolerance_is_told_with_the_share_of_items_that_missed_it() -> None:
    """A divergence that no rule of 129 nodes resolves, in a quarter of the items."""

    def rough(x: Tensor, t: Tensor) -> Tensor:
        swing = 0.05 * torch.sin(700.0 * t) * (x[:, 0] > 0)
        return torch.stack([torch.zeros_like(swing), swing * x[:, 1]], 1)

    x = points(8, 2)
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    out = get("ode", divergence="quadrature", tol=1e-5).log_prob(Field(rough), x)
    assert out.status == "ok"
    assert out.reason == "tol = 1e-05 nats of the quadrature was missed by 25 % of the items"
    assert (out.extra["quadrature_error"] > 1e-5).tolist() == [True] * 2 + [False] * 6


def test_error_estimate_is_rarely_below_the_error_and_much_below_the_difference_of_two_rules() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(150, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    truth = model.log_prob(x)
    estimates = parse_spec("ode[rtol=1e-7,atol=1e-7,trace=closed,divergence=quadrature,nodes=17|33]")
    coarse, fine = (e.log_prob(model, x) for e in estimates)
    error, estimate = (fine.log_prob - truth).abs(), fine.extra["quadrature_error"]
    assert float((error > estimate + 1e-5).double().mean()) < 0.02
    assert float(estimate.mean()) < 15 * float(error.mean())
    assert float(estimate.mean()) < 0.5 * float((fine.log_prob - coarse.log_prob).abs().mean())


@pytest.mark.parametrize("dim", [2, 7])
def test_nodes_taken_together_are_counted_and_valued_as_one_by_one(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Field(lambda x, t: torch.sin(3 * x) * t[:, None], dim)
    estimator = get("ode", rtol=1e-8, atol=1e-8, divergence="quadrature", tol=1e-6)
    together = estimator.log_prob(model, points(6, dim))
    monkeypatch.setattr("flowlik_estimators.divergence.along_a_path.STACKED_NUMBERS", 1)
    apart = estimator.log_prob(model, points(6, dim))
    assert together.cost == apart.cost
    torch.testing.assert_close(together.log_prob, apart.log_prob, rtol=0, atol=1e-11)


def test_tolerance_is_met_item_by_item_with_the_nodes_each_item_needs() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(80, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    estimator = get("ode", rtol=1e-6, atol=1e-6, trace="closed", divergence="quadrature", tol=1e-3)
    out = estimator.log_prob(model, x)
    error = (out.log_prob - model.log_prob(x)).abs()
    nodes = out.extra["nodes"]
    assert set(nodes.tolist()) <= {17.0, 33.0, 65.0, 129.0}
    assert len(nodes.unique()) > 1
    assert bool((out.extra["quadrature_error"] <= 1e-3).all())
    assert float((error > 1e-3).double().mean()) <= 0.02
    solve = float(out.cost.forwards) - float(nodes.mean())
    assert solve == round(solve)  # the rest is the solve's, the same for every item
    exact = get("ode", rtol=1e-6, atol=1e-6, divergence="quadrature", tol=1e-3).log_prob(model, x[:4])
    torch.testing.assert_close(exact.log_prob, out.log_prob[:4], rtol=0, atol=2e-4)
    assert exact.cost.vjps == pytest.approx(64 * float(exact.extra["nodes"].mean()))


def test_exact_trace_takes_a_third_of_the_work_of_an_augmented_solve_that_errs_more() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(300, generator=torch.Generator().manual_seed(6))
    truth = model.log_prob(x.double())
    augmented = get("ode", rtol=1e-6, atol=1e-6, trace="closed").log_prob(model, x)
    apart = get("ode", rtol=3e-6, atol=3e-6, trace="closed", divergence="quadrature").log_prob(model, x)
    nodes = float(apart.extra["nodes"].mean())
    work = float(apart.cost.forwards) + 64 * nodes
    assert work <= 65 * float(augmented.cost.forwards) / 3
    errors = [float((out.log_prob - truth).abs().mean()) for out in (apart, augmented)]
    assert errors[0] <= errors[1]


def test_allocation_is_the_best_of_all() -> None:
    weights, budget = [5.0, 1.0, 0.2, 2.0], 9

    def variance(counts: Any) -> float:
        return sum(w * w / n for w, n in zip(weights, counts, strict=True))

    found = allocate(weights, budget)
    assert sum(found) == budget
    every = [c for c in product(range(1, budget), repeat=4) if sum(c) == budget]
    assert variance(found) == pytest.approx(min(map(variance, every)))
    assert allocate(weights, budget, most=3) == [3, 2, 1, 3]
    assert allocate([0.0, 0.0], 2) == [1, 1]


# --- the estimator ---


@pytest.mark.parametrize("event", [(3,), (1, 3), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_field_of_any_shape_and_dtype(event: tuple[int, ...], dtype: torch.dtype) -> None:
    model = LinearWithDivergence(stable_matrix(3), event)
    x = points(7, *event, dtype=dtype)
    for spec in ("ode[divergence=quadrature]", "ode[solver=rk4,steps=16,divergence=quadrature,nodes=9]"):
        out = parse_spec(spec)[0].log_prob(model, x)
        torch.testing.assert_close(out.log_prob, model.log_prob(x.double()).detach(), rtol=0, atol=1e-3)
        assert out.log_prob.dtype == torch.float64


def test_fixed_step_solve_passes_through_its_nodes_and_is_billed_for_them() -> None:
    model = Gaussian(points(3, seed=3), spd(3))
    out = get("ode", solver="midpoint", steps=8, divergence="quadrature", nodes=9).log_prob(
        model, points(4, 3)
    )
    # uniform times 1/8 ... 7/8 and nine nodes share 0, 1/2 and 1
    assert out.cost.accepted_steps == 8 + 9 - 3
    assert out.cost.forwards == 2 * 14 + 9
    assert out.cost.vjps == 3 * 9


def test_density_found_while_sampling_is_found_again_while_inverting() -> None:
    model = closed_form("gmm-2d")
    estimator = get("ode", rtol=1e-8, atol=1e-8, trace="closed", divergence="quadrature", tol=1e-4)
    drawn = estimator.sample(model, 50, dtype=torch.float64)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=3e-4)
    torch.testing.assert_close(estimator.log_prob(model, drawn.x).log_prob, drawn.log_prob, rtol=0, atol=6e-4)


def test_model_is_asked_between_noise_and_its_own_data_end() -> None:
    field = Field(lambda x, t: 0.1 * x, eps=0.125)
    out = get("ode", rtol=1e-8, atol=1e-8, divergence="quadrature", nodes=17).log_prob(field, points(4, 2))
    assert bool(out.valid.all())
    seen = torch.cat([t for _, t in field.seen])
    assert (float(seen.min()), float(seen.max())) == (0.0, 0.875)
    torch.testing.assert_close(
        out.log_prob,
        get("ode", rtol=1e-8, atol=1e-8).log_prob(field, points(4, 2)).log_prob,
        rtol=0,
        atol=1e-4,
    )


QUIET = ["pixel", "pca", "auto"]


@pytest.mark.parametrize("basis", QUIET)
@pytest.mark.parametrize("control", ["none", "auto"])
def test_batching_moves_no_item_of_a_fixed_step_solve(basis: str, control: str) -> None:
    model = with_moments(Gaussian(points(4, seed=3), spd(4)), moments_of(spd(4)))
    x, items = points(7, 4), torch.arange(100, 107)
    (estimator,) = parse_spec(
        f"ode[solver=rk4,steps=6,trace=hutchinson,divergence=quadrature,nodes=9,probes=3,basis={basis},control={control}]"
    )

    def run(rows: Tensor) -> Any:
        generator = torch.Generator().manual_seed(5)
        return estimator.log_prob(model, x[rows], items=items[rows], generator=generator)

    rows = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    whole, pieces = run(torch.arange(7)), [run(rows[:2]), run(rows[2:])]
    torch.testing.assert_close(
        torch.cat([p.log_prob for p in pieces]), whole.log_prob[rows], rtol=0, atol=1e-11
    )
    torch.testing.assert_close(torch.cat([p.stderr for p in pieces]), whole.stderr[rows], rtol=0, atol=1e-9)
    assert torch.equal(run(rows).log_prob, run(rows).log_prob)


def test_nodes_of_a_noisy_trace_are_chosen_by_the_smooth_part_not_by_the_noise() -> None:
    """The rule's error on a mixture is far below the noise, and the estimate must say so."""
    model = closed_form("gmm-64d")
    x = model.sample(20, generator=torch.Generator().manual_seed(0))
    out = get("ode", trace="hutchinson", divergence="quadrature").log_prob(model, x)
    assert out.stderr is not None
    assert bool((out.extra["nodes"] == 33).all())
    assert float(out.extra["quadrature_error"].max()) < 0.05 < float(out.stderr.min())


def test_allocation_lowers_the_variance_at_equal_products() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(250, generator=torch.Generator().manual_seed(1))
    spec = "ode[trace=hutchinson,divergence=quadrature,nodes=33,probes=3,allocation={}]"
    squares = []
    for allocation in ("uniform", "neyman"):
        out = parse_spec(spec.format(allocation))[0].log_prob(model, x)
        squares.append(float((out.log_prob - model.log_prob(x.double())).square().mean()))
    assert squares[1] < 0.85 * squares[0]


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_richardson_gains_an_order_for_three_times_the_cost(solver: str, grid: str) -> None:
    model = Gaussian(points(3, seed=3), spd(3))
    x = model.sample(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = []
    for steps in (24, 48):
        plain = get("ode", solver=solver, steps=steps, grid=grid, trace="closed").log_prob(model, x)
        out = get("ode", solver=solver, steps=steps, grid=grid, trace="closed", richardson=True).log_prob(
            model, x
        )
        assert out.cost.forwards == 3 * plain.cost.forwards
        errors.append(float((out.log_prob - model.log_prob(x)).abs().mean()))
    order = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}[solver]
    assert math.log2(errors[0] / errors[1]) > order + 0.6


def test_estimate_by_quadrature_is_differentiable() -> None:
    model = LinearWithDivergence(stable_matrix(3))
    x = points(4, 3).requires_grad_()
    for options in ({"nodes": 17}, {"tol": 1e-4}):
        out = get("ode", rtol=1e-7, atol=1e-7, divergence="quadrature", **options).log_prob(
            model, x, differentiable=True
        )
        found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
        expected = torch.autograd.grad(model.log_prob(x).sum(), [model.matrix, x])
        for gradient, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 17}, "nodes has no effect with divergence=augmented"),
        ({"tol": 1e-3}, "tol has no effect with divergence=augmented"),
        ({"divergence": "quadrature", "nodes": 1}, "nodes must be one of 3, 5, 9"),
        ({"divergence": "quadrature", "nodes": 20}, "nodes must be one of 3, 5, 9"),
        ({"divergence": "quadrature", "nodes": 17, "tol": 1e-3}, "tol has no effect"),
        ({"divergence": "quadrature", "tol": 0.0}, "tol must be positive"),
        ({"divergence": "quadrature", "allocation": "neyman"}, "allocation has no effect with trace=exact"),
        ({"divergence": "quadrature", "solver": "rk4", "steps": 4}, "needs nodes"),
        ({"divergence": "quadrature", "solver": "explicit_adams", "steps": 4, "nodes": 9}, "multistep"),
        ({"richardson": True}, "richardson needs"),
        ({"richardson": True, "solver": "explicit_adams", "steps": 4}, "richardson needs"),
        (
            {"richardson": True, "solver": "rk4", "steps": 4, "divergence": "quadrature", "nodes": 9},
            "richardson",
        ),
    ],
)
def test_options_that_do_not_go_together_are_an_error(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get("ode", **options)


def test_label_reads_back() -> None:
    for spec in (
        "ode[divergence=quadrature]",
        "ode[steps=4,solver=rk4,richardson=true]",
        "ode[trace=hutchinson,noise=orthogonal,basis=auto,control=auto,divergence=quadrature,nodes=17]",
    ):
        (estimator,) = parse_spec(spec)
        assert parse_spec(estimator.label) == [estimator]


def test_pilot_of_a_conditional_model_is_a_clear_error_and_named_options_work() -> None:
    field = Field(lambda x, t, cond: cond[:, None] * x)
    x, cond = points(3, 2), torch.tensor([-0.5, 0.1, 0.4]).double()
    with pytest.raises(ValueError, match="the pilot draws from the model"):
        get("ode", trace="hutchinson", divergence="quadrature").log_prob(field, x, cond=cond)
    named = {"divergence": "quadrature", "nodes": 17, "allocation": "uniform", "probes": 2}
    out = get("ode", trace="hutchinson", **named).log_prob(field, x, cond=cond)
    exactly = get("ode", divergence="quadrature").log_prob(field, x, cond=cond)
    torch.testing.assert_close(out.log_prob, exactly.log_prob, rtol=0, atol=1e-4)


def test_field_that_breaks_is_a_status_and_one_bad_item_is_invalid_alone() -> None:
    for trace in ("exact", "hutchinson"):
        broken = Field(lambda x, t: torch.full_like(x, math.nan))
        out = get("ode", trace=trace, divergence="quadrature").log_prob(broken, points(3, 2))
        assert (out.status, bool(out.valid.any())) == ("diverged", False)
    field = Field(lambda x, t: torch.where(x > 10, torch.nan, 0.5 * x))
    x = torch.tensor([[0.0, 1.0], [20.0, 0.0]], dtype=torch.float64)
    out = get("ode", solver="rk4", steps=4, divergence="quadrature", nodes=9).log_prob(field, x)
    assert (out.status, out.valid.tolist()) == ("ok", [True, False])


def test_evaluation_limit_holds_for_the_solve_of_x() -> None:
    field = Field(lambda x, t: torch.sin(1e9 * (x + t[:, None])) * 1e3)
    out = get("ode", divergence="quadrature", max_nfe=150).log_prob(field, points(3, 2))
    assert out.status == "diverged"
    assert out.reason is not None
    assert "max_nfe = 150" in out.reason
