"""What every estimator promises: checks, invariances, and a model left as it was."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy_flows import Field, Linear, LinearMap, points, spd, stable_matrix

from flowlik_estimators import Estimate, Estimator, get, parse_spec, standard_normal_log_prob
from flowlik_estimators.call import Run
from flowlik_models.adapters import wrap
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.synthetic import closed_form

SPECS = [
    "ode[rtol=1e-7,atol=1e-7,trace=closed]",
    "ode[solver=rk4,steps=3]",
    "ode[solver=midpoint,steps=3,grid=logsnr,trace=hutchinson,probes=3]",
    "meanflow[steps=2]",
    "meanflow[steps=2,trace=hutchinson,noise=gaussian]",
    "f2d2[steps=3]",
]
every_estimator = pytest.mark.parametrize("spec", SPECS)


def build(spec: str) -> Any:
    (estimator,) = parse_spec(spec)
    return estimator


def model_of(d: int = 3) -> Gaussian:
    return Gaussian(points(d, seed=3), spd(d))


@settings(max_examples=20, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    batch=st.integers(1, 5),
    event=st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda e: math.prod(e) <= 6),
    double=st.booleans(),
)
def test_any_shape_and_dtype_gives_float64_rows(
    spec: str, batch: int, event: list[int], double: bool
) -> None:
    class Shaped(LinearMap):
        def joint(
            self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            u, divergence = super().joint(x.flatten(1), t, s)
            return u.view_as(x), divergence

    dtype = torch.float64 if double else torch.float32
    model = Shaped(stable_matrix(math.prod(event)), tuple(event))
    out = build(spec).log_prob(model, points(batch, *event, dtype=dtype))
    assert out.log_prob.shape == out.valid.shape == (batch,)
    assert out.log_prob.dtype == torch.float64
    assert out.status == "ok"
    assert not out.log_prob.requires_grad
    drawn = build(spec).sample(model, batch, dtype=dtype)
    assert drawn.x.shape == (batch, *event)
    assert drawn.x.dtype == dtype


@every_estimator
def test_same_seed_same_bits_and_another_seed_another_probe(spec: str) -> None:
    estimator, model, x = build(spec), model_of(), points(6, 3)

    def run(seed: int | None) -> Estimate:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        out: Estimate = estimator.log_prob(model, x, generator=generator)
        return out

    assert torch.equal(run(1).log_prob, run(1).log_prob)
    assert torch.equal(run(0).log_prob, run(None).log_prob)
    assert torch.equal(run(1).log_prob, run(2).log_prob) == ("hutchinson" not in spec)


@every_estimator
@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(7)), cut=st.integers(1, 6))
def test_batching_and_order_do_not_move_an_items_value(spec: str, order: list[int], cut: int) -> None:
    estimator, model, x = build(spec), model_of(), points(7, 3)
    items = torch.arange(100, 107)

    def run(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        value: Tensor = estimator.log_prob(model, x[rows], items=items[rows], generator=generator).log_prob
        return value

    whole, rows = run(torch.arange(7)), torch.tensor(order)
    pieces = torch.cat([run(rows[:cut]), run(rows[cut:])])
    torch.testing.assert_close(pieces, whole[rows], rtol=0, atol=1e-5 if "rtol" in spec else 1e-12)


@every_estimator
def test_samples_are_keyed_by_item(spec: str) -> None:
    estimator, model = build(spec), model_of()
    whole = estimator.sample(model, 6, dtype=torch.float64)
    part = estimator.sample(model, 2, items=torch.tensor([4, 1]), dtype=torch.float64)
    torch.testing.assert_close(part.x, whole.x[[4, 1]], rtol=0, atol=1e-5)


BAD_POINTS = {
    "empty": (torch.zeros(0, 3), "empty batch"),
    "event": (torch.zeros(4, 2), r"must have shape \(batch, 3\), got \(4, 2\)"),
    "scalar": (torch.tensor(1.0), "must have shape"),
    "rank": (torch.zeros(4, 3, 1), "must have shape"),
    "nan": (torch.tensor([[0.0, 0, 0], [0, math.nan, 0]]), "NaN or infinity in 1 of 2 rows, first in row 1"),
    "inf": (torch.tensor([[0.0, math.inf, 0]]), "NaN or infinity"),
    "integer": (torch.zeros(4, 3, dtype=torch.int64), "float32 or float64"),
    "half": (torch.zeros(4, 3, dtype=torch.float16), "float32 or float64"),
    "list": ([[0.0, 0.0, 0.0]], "float32 or float64 tensor, got a list"),
}


@pytest.mark.parametrize("case", list(BAD_POINTS))
@every_estimator
def test_bad_points_are_a_clear_error(spec: str, case: str) -> None:
    x, message = BAD_POINTS[case]
    with pytest.raises(ValueError, match=message):
        build(spec).log_prob(model_of(), x)


def test_bad_companions_are_a_clear_error() -> None:
    model, x = model_of(), points(4, 3)
    with pytest.raises(ValueError, match="cond has 3 rows, x has 4"):
        get("f2d2").log_prob(model, x, cond=torch.zeros(3))
    with pytest.raises(ValueError, match="items must be int64 of shape"):
        get("f2d2").log_prob(model, x, items=torch.arange(3))
    with pytest.raises(ValueError, match="items must be int64 of shape"):
        get("f2d2").log_prob(model, x, items=torch.zeros(4))
    with pytest.raises(ValueError, match="n must be at least 1"):
        get("f2d2").sample(model, 0)
    with pytest.raises(ValueError, match="float32 or float64"):
        get("f2d2").sample(model, 2, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"velocity has shape \(4, 1\), expected \(4, 3\)"):
        get("ode").log_prob(Field(lambda x, t: x[:, :1], 3), x)


def test_model_without_an_event_shape_is_refused() -> None:
    out = get("ode").log_prob(nn.Linear(3, 3), points(4, 3))
    assert (out.status, out.log_prob.shape, out.valid.any().item()) == ("refused", (4,), False)
    assert out.reason is not None
    assert "event_shape" in out.reason


def test_points_of_another_type_than_the_parameters_are_named_with_the_cure() -> None:
    class Network(nn.Linear):
        event_shape = (3,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model = Network(3, 3).double()
    with pytest.raises(
        ValueError, match=r"x is float32 and the model's parameters are float64: give both one type"
    ):
        build("ode[solver=rk4,steps=3]").log_prob(model, points(4, 3).float())
    with pytest.raises(ValueError, match=r"x\.to\(torch\.float64\)"):
        build("ode[solver=rk4,steps=3]").sample(model, 4, dtype=torch.float32)


def test_parameters_are_frozen_during_the_call_and_as_before_after_it() -> None:
    seen: list[bool] = []

    class Watched(Linear):
        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            seen.append(self.matrix.requires_grad)
            if len(seen) > 100:
                raise RuntimeError("a bug of the model")
            return super().velocity(x, t)

    model = Watched(stable_matrix(3))
    model.register_parameter("fixed", nn.Parameter(torch.zeros(1), requires_grad=False))
    estimator = get("ode", solver="euler", steps=2)
    estimator.log_prob(model, points(4, 3))
    assert seen == [False, False]
    estimator.log_prob(model, points(4, 3), differentiable=True)
    assert seen == [False, False, True, True]
    with pytest.raises(RuntimeError):
        get("ode", solver="euler", steps=200).log_prob(model, points(4, 3))
    assert [p.requires_grad for p in model.parameters()] == [True, False]


@every_estimator
def test_callers_grad_mode_does_not_matter(spec: str) -> None:
    estimator, model, x = build(spec), model_of(), points(4, 3)
    expected = estimator.log_prob(model, x).log_prob
    with torch.no_grad():
        assert torch.equal(estimator.log_prob(model, x).log_prob, expected)
    with torch.inference_mode():
        assert torch.equal(estimator.log_prob(model, x.clone()).log_prob, expected)
    assert torch.is_grad_enabled()
    out = estimator.log_prob(model, x.clone().requires_grad_())
    assert not out.log_prob.requires_grad


def test_half_precision_networks_do_not_change_the_state() -> None:
    field = Field(lambda x, t: (0.1 * x).to(torch.bfloat16))
    get("ode", solver="euler", steps=3).log_prob(field, points(4, 2, dtype=torch.float32))
    assert {x.dtype for x, _ in field.seen} == {torch.float32}


def test_standard_normal_density() -> None:
    x = points(4, 2, 3)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(standard_normal_log_prob(x), expected)


@dataclass(frozen=True, kw_only=True)
class Answering(Estimator):
    """Answers what a test says."""

    name = "answering"
    answer: ClassVar[Any] = None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        run.velocity(model, x, run.at(0.5))
        return type(self).answer(torch.arange(len(x), dtype=torch.float64))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda value: Estimate(log_prob=value[:, None]), "log_prob is a tensor of float64 of shape"),
        (lambda value: Estimate(log_prob=value[:1]), "log_prob is a tensor of float64 of shape"),
        (lambda value: Estimate(log_prob=value.mean()), "log_prob is a tensor of float64 of shape"),
        (lambda value: Estimate(log_prob=value.long()), "log_prob is a tensor of int64"),
        (lambda value: Estimate(log_prob=value + 1j), "log_prob is a tensor of complex"),
        (lambda value: Estimate(log_prob=value.numpy()), "log_prob is an object of ndarray"),
        (lambda value: Estimate(log_prob=value, stderr=value[:, None]), "stderr is a tensor"),
        (lambda value: Estimate(log_prob=value, valid=value), "valid is a tensor of float64"),
        (lambda value: Estimate(log_prob=value, status="fine"), "status is 'fine'"),  # type: ignore[arg-type]
        (lambda value: value, "answered a tensor of float64"),
    ],
)
def test_an_answer_of_a_family_that_is_not_one_number_a_row_is_refused(
    monkeypatch: pytest.MonkeyPatch, answer: Any, said: str
) -> None:
    monkeypatch.setattr(Answering, "answer", staticmethod(answer))
    with pytest.raises(ValueError, match=f"^answering: .*{said}"):
        Answering().log_prob(closed_form("gaussian-2d"), torch.zeros(4, 2))


@pytest.mark.parametrize(
    ("x", "given", "said"),
    [
        ([[0.0, 0.0]], {}, "got a list: torch.as_tensor"),
        (torch.zeros(1, 2).to_sparse(), {}, "x.to_dense"),
        (torch.zeros(1, 2, device="meta"), {}, "on meta"),
        (torch.zeros(1, 2), {"items": [0]}, "items is a list of 1"),
        (torch.zeros(1, 2), {"generator": 0}, "generator must be a torch.Generator, got int"),
    ],
)
def test_what_comes_in_of_another_kind_is_named_with_the_cure(x: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        get("ode", trace="hutchinson").log_prob(closed_form("gaussian-2d"), x, **given)


def test_weights_without_values_are_named_and_a_callers_autocast_takes_no_bits() -> None:
    net = torch.nn.Linear(2, 2)
    model = wrap(lambda z, u: net(z), event_shape=(2,))
    estimator, x = get("ode", solver="euler", steps=2), torch.full((1, 2), 0.3)
    alone = estimator.log_prob(model, x).log_prob
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(estimator.log_prob(model, x).log_prob, alone)
        assert torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="weights are on the meta device"):
        estimator.log_prob(wrap(net.to("meta"), event_shape=(2,)), x)
