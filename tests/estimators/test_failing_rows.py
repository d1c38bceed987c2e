"""A few rows that fail are set aside: the others are answered as without them, and the reason says what it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, LinearMap, points, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_estimators.call import Estimate
from flowlik_models.closed_forms.gaussian import Gaussian

N, DIM = 200, 3
BAD = torch.tensor([7, 130])
GOOD = torch.ones(N, dtype=torch.bool).index_fill(0, BAD, False)
FAR = 30.0


def data() -> Tensor:
    """Rows of which two lie far out, where the fields below go wrong."""
    x = points(N, DIM)
    x[BAD, 0] = FAR + x[BAD, 0].abs()
    return x


def nan_where(rows: Tensor) -> Tensor:
    return torch.where(rows, math.nan, 0.0)


def nan_beyond(x: Tensor, t: Tensor) -> Tensor:
    v = x @ stable_matrix(DIM).T
    return v + nan_where(x[:, :1] > FAR / 3)


def nan_from_halfway(x: Tensor, t: Tensor) -> Tensor:
    v = x @ stable_matrix(DIM).T
    return v + nan_where((x[:, :1] > FAR / 10) & (t[:, None] < 0.5))


def stiff_beyond(x: Tensor, t: Tensor) -> Tensor:
    v = x @ stable_matrix(DIM).T
    return torch.where(x[:, :1] > FAR / 10, v + 1e3 * torch.sin(3e3 * x), v)


def exploding_beyond(x: Tensor, t: Tensor) -> Tensor:
    v = x @ stable_matrix(DIM).T
    return torch.where(x[:, :1] > FAR / 3, -(x**3), v)


SOLVES = [
    "ode[trace=exact]",
    "ode[trace=hutchinson]",
    "ode[solver=dopri8]",
    "ode[trace=hutchinson,probes=2,divergence=quadrature,nodes=17]",
    "ode[solver=rk4,steps=8]",
    "ode[solver=adams_pec,steps=8]",
]


def estimate(spec: str, model: Any, rows: Tensor | None = None, **options: Any) -> Estimate:
    (estimator,) = parse_spec(spec)
    items = torch.arange(N)
    x = data()
    if rows is not None:
        x, items = x[rows], items[rows]
    out: Estimate = estimator.log_prob(model, x, items=items, **options)
    return out


@pytest.mark.parametrize("spec", SOLVES)
@pytest.mark.parametrize("velocity", [nan_beyond, nan_from_halfway], ids=lambda f: f.__name__)
def test_rows_with_a_velocity_that_is_nan_are_set_aside_and_named(
    spec: str, velocity: Callable[[Tensor, Tensor], Tensor]
) -> None:
    out = estimate(spec, Field(velocity, DIM))
    alone = estimate(spec, Field(velocity, DIM), GOOD)
    assert out.status == "ok"
    assert torch.equal(out.valid, GOOD)
    assert torch.isnan(out.log_prob[BAD]).all()
    torch.testing.assert_close(out.log_prob[GOOD], alone.log_prob, rtol=0, atol=1e-12)
    assert out.reason is not None
    assert out.reason.startswith("2 of 200 rows have no value: the model's velocity is NaN at t = ")
    t = float(out.reason.partition("t = ")[2].split()[0])
    assert t == 1 if velocity is nan_beyond else 0.0 <= t < 0.5
    assert out.stderr is None or torch.equal(torch.isnan(out.stderr), ~GOOD)
    for name, values in out.extra.items():
        assert values.shape == (N,), name


def test_cost_is_that_of_all_solves_that_a_row_was_in_and_no_evaluation_is_left_out() -> None:
    model = Field(nan_beyond, DIM)
    estimate("ode", model)  # the first call of a model also looks at its graph, uncounted
    model.seen.clear()
    out, alone = estimate("ode", model), estimate("ode", Field(nan_beyond, DIM), GOOD)
    forwards = torch.as_tensor(out.cost.forwards)
    assert forwards.shape == (N,)
    assert float(forwards.sum()) == sum(len(seen) for seen, _ in model.seen)
    before = forwards[GOOD] - alone.cost.forwards  # the solve that the two rows ended
    assert before.unique().numel() == 1
    assert 1 <= float(before[0]) <= 3
    assert float(forwards[BAD].min()) >= 1


@pytest.mark.parametrize(
    ("velocity", "spec", "why"),
    [
        (stiff_beyond, "ode[rtol=1e-4,atol=1e-4,max_nfe=150]", "after max_nfe = 150"),
        (exploding_beyond, "ode[rtol=1e-4,atol=1e-4,max_nfe=150]", ""),
    ],
)
def test_rows_that_are_too_stiff_are_set_aside(velocity: Any, spec: str, why: str) -> None:
    out, alone = estimate(spec, Field(velocity, DIM)), estimate(spec, Field(velocity, DIM), GOOD)
    assert alone.status == "ok"
    assert bool(alone.valid.all())
    assert out.status == "ok"
    assert torch.equal(out.valid, GOOD)
    torch.testing.assert_close(out.log_prob[GOOD], alone.log_prob, rtol=0, atol=2e-3)
    assert out.reason is not None
    assert out.reason.startswith("2 of 200 rows have no value: ")
    assert why in out.reason
    nfe = torch.as_tensor(out.cost.forwards)
    assert float(nfe[BAD].max()) > float(nfe[GOOD].median())


def test_every_row_that_fails_is_a_call_that_diverged_and_costs_little_more() -> None:
    def stiff(x: Tensor, t: Tensor) -> Tensor:
        return 1e3 * torch.sin(3e3 * x)

    out = estimate("ode[max_nfe=100]", Field(stiff, DIM))
    assert out.status == "diverged"
    assert not bool(out.valid.any())
    assert "after max_nfe = 100 evaluations" in str(out.reason)
    assert float(torch.as_tensor(out.cost.forwards).mean()) < 1.1 * 105
    nothing = estimate("ode", Field(lambda x, t: x * math.nan, DIM))
    assert (nothing.status, nothing.reason) == (
        "diverged",
        "the model's velocity is NaN at t = 1 for finite x",
    )


@pytest.mark.parametrize("spec", ["f2d2[steps=2]", "meanflow[steps=2]", "flow-map-exact[steps=2]"])
def test_maps_name_their_nan(spec: str) -> None:
    class Broken(LinearMap):
        def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
            u, div = super().joint(x, t, s, cond=cond)
            return u + nan_where(x[:, :1] > FAR / 3), div

    out = estimate(spec, Broken(stable_matrix(DIM)))
    assert torch.equal(out.valid, GOOD)
    assert out.reason is not None
    assert out.reason.startswith("2 of 200 rows have no value: the model's ")
    assert "is NaN at t = 1 for finite x" in out.reason


def test_gradients_of_the_others_are_those_without_the_rows() -> None:
    gradients = []
    for rows in (torch.arange(N), GOOD.nonzero().flatten()):
        x = data().requires_grad_()
        out = get("ode", rtol=1e-4, atol=1e-4).log_prob(
            Field(nan_beyond, DIM), x[rows], items=rows, differentiable=True
        )
        out.log_prob[out.valid].sum().backward()
        assert x.grad is not None
        gradients.append(x.grad[GOOD])
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_samples_that_fail_are_set_aside() -> None:
    for spec in ("ode", "ode[solver=rk4,steps=4]"):
        model = Field(lambda x, t: x + nan_where(x[:, :1] > 2), DIM)
        (estimator,) = parse_spec(spec)
        out = estimator.sample(model, N)
        assert out.status == "ok"
        bad = ~out.valid
        assert 0 < int(bad.sum()) < N / 2
        assert torch.isnan(out.x[bad]).any(1).all()
        assert out.reason is not None
        assert "rows have no value: the model's velocity is NaN at t = " in out.reason
        keep = out.valid.nonzero().flatten()
        alone = estimator.sample(model, len(keep), items=keep)
        torch.testing.assert_close(out.x[keep], alone.x, rtol=0, atol=1e-4)


def test_conditions_and_items_go_with_their_rows() -> None:
    def velocity(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return nan_beyond(x, t) * cond[:, None]

    cond = torch.linspace(0.5, 1.0, N, dtype=torch.float64)
    out = estimate("ode[trace=hutchinson]", Field(velocity, DIM), cond=cond)
    alone = estimate("ode[trace=hutchinson]", Field(velocity, DIM), GOOD, cond=cond[GOOD])
    torch.testing.assert_close(out.log_prob[GOOD], alone.log_prob, rtol=0, atol=1e-12)


def test_a_sound_model_is_answered_in_one_call_at_a_plain_cost() -> None:
    out = get("ode").log_prob(Gaussian(torch.zeros(DIM), torch.eye(DIM)), points(N, DIM))
    assert isinstance(out.cost.forwards, float)
    assert out.reason is None
