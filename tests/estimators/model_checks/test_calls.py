"""Inputs come back as they went in, and a model of one time a call is asked for one time a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import points, spd

from flowlik_estimators import get, parse_spec
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.moments import moments


def _shift(x: Tensor) -> None:
    x -= 0.1


def _shift_without_grad(x: Tensor) -> None:
    with torch.no_grad():
        x.sub_(0.1)


def _shift_data(x: Tensor) -> None:
    x.data -= 0.1


def _shift_numpy(x: Tensor) -> None:
    x.detach().numpy()[...] -= 0.1


def _shift_a_view(x: Tensor) -> None:
    x[:, 0].mul_(2.0)


def _clamp_after(x: Tensor) -> None:
    x.clamp_(-0.1, 0.1)


WAYS = [_shift, _shift_without_grad, _shift_data, _shift_numpy, _shift_a_view, _clamp_after]
ASKED = {
    "ode[solver=euler,steps=2]": "velocity",
    "ode[solver=euler,steps=2,trace=hutchinson]": "velocity",
    "ode": "velocity",
    "ode[trace=closed]": "velocity_and_divergence",
    "ode[divergence=quadrature,nodes=5]": "velocity",
    "meanflow": "average_velocity",
    "flow-map-exact": "average_velocity",
    "f2d2": "joint",
    "f2d2-corrected": "joint",
    "generator": "generate",
    "pi-flow": "policy",
    "pi-flow[jacobian=full]": "policy",
}


def _changing(method: str, change: Callable[[Tensor], None], which: int = 0) -> Any:
    model = Gaussian(points(3, seed=3), spd(3))
    asked = getattr(model, method)

    def call(*args: Any, cond: Any = None) -> Any:
        answer = asked(*(arg.clone() for arg in args), cond=cond)
        change(args[which])
        return answer

    object.__setattr__(model, method, call)
    return model


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("spec", ASKED)
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_model_that_changes_its_input_is_an_error_and_the_callers_points_stay(
    spec: str, change: Callable[[Tensor], None], differentiable: bool
) -> None:
    (estimator,) = parse_spec(spec)
    x = points(4, 3)
    before = x.clone()
    if differentiable:
        x.requires_grad_()
    method = ASKED[spec]
    with pytest.raises(ValueError, match=f"the model's {method} changes its input in place: work on a copy"):
        estimator.log_prob(_changing(method, change), x, differentiable=differentiable)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("spec", [spec for spec in ASKED if "generator" not in spec])
def test_a_model_that_changes_the_time_is_an_error(spec: str) -> None:
    (estimator,) = parse_spec(spec)
    with pytest.raises(ValueError, match="changes its input in place"):
        estimator.log_prob(_changing(ASKED[spec], lambda t: t.mul_(0.5), which=1), points(1, 3))


def test_a_condition_that_is_changed_is_an_error_and_the_callers_stays() -> None:
    class Labelled:
        event_shape = (3,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            label = cond["label"] if isinstance(cond, dict) else cond
            label += 1
            return x * label[:, None]

    for cond in (torch.zeros(4), {"label": torch.zeros(4)}):
        with pytest.raises(ValueError, match="velocity changes its input in place"):
            get("ode", solver="euler", steps=2).log_prob(Labelled(), points(4, 3), cond=cond)
        assert torch.equal(cond["label"] if isinstance(cond, dict) else cond, torch.zeros(4))


def test_samples_are_guarded_too() -> None:
    with pytest.raises(ValueError, match="velocity changes its input in place"):
        get("ode", solver="euler", steps=2).sample(_changing("velocity", _shift), 4, dtype=torch.float64)


# --- one time a call ---


def _mixture() -> Any:
    rotations = torch.stack([torch.linalg.qr(points(3, 3, seed=k))[0] for k in (5, 6)])
    weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
    model = GaussianMixture(weights, points(2, 3, seed=3), points(2, 3, seed=4).abs() + 0.2, rotations)
    x = model.sample(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return moments.attach(model, moments.estimate(x, "mixture"))


class OneTime:
    """Reads ``t[0]`` (and ``s[0]``) and notes what it was given."""

    def __init__(self, model: Any, scalar_time: bool = True) -> None:
        self.model, self.scalar_time = model, scalar_time
        self.event_shape, self.moments = model.event_shape, getattr(model, "moments", None)
        self.times: list[tuple[Tensor, ...]] = []

    def _first(self, x: Tensor, *times: Tensor) -> tuple[Tensor, ...]:
        assert all(t.shape == (len(x),) for t in times)
        self.times.append(tuple(t.detach() for t in times))
        return tuple(t[:1].expand(len(x)) for t in times)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        return self.model.velocity(x, *self._first(x, t), cond=cond)

    def velocity_and_divergence(self, x: Tensor, t: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self.model.velocity_and_divergence(x, *self._first(x, t), cond=cond)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Tensor:
        return self.model.average_velocity(x, *self._first(x, t, s), cond=cond)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        return self.model.joint(x, *self._first(x, t, s), cond=cond)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Any:
        return self.model.policy(x, *self._first(x, t, s), cond=cond)


ONE_TIME = {
    "ode": _mixture,
    "ode[trace=closed,divergence=quadrature]": _mixture,
    "ode[divergence=quadrature]": _mixture,
    "ode[divergence=quadrature,trace=hutchinson,nodes=9]": _mixture,
    "ode[solver=rk4,steps=3,trace=hutchinson,control=auto,basis=auto]": _mixture,
    "whitened-ode[divergence=quadrature]": _mixture,
    "whitened-ode[solver=adams_pec,steps=4,clock=stretched]": _mixture,
    "meanflow": lambda: Gaussian(points(3, seed=3), spd(3)),
    "flow-map-exact": lambda: Gaussian(points(3, seed=3), spd(3)),
    "f2d2": lambda: Gaussian(points(3, seed=3), spd(3)),
    "f2d2-corrected[corrections=3]": lambda: Gaussian(points(3, seed=3), spd(3)),
    "pi-flow[segments=2]": _mixture,
    "pi-flow[jacobian=full]": _mixture,
}


@pytest.mark.parametrize("spec", ONE_TIME)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_of_one_time_a_call_is_asked_for_one_and_answers_as_any_other(
    spec: str, wrapped: bool
) -> None:
    (estimator,) = parse_spec(spec)
    model, x = ONE_TIME[spec](), points(5, 3)
    one = OneTime(model)
    asked: Any = one
    if wrapped:
        asked = _Around(one)
    out, expected = estimator.log_prob(asked, x), estimator.log_prob(model, x)
    assert out.status == expected.status == "ok"
    torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=0, atol=1e-10)
    assert out.cost == expected.cost
    assert all(bool((t == t[0]).all()) for times in one.times for t in times)


class _Around(nn.Module):
    """A module that holds such a model, and does not say so itself."""

    def __init__(self, inner: OneTime) -> None:
        super().__init__()
        self.inner, self.event_shape, self.moments = inner, inner.event_shape, inner.moments

    def __getattr__(self, name: str) -> Any:
        if name in ("velocity", "velocity_and_divergence", "average_velocity", "joint", "policy"):
            return getattr(self.__dict__["inner"], name)
        return super().__getattr__(name)


def test_without_saying_so_the_model_is_asked_for_several_times_at_once() -> None:
    """The test above could not fail otherwise."""
    one = OneTime(_mixture(), scalar_time=False)
    get("ode", divergence="quadrature").log_prob(one, points(5, 3))
    assert any(not bool((t == t[0]).all()) for times in one.times for t in times)


def test_gradients_pass_through_the_parts() -> None:
    x = points(5, 3)
    grads = []
    for model in (_mixture(), OneTime(_mixture())):
        leaf = x.clone().requires_grad_()
        out = get("ode", solver="rk4", steps=2, divergence="quadrature", nodes=5).log_prob(
            model, leaf, differentiable=True
        )
        grads.append(torch.autograd.grad(out.log_prob.sum(), leaf)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-10)


def test_conditions_go_with_the_rows_of_their_time() -> None:
    class Labelled:
        event_shape = (3,)
        scalar_time = True

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            assert bool((t == t[0]).all())
            return x.sin() * t[0] + cond["shift"][:, None]

    class Rows(Labelled):
        scalar_time = False

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            return x.sin() * t[:, None] + cond["shift"][:, None]

    x, cond = points(5, 3), {"shift": points(5, seed=9)}
    one, two = (
        get("ode", divergence="quadrature").log_prob(model(), x, cond=cond) for model in (Labelled, Rows)
    )
    torch.testing.assert_close(one.log_prob, two.log_prob, rtol=0, atol=1e-10)
