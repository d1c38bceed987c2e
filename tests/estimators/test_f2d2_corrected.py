"""The corrected divergence head: unbiased along the learned path whatever the head says, with bars that cover."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from scipy.stats import t as student
from torch import Tensor
from toy_flows import Field, LinearMap, points, spd, stable_matrix

from flowlik.tasks import get_task
from flowlik_estimators import get, standard_normal_log_prob
from flowlik_estimators.call import Estimate
from flowlik_estimators.counting import Cost
from flowlik_estimators.divergence.products import exact
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.zoo import load_model


class WrongHead:
    """The exact map of a Gaussian whose average divergence is off by a smooth function of x, t and s."""

    def __init__(self, d: int = 4, size: float = 2.0, event_shape: tuple[int, ...] | None = None) -> None:
        self.exact = Gaussian(points(d, seed=3), spd(d))
        self.event_shape = event_shape or (d,)
        self.size = size
        self.teacher = Field(lambda x, t: self.exact.velocity(x, t), d=d)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        u, div = self.exact.joint(flat, t, s)
        return u.view_as(x), div + self.size * torch.sin(flat.sum(1) + 3 * s - t) * (1 + s)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.exact.log_prob(x.flatten(1))


def data(model: Any, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x: Tensor = model.exact.sample(n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 4, "trace": "exact"},
        {"steps": 3, "trace": "exact", "corrections": 2, "replicates": 3},
        {"steps": 2, "corrections": 2, "probes": 2, "replicates": 8},
        {"steps": 1, "noise": "gaussian", "field": "teacher", "replicates": 8},
    ],
)
def test_wrong_head_is_corrected_without_bias_and_the_bars_cover(options: dict[str, Any]) -> None:
    model = WrongHead()
    x = data(model, 4000)
    out = get("f2d2-corrected", **options).log_prob(model, x)
    truth = model.log_prob(x)
    plain = get("f2d2", steps=options["steps"]).log_prob(model, x).log_prob
    assert float((plain - truth).abs().mean()) > 0.5
    error = out.log_prob - truth
    assert out.stderr is not None
    # the mean over points of independent errors lies within five of its own standard errors
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(len(x))
    dof = out.extra["dof"]
    differences = options["steps"] * (options.get("corrections", 1) * options.get("replicates", 4) - 1)
    assert bool(((dof >= 1.0) & (dof <= differences)).all())
    width = torch.from_numpy(student.ppf(0.975, dof.numpy())) * out.stderr
    assert int((error.abs() <= width).sum()) >= binom.ppf(1e-4, len(x), 0.93)
    assert float(out.stderr.mean()) < 5 * float(error.abs().mean())
    torch.testing.assert_close(out.extra["correction"], out.log_prob - plain)


class Toy:
    """A Gaussian's exact map with a smooth head that knows nothing: all of a thin axis is left to the correction."""

    def __init__(self, thin: float) -> None:
        variances = torch.tensor([1.0, 0.5, thin**2, thin**2], dtype=torch.float64)
        self.exact = Gaussian(torch.zeros(4, dtype=torch.float64), torch.diag(variances))
        self.event_shape = (4,)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.exact.joint(x, t, s)[0], torch.tanh(x.sum(1))


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("replicates", [4, 5, 8])
def test_bars_cover_where_the_head_knows_nothing_of_a_thin_axis(
    trace: str, steps: int, replicates: int
) -> None:
    for thin in (0.3, 0.1):
        model = Toy(thin)
        x = data(model, 1000)
        out = get("f2d2-corrected", steps=steps, replicates=replicates, trace=trace).log_prob(model, x)
        assert covered(out, model.exact.log_prob(x)) >= binom.ppf(1e-4, len(x), 0.93)


@pytest.mark.parametrize(
    ("task", "steps", "replicates", "points", "nodes"),
    [
        ("gmm-2d", 1, 4, 300, 18),
        ("gmm-2d", 4, 2, 150, 9),
        ("gmm-2d", 4, 4, 150, 9),
        ("checkerboard-2d", 4, 4, 100, 9),
        pytest.param("gmm-64d", 1, 8, 400, 18, marks=pytest.mark.slow),
        pytest.param("gmm-64d", 4, 4, 200, 9, marks=pytest.mark.slow),
        pytest.param("gmm-64d", 4, 2, 200, 9, marks=pytest.mark.slow),
        pytest.param("digits", 4, 4, 60, 9, marks=pytest.mark.slow),
    ],
)
def test_bars_cover_the_integral_along_the_path_of_a_shipped_map(
    task: str, steps: int, replicates: int, points: int, nodes: int
) -> None:
    """The truth asks nothing of the head; a rule of two thirds of its nodes says how good it is."""
    model = load_model(task, "direct-f2d2")
    x = get_task(task).items("test", points).x[:points].float()
    truth, coarser = (along_the_learned_path(model, x, steps, count) for count in (nodes, 2 * nodes // 3))
    out = get("f2d2-corrected", steps=steps, replicates=replicates).log_prob(model, x)
    assert out.stderr is not None
    assert float((truth - coarser).abs().mean()) < 0.1 * float(out.stderr.mean())
    assert covered(out, truth) >= binom.ppf(1e-3, points, 0.93)


def along_the_learned_path(model: Any, x: Tensor, steps: int, nodes: int) -> Tensor:
    """log p with the exact divergence at Gauss-Legendre nodes of every step, along the path of the map."""
    total = torch.zeros(len(x), dtype=torch.float64)
    for t, s in pairwise(torch.linspace(1.0, 0.0, steps + 1).tolist()):
        start = torch.full((len(x),), t)
        for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
            r = torch.full((len(x),), t + (s - t) * (node + 1.0) / 2.0)
            with torch.no_grad():
                there = moved(model, x, start, r)
            _, divergence = exact(partial(model.velocity, t=r), there)
            total += 0.5 * (s - t) * weight * divergence[:, 0].double()
        with torch.no_grad():
            x = moved(model, x, start, torch.full_like(start, s))
    return standard_normal_log_prob(x) + total


def moved(model: Any, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the map takes x from t to s."""
    moved: Tensor = x + (s - t).view(-1, *(1 for _ in x.shape[1:])) * model.joint(x, t, s)[0]
    return moved


def covered(out: Estimate, truth: Tensor) -> int:
    """How many of the truths lie within 95 % bars."""
    assert out.stderr is not None
    width = torch.from_numpy(student.ppf(0.975, out.extra["dof"].numpy())) * out.stderr
    return int(((out.log_prob - truth).abs() <= width).sum())


def test_right_head_leaves_nothing_to_correct_but_the_probe() -> None:
    model = WrongHead(size=0.0)
    x = data(model, 50)
    for options in ({"trace": "exact"}, {"trace": "exact", "field": "teacher", "corrections": 3}):
        out = get("f2d2-corrected", steps=2, **options).log_prob(model, x)
        torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-9)
        assert out.stderr is not None
        assert float(out.stderr.max()) < 1e-9


def test_more_strata_and_more_probes_shrink_the_bar() -> None:
    """Stratified times: a smooth integrand's error falls as corrections^(-3/2), faster than independent draws."""
    model = WrongHead()
    x = data(model, 500)

    def spread(**options: Any) -> float:
        out = get("f2d2-corrected", steps=1, trace="exact", replicates=2, **options).log_prob(model, x)
        return float((out.log_prob - model.log_prob(x)).square().mean().sqrt())

    assert spread(corrections=16) < 0.05 * spread(corrections=1)


@pytest.mark.parametrize(
    ("options", "cost"),
    [
        ({"steps": 1, "replicates": 2}, Cost(forwards=1 + 2 * 2, vjps=2 * 2, accepted_steps=1)),
        (
            {"steps": 3, "replicates": 2, "corrections": 2, "probes": 3},
            Cost(forwards=3 * (1 + 4 * 2), vjps=3 * 4 * (1 + 3), accepted_steps=3),
        ),
        (
            {"steps": 2, "replicates": 2, "trace": "exact", "field": "teacher"},
            Cost(forwards=2 * (1 + 2 * 2), vjps=2 * 2 * (1 + 4), accepted_steps=2),
        ),
    ],
)
def test_every_evaluation_is_counted_the_teachers_too(options: dict[str, Any], cost: Cost) -> None:
    model = WrongHead()
    assert get("f2d2-corrected", **options).log_prob(model, data(model, 5)).cost == cost


def test_teacher_that_the_model_counts_itself_is_counted_once() -> None:
    model = WrongHead()
    model.networks = ("teacher",)  # type: ignore[attr-defined]
    out = get("f2d2-corrected", steps=1, replicates=2, field="teacher").log_prob(model, data(model, 5))
    assert (out.cost.forwards, out.cost.vjps) == (1 + 2 * 2, 2 * 2)  # as of the model that names none


def test_draws_belong_to_the_items() -> None:
    model = WrongHead()
    x = data(model, 9)
    estimator = get("f2d2-corrected", steps=2, corrections=2)
    whole = estimator.log_prob(model, x).log_prob
    ids = torch.tensor([7, 2, 5])
    torch.testing.assert_close(
        estimator.log_prob(model, x[ids], items=ids).log_prob, whole[ids], rtol=0, atol=1e-12
    )
    other = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(3)).log_prob
    assert float((other - whole).abs().min()) > 0


def test_images_and_float32_give_the_estimate_of_the_vectors() -> None:
    vectors, image = WrongHead(), WrongHead(event_shape=(1, 2, 2))
    x = data(vectors, 6)
    estimator = get("f2d2-corrected", steps=2)
    expected = estimator.log_prob(vectors, x).log_prob
    found = estimator.log_prob(image, x.view(-1, 1, 2, 2)).log_prob
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    rounded = estimator.log_prob(image, x.view(-1, 1, 2, 2).float()).log_prob
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-3)


def test_samples_carry_a_corrected_density() -> None:
    model = WrongHead()
    drawn = get("f2d2-corrected", steps=1, trace="exact", corrections=64).sample(
        model, 40, dtype=torch.float64
    )
    assert drawn.log_prob is not None
    assert float((drawn.log_prob - model.log_prob(drawn.x)).abs().max()) < 0.05
    only = get("f2d2-corrected", steps=1).sample(model, 40, dtype=torch.float64, log_prob=False)
    assert only.log_prob is None
    torch.testing.assert_close(only.x, drawn.x)


def test_likelihood_is_differentiable_in_points_and_parameters() -> None:
    """D of the linear map is tr A everywhere, so the corrected value is exact and so is its gradient."""
    model = LinearMap(stable_matrix(3))
    x = points(4, 3).requires_grad_()
    out = get("f2d2-corrected", steps=2, trace="exact").log_prob(model, x, differentiable=True)
    torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-9)
    found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
    expected = torch.autograd.grad(model.log_prob(x).sum(), [model.matrix, x])
    torch.testing.assert_close(found, expected)


def test_gradient_runs_through_the_derivative_of_the_head() -> None:
    model = WrongHead()
    x = data(model, 3).requires_grad_()
    estimator = get("f2d2-corrected", steps=1, replicates=2)
    out = estimator.log_prob(model, x, differentiable=True)
    (found,) = torch.autograd.grad(out.log_prob.sum(), x)
    direction, step = points(3, 4, seed=9), 1e-5
    ends = [
        estimator.log_prob(model, (x + sign * step * direction).detach()).log_prob.sum() for sign in (1, -1)
    ]
    assert float((found * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-5)


def test_models_that_do_not_fit_are_refused() -> None:
    out = get("f2d2-corrected").log_prob(Field(lambda x, t: x), points(3, 2))
    assert (out.status, out.reason) == ("refused", "needs a joint flow map (a `joint` method)")
    model = Gaussian(points(2, seed=3), spd(2))
    out = get("f2d2-corrected", field="teacher").log_prob(model, points(3, 2))
    assert out.status == "refused"
    assert "teacher" in str(out.reason)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicates": 1}, "replicates must be at least 2, got 1"),
        ({"corrections": 0}, "corrections must be at least 1"),
        ({"trace": "exact", "probes": 2}, "probes has no effect with trace=exact"),
        ({"field": "student"}, "unknown field 'student'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        get("f2d2-corrected", **options)
