"""Wrong kinds of answer, of event shape and of condition are errors that name what came and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field, LinearMap, points, spd, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_models.closed_forms.gaussian import Gaussian


@dataclass
class Output:
    """What some libraries' networks answer with."""

    sample: Tensor


WRONG: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "tuple": (lambda v: (v, v), "a tuple of 2, expected a tensor"),
    "tuple of one": (lambda v: (v,), "a tuple of 1"),
    "list": (lambda v: [v], "a list of 1"),
    "dict": (lambda v: {"velocity": v}, "a dict of velocity"),
    "object": (Output, r"an object of Output \(return its \.sample\)"),
    "none": (lambda v: None, "None, expected a tensor of shape"),
    "numpy": (lambda v: v.detach().numpy(), "an object of ndarray"),
    "number": (lambda v: 0.5, "an object of float"),
    "complex": (lambda v: v + 0j, "a tensor of complex128 of shape"),
    "integer": (lambda v: v.long(), "a tensor of int64 of shape"),
    "boolean": (lambda v: v > 0, "a tensor of bool of shape"),
    "shape": (lambda v: v[:, :1], r"has shape \(4, 1\), expected \(4, 3\)"),
    "rows": (lambda v: v[:1], r"has shape \(1, 3\), expected \(4, 3\)"),
    "rank": (lambda v: v[..., None], r"has shape \(4, 3, 1\), expected \(4, 3\)"),
    "device": (lambda v: v.to("meta"), "is on meta, expected it on cpu"),
}
FAMILIES = {
    "ode[solver=euler,steps=1]": "velocity",
    "ode[solver=euler,steps=1,trace=hutchinson]": "velocity",
    "ode[solver=euler,steps=1,trace=closed]": "velocity",
    "meanflow[steps=1]": "average_velocity",
    "flow-map-exact[steps=1]": "average_velocity",
    "f2d2[steps=1]": "joint",
    "f2d2-corrected[steps=1]": "joint",
    "generator": "generate",
    "generator[route=own-samples]": "generate",
}


class Gauss(Gaussian):
    """A closed form of which one method can be replaced."""

    velocity_and_divergence = property()  # type: ignore[assignment]


def _broken(method: str, wrong: Callable[[Tensor], Any]) -> Any:
    model = Gauss(points(3, seed=3), spd(3))
    asked = getattr(model, method)

    def call(*args: Any, cond: Any = None) -> Any:
        answer = asked(*args, cond=cond)
        return (wrong(answer[0]), answer[1]) if method == "joint" else wrong(answer)

    object.__setattr__(model, method, call)
    return model


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("spec", FAMILIES)
def test_a_wrong_kind_of_answer_is_named_beside_what_was_expected(spec: str, kind: str) -> None:
    wrong, message = WRONG[kind]
    (estimator,) = parse_spec(spec)
    method = FAMILIES[spec]
    noun = {"average_velocity": "average velocity", "joint": "average velocity"}.get(method, method)
    expected = pytest.raises(ValueError, match=f"the model's {noun}.*{message}")
    with expected as error:
        _asked(estimator, spec, _broken(method, wrong))
    assert "\n" not in str(error.value)


def _asked(estimator: Any, spec: str, model: Any) -> None:
    if spec.startswith("generator["):
        estimator.sample(model, 4, dtype=torch.float64)
    elif spec == "generator":  # its bank has other rows
        with pytest.raises(ValueError, match="the model's generate") as error:
            estimator.log_prob(model, points(4, 3))
        raise ValueError(str(error.value).replace("1024", "4"))
    else:
        estimator.log_prob(model, points(4, 3))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda u: u,
            "a tensor of float64 of shape .*, expected a pair of tensors, average velocity and average divergence",
        ),
        (lambda u: (u, u[:, 0], u), "a tuple of 3"),
        (lambda u: {"u": u, "div": u[:, 0]}, "a dict of u, div"),
        (lambda u: (u, u), r"average divergence has shape \(4, 3\), expected \(4,\)"),
        (lambda u: (u, u[:, :1]), r"average divergence has shape \(4, 1\), expected \(4,\)"),
        (lambda u: (u, None), "average divergence answered None"),
        (lambda u: None, "None"),
    ],
)
def test_a_joint_map_that_answers_no_pair_is_an_error(answer: Callable[[Tensor], Any], message: str) -> None:
    model = LinearMap(stable_matrix(3))
    model.joint = lambda x, t, s, *, cond=None: answer(x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=message):
        get("f2d2", steps=1).log_prob(model, points(4, 3))


@pytest.mark.parametrize("wrong", [None, 3.0, (1, 2), SimpleNamespace(velocity=lambda x, t: x)])
def test_a_policy_that_cannot_be_followed_is_an_error(wrong: Any) -> None:
    model = Gauss(points(3, seed=3), spd(3))
    object.__setattr__(model, "policy", lambda x, t, s, *, cond=None: wrong)
    with pytest.raises(
        ValueError, match=r"the model's policy answered .* expected an object with the methods"
    ):
        get("pi-flow").log_prob(model, points(4, 3))


@pytest.mark.parametrize("wrong", [lambda x: None, lambda x: x.long(), lambda x: x[:1], lambda x: (x, x)])
def test_a_policys_answer_of_the_wrong_kind_is_an_error(wrong: Callable[[Tensor], Any]) -> None:
    policy = SimpleNamespace(velocity=lambda x, t: wrong(x), divergence=lambda x, t: x[:, 0])
    model = Field(lambda x, t: x, 3, policy=lambda x, t, s, *, cond=None: policy)
    with pytest.raises(ValueError, match="the policy's velocity"):
        get("pi-flow").log_prob(model, points(4, 3))
    with pytest.raises(ValueError, match="the policy's velocity"):
        get("pi-flow").sample(model, 4, log_prob=False)


@pytest.mark.parametrize("shape", [(), (0,), 2, None, "32", (2.0,), (True,), (-1,), (2, None), [], {2}, 2.5])
def test_an_event_shape_that_is_none_is_an_error(shape: Any) -> None:
    model = Field(lambda x, t: x)
    model.event_shape = shape
    for call in (lambda: get("ode").log_prob(model, points(4, 2)), lambda: get("ode").sample(model, 4)):
        with pytest.raises(
            ValueError, match=r"event_shape must be a tuple of positive whole numbers.*, got "
        ):
            call()


@pytest.mark.parametrize("shape", [(2,), [2], torch.Size([2]), (np.int64(2),)])
def test_an_event_shape_may_be_any_sequence_of_whole_numbers(shape: Any) -> None:
    model = Field(lambda x, t: x)
    model.event_shape = shape
    assert get("ode", solver="euler", steps=1).log_prob(model, points(4, 2)).status == "ok"
    assert get("ode", solver="euler", steps=1).sample(model, 4).status == "ok"


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ([1, 2, 3, 4], "cond is a list of 4, expected a tensor or a dict of tensors with 4 rows"),
        ((torch.zeros(4),), "cond is a tuple of 1"),
        (np.zeros(4), "cond is an object of ndarray"),
        ("cat", "cond is an object of str"),
        (3, "cond is an object of int"),
        (torch.tensor(1.0), "cond has no rows, x has 4"),
        (torch.zeros(3), "cond has 3 rows, x has 4"),
        ({"label": torch.zeros(3)}, r"cond\['label'\] has 3 rows, x has 4"),
        ({"label": [1, 2, 3, 4]}, r"cond\['label'\] is a list of 4, expected a tensor with 4 rows"),
        ({"label": np.zeros(4)}, r"cond\['label'\] is an object of ndarray"),
        ({"label": None}, r"cond\['label'\] is None"),
    ],
)
def test_a_condition_of_the_wrong_kind_is_an_error(cond: Any, message: str) -> None:
    model = Field(lambda x, t, c: x)
    with pytest.raises(ValueError, match=message):
        get("ode").log_prob(model, points(4, 2), cond=cond)
    with pytest.raises(ValueError, match=message):
        get("ode").sample(model, 4, cond=cond)


class Conditional:
    """A linear field with the rate and the shift of the row's own condition."""

    event_shape = (3,)

    def __init__(self, by_name: bool) -> None:
        self.by_name = by_name

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        rate, shift = (cond["rate"], cond["shift"]) if self.by_name else cond.unbind(1)
        return x.sin() * rate[:, None] + shift[:, None]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Tensor:
        return self.velocity(x, t, cond=cond)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        u = self.velocity(x, t, cond=cond)
        return u, x.cos().sum(1) * (cond["rate"] if self.by_name else cond[:, 0])

    def generate(self, z: Tensor, *, cond: Any = None) -> Tensor:
        return z + 0.3 * self.velocity(z, z[:, 0], cond=cond)


@pytest.mark.parametrize(
    "spec",
    [
        "ode",
        "ode[solver=rk4,steps=2,trace=hutchinson]",
        "ode[divergence=quadrature,rtol=1e-6,atol=1e-6]",
        "ode[solver=rk4,steps=4,divergence=quadrature,trace=hutchinson,nodes=5,allocation=uniform]",
        "meanflow",
        "flow-map-exact",
        "f2d2",
        "f2d2-corrected",
        "generator",
    ],
)
def test_a_dict_of_tensors_is_a_condition_that_follows_its_rows(spec: str) -> None:
    (estimator,) = parse_spec(spec)
    x, table = points(5, 3), points(5, 2, seed=4)
    named = {"rate": table[:, 0], "shift": table[:, 1]}
    one = estimator.log_prob(Conditional(False), x, cond=table)
    two = estimator.log_prob(Conditional(True), x, cond=named)
    assert one.status == two.status == "ok"
    assert torch.equal(one.log_prob.nan_to_num(), two.log_prob.nan_to_num())
    rows = [
        estimator.log_prob(
            Conditional(True),
            x[i : i + 1],
            cond={name: value[i : i + 1] for name, value in named.items()},
            items=torch.tensor([i]),
        ).log_prob
        for i in range(5)
    ]
    torch.testing.assert_close(torch.cat(rows), two.log_prob, rtol=0, atol=1e-4)
    drawn = estimator.sample(Conditional(True), 5, cond=named, dtype=torch.float64)
    assert torch.equal(drawn.x, estimator.sample(Conditional(False), 5, cond=table, dtype=torch.float64).x)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_advice_for_a_half_precision_network_works(half: torch.dtype) -> None:
    class Network(nn.Linear):
        event_shape = (3,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return self(x)

    model, x = Network(3, 3).to(half), points(4, 3).to(half)
    estimator = get("ode", solver="rk4", steps=3)
    name = str(half).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"got torch\.{name}: use x\.float\(\), and model\.float\(\)"):
        estimator.log_prob(model, x)
    with pytest.raises(
        ValueError, match=rf"the model's parameters are {name}: .* model\.float\(\), and x\.float\(\)"
    ):
        estimator.log_prob(model, x.float())
    with pytest.raises(ValueError, match=rf"the model's parameters are {name}: .* model\.float\(\)"):
        estimator.sample(model, 4)
    out = estimator.log_prob(model.float(), x.float())
    assert out.status == "ok"
    assert estimator.sample(model, 4).status == "ok"


def test_an_error_of_the_model_that_is_not_about_types_stays_as_it_is() -> None:
    class Network(nn.Linear):
        event_shape = (3,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            raise RuntimeError("the model's own")

    with pytest.raises(RuntimeError, match="the model's own"):
        get("ode").log_prob(Network(3, 3).double(), points(4, 3).float())
