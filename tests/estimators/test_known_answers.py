"""Estimators against answers that are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toy_flows import Linear

from flowlik_estimators import Estimator, get
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.numerics import random


def points(task: str, n: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Fresh points and their exact log-densities."""
    model = closed_form(task)
    x = model.sample(n, generator=torch.Generator().manual_seed(seed), t=1 - model.eps, dtype=torch.float64)
    return x.to(dtype), model.log_prob(x, 1 - model.eps)


def gaussian(d: int = 6) -> Gaussian:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return Gaussian(torch.randn(d, generator=generator), root @ root.T / d + 0.1 * torch.eye(d))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 128])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_few_step_likelihood_of_the_exact_joint_map_is_exact(
    steps: int, dtype: torch.dtype, limit: float
) -> None:
    x, truth = points("gaussian-2d", 500, dtype)
    out = get("f2d2", steps=steps).log_prob(closed_form("gaussian-2d"), x)
    assert out.log_prob.dtype == torch.float64
    assert float((out.log_prob - truth).abs().max()) < limit
    assert out.cost.forwards == steps
    assert out.cost.vjps == out.cost.jvps == 0


def test_one_fixed_probe_on_gaussian_data_errs_by_its_quadratic_form() -> None:
    model, n = gaussian(), 64
    d = model.event_shape[0]
    generator = torch.Generator().manual_seed(5)
    x = model.sample(n, generator=generator, dtype=torch.float64)
    estimator = get("ode", rtol=1e-9, atol=1e-9, trace="hutchinson", noise="gaussian")
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(3))
    exact = get("ode", rtol=1e-9, atol=1e-9, trace="exact").log_prob(model, x)
    # recover the probe through the public keyed law: the error is tr L - z^T L z for z the item's probe
    half_log = model.eigenvectors @ torch.diag(0.5 * model.eigenvalues.log()) @ model.eigenvectors.T
    key = random.draw_key(torch.Generator().manual_seed(3))
    errors = (out.log_prob - exact.log_prob)[:, None]
    candidates = torch.stack(
        [
            half_log.trace() - torch.einsum("nd,de,ne->n", z, half_log, z)
            for stream in range(4)
            for z in [random.gaussian(key, torch.arange(n), (d,), stream=stream, dtype=torch.float64)]
        ],
        dim=1,
    )
    assert float((errors - candidates).abs().amax(0).min()) < 1e-6


@pytest.mark.parametrize("name", ["dopri5", "rk4"])
def test_density_found_while_sampling_is_that_of_inverting(name: str) -> None:
    options = {"rtol": 1e-8, "atol": 1e-8} if name == "dopri5" else {"steps": 100}
    model = closed_form("gmm-2d")
    estimator = get("ode", solver=name, trace="closed", **options)
    drawn = estimator.sample(model, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    back = estimator.log_prob(model, drawn.x)
    assert drawn.log_prob is not None
    limit = 1e-6 if name == "dopri5" else 1e-2
    assert float((drawn.log_prob - back.log_prob).abs().max()) < limit
    assert float((back.log_prob - model.log_prob(drawn.x)).abs().max()) < limit


def test_joint_map_samples_with_the_density_it_inverts() -> None:
    model, estimator = closed_form("gaussian-2d"), get("f2d2", steps=3)
    drawn = estimator.sample(model, 200, dtype=torch.float64)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x))
    torch.testing.assert_close(drawn.log_prob, estimator.log_prob(model, drawn.x).log_prob)


def test_linear_field_has_the_divergence_of_its_trace() -> None:
    matrix = torch.tensor([[0.3, 0.5, 0.0], [-0.2, -0.4, 0.1], [0.0, 0.0, 0.8]], dtype=torch.float64)
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = get("ode", rtol=1e-10, atol=1e-10).log_prob(Linear(matrix), x)
    torch.testing.assert_close(out.log_prob, Linear(matrix).log_prob(x).detach(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("task", ["gmm-2d", "thin-2d"])
def test_double_precision_solve_reaches_the_truth(task: str) -> None:
    x, truth = points(task, 300, torch.float64)
    out = get("ode", rtol=1e-9, atol=1e-9, trace="exact").log_prob(closed_form(task), x)
    assert float((out.log_prob - truth).abs().mean()) < 1e-7


def test_error_of_a_fixed_step_rule_falls_with_its_order() -> None:
    x, truth = points("gmm-2d", 200, torch.float64)

    def error(solver: str, steps: int) -> float:
        out = get("ode", solver=solver, steps=steps, trace="closed").log_prob(closed_form("gmm-2d"), x)
        return float((out.log_prob - truth).abs().mean())

    assert error("euler", 128) / error("euler", 256) == pytest.approx(2, rel=0.3)
    assert error("midpoint", 128) / error("midpoint", 256) == pytest.approx(4, rel=0.4)
    assert error("rk4", 128) < 1e-3 * error("euler", 128)


ESTIMATORS = (
    get("ode", trace="hutchinson", probes=3, solver="rk4", steps=6),
    get("ode", trace="exact", solver="heun", steps=4),
    get("f2d2", steps=2),
    get("meanflow", steps=2),
)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.label)
def test_chunks_give_what_the_whole_batch_gives(estimator: Estimator) -> None:
    model = gaussian()
    x = model.sample(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids = torch.arange(24)

    def run(rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        return estimator.log_prob(model, x[rows], generator=generator, items=ids[rows]).log_prob

    whole = run(slice(None))
    parts = torch.cat([run(slice(0, 5)), run(slice(5, 24))])
    torch.testing.assert_close(whole, parts, atol=1e-9, rtol=1e-12)
    assert torch.equal(whole, run(slice(None)))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e.label)
def test_a_likelihood_can_be_a_loss(estimator: Estimator) -> None:
    model = gaussian()
    x = model.sample(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    out = estimator.log_prob(model, x, differentiable=True).log_prob
    (gradient,) = torch.autograd.grad(out.sum(), x)
    step = 1e-5 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    ahead, behind = (estimator.log_prob(model, (x + sign * step).detach()).log_prob.sum() for sign in (1, -1))
    assert float((gradient * step).sum()) == pytest.approx(float(ahead - behind) / 2, rel=1e-4)


def test_too_few_evaluations_are_a_status_not_a_hang() -> None:
    x, _ = points("gmm-2d", 16)
    out = get("ode", max_nfe=20).log_prob(closed_form("gmm-2d"), x)
    assert out.status == "diverged"
    assert out.reason is not None
    assert "max_nfe" in out.reason
    assert not bool(out.valid.any())


class Broken(Linear):
    """Not finite anywhere."""

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return x * math.nan


@pytest.mark.parametrize("options", [{}, {"solver": "rk4", "steps": 4}], ids=["adaptive", "fixed"])
def test_a_field_that_is_not_finite_is_a_status(options: dict[str, object]) -> None:
    out = get("ode", **options).log_prob(Broken(torch.eye(2)), torch.zeros(3, 2))
    assert out.status == "diverged"
    assert not bool(out.valid.any())


def test_a_model_that_does_not_fit_is_refused_with_the_reason() -> None:
    x, _ = points("gmm-2d", 3)
    out = get("f2d2").log_prob(closed_form("gmm-2d"), x)
    assert out.status == "refused"
    assert out.reason is not None
    assert "joint" in out.reason


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 2), "empty batch"),
        (torch.zeros(4, 3), r"shape \(batch, 2\)"),
        (torch.tensor([[0.0, math.nan]]), "NaN or infinity in 1 of 1 rows"),
        (torch.zeros(4, 2, dtype=torch.long), "float32 or float64"),
    ],
)
def test_bad_points_are_one_clear_line(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get("ode").log_prob(closed_form("gmm-2d"), x)
