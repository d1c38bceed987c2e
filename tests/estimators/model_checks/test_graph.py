"""A model that cuts its graph is an error wherever a derivative is taken through it, and nothing else is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sizes import figure
from torch import Tensor, nn
from toy_flows import Field, moments_of, points, spd, with_moments

from flowlik_estimators import get, parse_spec
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.zoo import load_model


class Net(nn.Module):
    """A small network with every method."""

    event_shape = (4,)
    frozen_density = True

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5)).double()

    def both(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        out = self.layers(torch.cat((x, t[:, None], s[:, None]), 1))
        return out[:, :4], out[:, 4]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.both(x, t, t)[0]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.both(x, t, s)[0]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.both(x, t, s)

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return z + 0.3 * self.both(z, torch.zeros_like(z[:, 0]), torch.zeros_like(z[:, 0]))[0]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Any:
        return Towards(self.both(x, t, s)[0])


class Towards:
    """A policy: dx/dt = (target - x), whose target the network gave."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.target - x

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return -torch.full_like(x[:, 0], x.shape[1])


def under_no_grad(method: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(method)


def under_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    return torch.inference_mode()(method)


def of_a_detached_point(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *times, cond=None: method(x.detach(), *(t.detach() for t in times), cond=cond)


def detached(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, cond: Any = None) -> Any:
        answer = method(*args, cond=cond)
        if isinstance(answer, Towards):
            return Towards(answer.target.detach())
        return tuple(part.detach() for part in answer) if isinstance(answer, tuple) else answer.detach()

    return call


def through_numpy(method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, cond: Any = None) -> Any:
        answer = detached(method)(*args, cond=cond)
        if isinstance(answer, Towards):
            return answer
        copied = [
            torch.from_numpy(part.numpy().copy())
            for part in (answer if isinstance(answer, tuple) else [answer])
        ]
        return tuple(copied) if isinstance(answer, tuple) else copied[0]

    return call


WHOLE = [under_no_grad, under_inference_mode, of_a_detached_point, detached, through_numpy]

PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda v: torch.cat((v[:, :1], v[:, 1:].detach()), 1),
    "stack": lambda v: torch.stack([v[:, 0], v[:, 1].detach(), v[:, 2], v[:, 3]], 1),
    "slice": lambda v: _assigned(torch.zeros_like(v), v, slice(1, None)),
    "slice of the answer": lambda v: _assigned(v.clone(), v, slice(0, 1)),
    "where": lambda v: torch.where(torch.arange(4) < 2, v, v.detach()),
    "sum": lambda v: 0.5 * v + 0.5 * v.detach(),
    "factor": lambda v: v * torch.sigmoid(v).detach(),
    "reordered": lambda v: torch.cat((v[:, :2], v[:, 2:].detach()), 1).flip(1).reshape(-1, 2, 2).flatten(1),
}


def _assigned(out: Tensor, v: Tensor, cut: slice) -> Tensor:
    keep = slice(0, 1) if cut.start else slice(1, None)
    out[:, keep] = v[:, keep]
    out[:, cut] = v[:, cut].detach()
    return out


DIFFERENTIATING = {
    "ode[solver=rk4,steps=2]": "velocity",
    "ode[solver=rk4,steps=2,trace=hutchinson]": "velocity",
    "ode[solver=rk4,steps=2,divergence=quadrature,nodes=5]": "velocity",
    "ode[solver=rk4,steps=2,divergence=quadrature,nodes=5,trace=hutchinson]": "velocity",
    "whitened-ode[solver=rk4,steps=2]": "velocity",
    "whitened-ode[solver=rk4,steps=2,trace=hutchinson,clock=stretched]": "velocity",
    "meanflow[steps=2]": "average_velocity",
    "meanflow[steps=2,trace=hutchinson]": "average_velocity",
    "flow-map-exact[steps=2]": "average_velocity",
    "generator": "generate",
    "pi-flow[jacobian=full]": "policy",
    "f2d2-corrected[steps=2]": "velocity",
    "f2d2-corrected[steps=2,trace=exact]": "velocity",
}
every_family = pytest.mark.parametrize("spec", DIFFERENTIATING)


def built(spec: str) -> Any:
    (estimator,) = parse_spec(spec)
    return estimator


def broken(method: str, cut: Callable[..., Any]) -> Any:
    model = with_moments(Net(), _moments())
    object.__setattr__(model, method, cut(getattr(model, method)))
    return model


def _moments() -> Any:
    from flowlik_models.interfaces import Moments

    found = moments_of(spd(4))
    return Moments(found.mean, found.eigenvalues, found.eigenvectors, "")


@every_family
@pytest.mark.parametrize("cut", WHOLE)
@pytest.mark.parametrize("batch", [1, 5])
def test_an_answer_without_a_graph_is_an_error_that_names_the_method_and_the_cure(
    spec: str, cut: Callable[..., Any], batch: int
) -> None:
    method = DIFFERENTIATING[spec]
    with pytest.raises(
        ValueError, match=rf"the model's {method} cannot be differentiated.*remove torch.no_grad"
    ) as error:
        built(spec).log_prob(broken(method, cut), points(batch, 4))
    assert "\n" not in str(error.value)


@every_family
@pytest.mark.parametrize("way", PARTS)
def test_an_answer_of_which_a_part_is_cut_is_an_error(spec: str, way: str) -> None:
    method = DIFFERENTIATING[spec]

    def cut(call: Callable[..., Any]) -> Callable[..., Any]:
        def broken_call(*args: Any, cond: Any = None) -> Any:
            answer = call(*args, cond=cond)
            return Towards(PARTS[way](answer.target)) if method == "policy" else PARTS[way](answer)

        return broken_call

    with pytest.raises(
        ValueError, match=rf"the model's {method} cannot be differentiated: part of its answer"
    ):
        built(spec).log_prob(broken(method, cut), points(3, 4))


@pytest.mark.parametrize("cut", WHOLE)
def test_a_joint_map_is_an_error_only_where_the_part_that_is_cut_is_differentiated(
    cut: Callable[..., Any],
) -> None:
    model, x = broken("joint", cut), points(3, 4)
    assert get("f2d2", steps=2).log_prob(model, x).status == "ok"
    with pytest.raises(ValueError, match="average divergence"):
        get("f2d2-corrected", steps=1).log_prob(model, x)
    with pytest.raises(ValueError, match="average divergence"):
        get("self-guidance").sample(model, 3, dtype=torch.float64)
    assert get("self-guidance", direction="prior").sample(model, 3, dtype=torch.float64).status == "ok"


def test_a_head_on_detached_features_is_an_error_of_the_head_alone() -> None:
    class Headed(Net):
        def both(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            u, _ = super().both(x, t, s)
            return u, u.detach().square().sum(1)

    assert get("meanflow").log_prob(Headed(), points(3, 4)).status == "ok"
    with pytest.raises(ValueError, match="average divergence"):
        get("f2d2-corrected", steps=1).log_prob(Headed(), points(3, 4))


def test_a_callers_gradient_through_a_cut_model_is_an_error_though_its_parameters_have_one() -> None:
    x = points(3, 4).requires_grad_()
    with pytest.raises(ValueError, match="velocity cannot be differentiated"):
        get("ode", solver="rk4", steps=2).log_prob(
            broken("velocity", of_a_detached_point), x, differentiable=True
        )
    out = get("f2d2", steps=2).log_prob(broken("joint", of_a_detached_point), x, differentiable=True)
    with pytest.raises(ValueError, match="joint"):
        out.log_prob.sum().backward()


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("peer", ["flow-matching", "zuko", "torchode"])
@pytest.mark.parametrize("cut", [*WHOLE, "part"])
def test_public_libraries_get_the_same_error(peer: str, trace: str, cut: Any) -> None:
    estimator = get(f"peer-{peer}", trace=trace)
    if (why := estimator.unavailable()) is not None:
        pytest.skip(why)

    def part(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, t, *, cond=None: PARTS["cat"](method(x, t, cond=cond))

    with pytest.raises(ValueError, match="velocity cannot be differentiated"):
        estimator.log_prob(broken("velocity", part if cut == "part" else cut), points(3, 4))


def test_samples_with_their_density_are_an_error_too_and_without_it_are_not() -> None:
    model = broken("velocity", under_no_grad)
    estimator = get("ode", solver="euler", steps=2)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        estimator.sample(model, 3, dtype=torch.float64)
    assert estimator.sample(model, 3, dtype=torch.float64, log_prob=False).status == "ok"


CONSTANTS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "one": (lambda x, t: torch.ones_like(x), 0.0),
    "of time": (lambda x, t: t[:, None].expand_as(x).clone(), 0.0),
    "of the row's condition": (lambda x, t, c: c[:, None] * torch.ones_like(x), 0.0),
    "a padded coordinate": (lambda x, t: torch.cat((x[:, :3], torch.zeros_like(x[:, 3:])), 1), 3.0),
    "padded by a function": (lambda x, t: nn.functional.pad(x[:, :3], (0, 1)), 3.0),
    "an assigned coordinate": (lambda x, t: _three_of(x), 3.0),
    "a masked one": (lambda x, t: torch.where(torch.arange(4) < 3, x, torch.ones_like(x)), 3.0),
    "a shift and a factor of time": (lambda x, t: x * t[:, None] + 0.5 * t[:, None] + 1.0, 2.0),
    "the point itself": (lambda x, t: x, 4.0),
    "a step": (lambda x, t: x + torch.tensor(0.5, dtype=x.dtype), 4.0),
}


def _three_of(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :3] = x[:, :3]
    return out


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
@pytest.mark.parametrize("kind", CONSTANTS)
def test_what_really_is_constant_has_divergence_nought(kind: str, trace: str, batch: int) -> None:
    function, divergence = CONSTANTS[kind]
    model = Field(function, 4)
    cond = torch.arange(batch, dtype=torch.float64) if "condition" in kind else None
    estimator = get("ode", solver="midpoint", steps=40, trace=trace)
    out = estimator.log_prob(model, points(batch, 4), cond=cond)
    x0, *_ = estimator._solved(
        model, points(batch, 4), _run(estimator, model, batch, cond), start=1.0, end=0.0, log_prob=False
    )
    prior = -0.5 * x0.square().sum(1) - 2 * math.log(2 * math.pi)
    torch.testing.assert_close(out.log_prob, prior - divergence, rtol=0, atol=1e-9)


def _run(estimator: Any, model: Any, batch: int, cond: Any) -> Any:
    return estimator._run(model, points(batch, 4), cond, None, None, False)


SHIPPED = {
    ("digits", "teacher"): ("velocity", "ode[solver=euler,steps=2,trace=hutchinson]", 1.0),
    ("digits", "meanflow"): ("average_velocity", "meanflow[trace=hutchinson]", 1.0),
    ("gmm-2d", "meanflow-f2d2"): (
        "joint",
        "f2d2-corrected[steps=1]",
        5 / 9,
    ),  # the rest is asked for its velocity
    ("gmm-64d", "direct-f2d2"): ("average_velocity", "meanflow", 1.0),
    ("gmm-64d", "pi-flow-2"): ("policy", "pi-flow[segments=2,jacobian=full]", 1.0),
    ("gmm-2d", "realuid"): ("generate", "generator", 1.0),
}


@pytest.mark.parametrize(("task", "name"), SHIPPED)
def test_no_shipped_model_is_taken_for_cut_and_a_second_call_asks_for_nothing_beside_what_it_counts(
    task: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, spec, share = SHIPPED[task, name]
    model, rows = load_model(task, name), list[int]()
    bound = vars(model).get(method)  # of an instance, where not every one has it
    inside = method if bound is None else bound.__func__.__name__
    asked = getattr(type(model), inside)
    monkeypatch.setattr(
        type(model), inside, lambda self, x, *a, **k: rows.append(len(x)) or asked(self, x, *a, **k)
    )
    if bound is not None:
        object.__setattr__(model, method, getattr(model, inside))
    x = 0.5 * points(6, *model.event_shape, dtype=torch.float32)
    beside = []
    for _ in range(2):
        rows.clear()
        out = built(spec).log_prob(model, x)
        assert out.status == "ok"
        beside.append(sum(rows) - round(out.cost.forwards * 6 * share))
    figure(f"rows of {task} {name} asked beside those counted, first and second call", beside)
    assert beside[0] <= 5 * 8
    assert beside[1] == 0


@pytest.mark.parametrize("d", [2, 64])
def test_closed_forms_are_not_taken_for_cut_at_their_stiffest(d: int) -> None:
    values = torch.full((d,), 1e-4, dtype=torch.float64)
    model = Gaussian(points(d, seed=3), torch.diag(values))
    x = model.sample(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for spec in ("ode[trace=hutchinson]", "flow-map-exact[steps=2]", "generator", "pi-flow[jacobian=full]"):
        for dtype in (torch.float32, torch.float64):
            assert built(spec).log_prob(model, x.to(dtype)).status == "ok"


def test_a_policy_that_does_not_look_at_its_point_is_sound() -> None:
    policy = Towards(torch.zeros(5, 4, dtype=torch.float64))
    few = Towards(torch.zeros(1, 4, dtype=torch.float64))
    model = Field(lambda x, t: x, 4, policy=lambda x, t, s, *, cond=None: policy if len(x) == 5 else few)
    out = get("pi-flow", jacobian="full", substeps=8).log_prob(model, points(5, 4))
    assert out.status == "ok"
    assert out.cost.policy_calls % 4 == 0  # four a substep, and none for the look
