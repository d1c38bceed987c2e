"""The adapters of public libraries: what they say without the library, and their answers with it."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_flows import Field, Linear, points, spd, stable_matrix

import flowlik_estimators.peers  # noqa: F401 - registers them
from flowlik_estimators import get, parse_spec
from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian

PEERS = ("peer-flow-matching", "peer-zuko", "peer-torchode")
MODULES = {"peer-flow-matching": "flow_matching", "peer-zuko": "zuko", "peer-torchode": "torchode"}
every_peer = pytest.mark.parametrize("name", PEERS)


def needs(name: str) -> None:
    pytest.importorskip(MODULES[name], reason=f"{MODULES[name]} is not installed")


def built(spec: str) -> Estimator:
    (estimator,) = parse_spec(spec)
    needs(estimator.name)
    return estimator


def estimate(estimator: Estimator, model: Any, x: Tensor, seed: int = 0, **more: Any) -> Estimate:
    return estimator.log_prob(model, x, generator=torch.Generator().manual_seed(seed), **more)


# --- without the libraries ----------------------------------------------------------------------------------


@every_peer
def test_missing_library_is_a_refusal_that_says_how_to_get_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [loaded for loaded in sys.modules if loaded.split(".")[0] == MODULES[name]]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, MODULES[name], None)  # its import then raises ImportError
    out = get(name).log_prob(closed_form("gmm-2d"), points(3, 2))
    assert out.status == "refused"
    assert out.reason is not None
    assert out.reason.startswith(f"needs {name.removeprefix('peer-')}: pip install 'flowlik[peers]'")
    assert "\n" not in out.reason
    assert out.cost.forwards == 0


@every_peer
def test_model_without_a_velocity_is_named_before_the_library(name: str) -> None:
    class Shape:
        event_shape = (2,)

    out = get(name).log_prob(Shape(), points(3, 2))
    assert (out.status, out.reason) == ("refused", "needs a velocity field (a `velocity` method)")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("peer-zuko[rtol=0.0]", "rtol must be positive"),
        ("peer-zuko[solver=rk4]", "unknown parameter"),
        ("peer-torchode[atol=-1.0]", "atol must be positive"),
        ("peer-torchode[solver=rk4]", "unknown solver"),
        ("peer-torchode[max_nfe=0]", "max_nfe must be at least 1"),
        ("peer-torchode[trace=closed]", "unknown trace"),
        ("peer-flow-matching[solver=midpoint]", "needs steps"),
        ("peer-flow-matching[steps=4]", "steps has no effect"),
        ("peer-flow-matching[solver=euler,steps=0]", "steps must be at least 1"),
        ("peer-flow-matching[solver=euler,steps=4,rtol=1e-3]", "rtol has no effect"),
        ("peer-flow-matching[rtol=-1.0]", "rtol must be positive"),
    ],
)
def test_options_that_do_not_go_together_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        ("peer-zuko", "peer-zuko"),
        ("peer-flow-matching[rtol=1e-5]", "peer-flow-matching"),
        ("peer-flow-matching[steps=8,solver=midpoint]", "peer-flow-matching[solver=midpoint,steps=8]"),
        (
            "peer-torchode[trace=hutchinson,solver=tsit5]",
            "peer-torchode[solver=tsit5,trace=hutchinson]",
        ),
    ],
)
def test_label_spells_what_differs_from_the_defaults(spec: str, label: str) -> None:
    (estimator,) = parse_spec(spec)
    assert estimator.label == label
    assert parse_spec(label) == [estimator]


def test_defaults_are_those_of_the_ode_estimator() -> None:
    ours = get("ode").params()
    for name in PEERS:
        theirs = get(name).params()
        shared = {"rtol", "atol", "trace", "max_nfe", "eps"}
        assert {key: theirs[key] for key in shared} == {key: ours[key] for key in shared}


# --- with them ----------------------------------------------------------------------------------------------

TIGHT = [f"{name}[rtol=1e-8,atol=1e-8]" for name in PEERS] + [
    "peer-torchode[solver=tsit5,rtol=1e-8,atol=1e-8]",
    "peer-flow-matching[solver=rk4,steps=96]",
]


@pytest.mark.parametrize("spec", TIGHT)
def test_exact_trace_reaches_the_density_of_a_gaussian(spec: str) -> None:
    model = Gaussian(points(3, seed=3), spd(3))
    x = model.sample(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = estimate(built(spec), model, x)
    assert out.status == "ok"
    assert out.stderr is None
    torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=2e-5)


@every_peer
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_image_shapes_and_both_dtypes_work(name: str, trace: str, dtype: torch.dtype) -> None:
    needs(name)
    # the divergence of v = a x is a d for every Rademacher probe; a Gaussian one gives a |e|^2
    model = Linear(0.3 * torch.eye(4, dtype=torch.float64), (1, 2, 2))
    x = points(5, 1, 2, 2, dtype=dtype)
    out = estimate(get(name, trace=trace), model, x)
    assert out.status == "ok"
    assert out.log_prob.dtype == torch.float64
    if (name, trace) != ("peer-zuko", "hutchinson"):
        expected = model.log_prob(x.double()).detach()
        torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-3)


@every_peer
@pytest.mark.parametrize(("trace", "products"), [("exact", 4), ("hutchinson", 1)])
def test_every_evaluation_is_a_forward_and_its_products(name: str, trace: str, products: int) -> None:
    needs(name)
    out = estimate(get(name, trace=trace, rtol=1e-3, atol=1e-3), Linear(stable_matrix(4)), points(5, 4))
    assert float(out.cost.forwards) > 6
    assert out.cost.vjps == products * out.cost.forwards
    assert out.cost.jvps == 0


def test_fixed_step_solver_spends_exactly_its_stages() -> None:
    for solver, stages in {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}.items():
        for steps in (1, 7, 49):
            out = estimate(
                built(f"peer-flow-matching[solver={solver},steps={steps},trace=hutchinson]"),
                Linear(stable_matrix(2)),
                points(3, 2),
            )
            assert out.cost.forwards == stages * steps


@every_peer
def test_hutchinson_averages_to_the_exact_trace(name: str) -> None:
    """Over many equal rows: the mean of the probes lies within four standard errors of the exact value."""
    needs(name)
    model, rows = Linear(stable_matrix(3)), 4000
    x = points(1, 3).expand(rows, 3).contiguous()
    exact = float(estimate(get(name), model, x[:1]).log_prob)
    noisy = estimate(get(name, trace="hutchinson"), model, x).log_prob
    assert float(noisy.std()) > 0.1
    assert abs(float(noisy.mean()) - exact) < 4 * float(noisy.std()) / math.sqrt(rows) + 1e-3


@every_peer
def test_same_seed_same_bits_whatever_the_global_state_which_stays(name: str) -> None:
    needs(name)
    estimator, model, x = get(name, trace="hutchinson"), Linear(stable_matrix(3)), points(6, 3)
    torch.manual_seed(1)
    first = estimate(estimator, model, x, seed=4).log_prob
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(3))
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(estimate(estimator, model, x, seed=4).log_prob, first)
    assert not torch.equal(estimate(estimator, model, x, seed=5).log_prob, first)
    others = estimate(estimator, model, x, seed=4, items=torch.arange(6, 12)).log_prob
    assert not torch.equal(others, first)


@every_peer
def test_condition_and_end_time_reach_the_model(name: str) -> None:
    needs(name)
    field = Field(lambda x, t, cond: cond[:, None] * x, 2)
    cond = torch.tensor([0.5, -0.5], dtype=torch.float64)
    x = points(2, 2)
    out = estimate(get(name, eps=0.25, rtol=1e-7, atol=1e-7), field, x, cond=cond)
    z = x * torch.exp(-0.75 * cond)[:, None]
    expected = -0.5 * z.square().sum(1) - math.log(2 * math.pi) - 2 * 0.75 * cond
    torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-5)
    assert float(field.seen[0][1].max()) == 0.75


@every_peer
def test_max_nfe_ends_a_solve_with_its_cost(name: str) -> None:
    needs(name)
    out = estimate(get(name, max_nfe=9), closed_form("gmm-2d"), points(1, 2))
    assert out.status == "diverged"
    assert out.reason is not None
    assert "max_nfe = 9" in out.reason
    assert out.cost.forwards == 9


@every_peer
def test_velocity_that_is_not_finite_is_a_status(name: str) -> None:
    needs(name)
    broken = Field(lambda x, t: x * torch.where(t > 0.5, 1.0, math.nan)[:, None])
    out = estimate(get(name), broken, points(1, 2))
    assert out.status == "diverged"
    assert out.reason
    assert not bool(out.valid.any())
    assert float(out.cost.forwards) < 10_000


@every_peer
def test_wrong_velocity_shape_is_a_clear_error(name: str) -> None:
    needs(name)
    with pytest.raises(ValueError, match=r"velocity has shape \(4, 1\), expected \(4, 2\)"):
        estimate(get(name), Field(lambda x, t: x[:, :1]), points(4, 2))


@every_peer
def test_asking_for_a_gradient_is_a_clear_error(name: str) -> None:
    needs(name)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        estimate(get(name), Linear(stable_matrix(2)), points(4, 2), differentiable=True)


def test_torchode_reports_the_steps_of_each_row() -> None:
    """A row that does not move takes fewer steps than one in a stiff place; the batch pays for the longest."""
    estimator = built("peer-torchode")
    rate = torch.tensor([0.01, 30.0], dtype=torch.float64)
    field = Field(lambda x, t, cond: -cond[:, None] * x, 2)
    out = estimate(estimator, field, points(2, 2), cond=rate)
    easy, stiff = out.extra["solver_steps"].tolist()
    assert easy < stiff
    assert out.cost.forwards >= 6 * stiff
    assert out.cost.accepted_steps + out.cost.rejected_steps == pytest.approx((easy + stiff) / 2)


def test_torchode_probe_does_not_depend_on_the_batch() -> None:
    estimator = built("peer-torchode[trace=hutchinson]")
    model, x = Linear(stable_matrix(3)), points(6, 3)
    items = torch.arange(6)
    whole = estimate(estimator, model, x, items=items).log_prob
    part = estimate(estimator, model, x[3:], items=items[3:]).log_prob
    torch.testing.assert_close(part, whole[3:], rtol=0, atol=1e-12)


@every_peer
def test_agrees_with_ode_on_a_mixture_within_both_tolerances(name: str) -> None:
    needs(name)
    model = closed_form("gmm-2d")
    x = model.sample(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (estimate(get(n, rtol=1e-7, atol=1e-7), model, x).log_prob for n in ("ode", name))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
