"""An estimator bound to a model: the same answers, and a model that has changed since is told."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowlik_estimators import Estimator, get
from flowlik_models.adapters.wrap import wrap
from flowlik_models.synthetic import closed_form
from flowlik_models.zoo import load_model

HELD = nn.Linear(2, 2).eval()


class Own(nn.Module):
    """A network of one's own: weights, a buffer, a part, an attribute, and a note of its calls."""

    event_shape = (2,)

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2))
        self.register_buffer("offset", torch.zeros(2))
        self.strength, self.calls = 1.0, 0
        self.others, self.named = [nn.Linear(2, 2)], {"other": nn.Linear(2, 2)}
        net = nn.Linear(2, 2)

        def swap() -> None:
            nonlocal net
            net = nn.Linear(2, 2)

        def scaled(x: Tensor, k: float = 1.0) -> Tensor:
            return k * net(x)

        self.enclosed, self.swap = (lambda x: net(x)), swap
        self.scaled, self.partial = scaled, functools.partial(torch.mul, other=torch.ones(()))
        self.numbers, self.later, self.table = [1.0], [torch.sin], {"factors": {"one": 1.0}}

    offset: Tensor

    def shifted(self, x: Tensor) -> Tensor:
        return x

    def held(self, x: Tensor, net: Callable[[Tensor], Tensor] = HELD) -> Tensor:
        return net(x)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        more = self.enclosed(self.named["other"](self.others[0](x))) + self.held(x) + self.scaled(x)
        more = (
            self.later[0](self.partial(self.shifted(more))) * self.numbers[0] * self.table["factors"]["one"]
        )
        value: Tensor = self.strength * self.part(torch.cat([x, t[:, None]], 1)) + self.offset + more
        return torch.where(x.abs().amax(1, keepdim=True) > 50, torch.nan, value)


@pytest.fixture
def own() -> Own:
    """Of a class of its own, which a test may change."""
    torch.manual_seed(0)
    kind = type("Kind", (Own,), {name: vars(Own)[name] for name in ("velocity", "held")})
    model = kind().eval()
    assert isinstance(model, Own)
    return model


def assert_same(estimator: Estimator, model: Any, x: Tensor, **given: Any) -> None:
    bound, model = estimator.bind(model), copy.deepcopy(model)
    for _ in range(2):  # the second time nothing is looked at for the first time
        ours = bound.log_prob(x, generator=torch.Generator().manual_seed(3), **given)
        theirs = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(3), **given)
        torch.testing.assert_close(ours.log_prob, theirs.log_prob, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(ours.valid, theirs.valid)
        assert (ours.status, ours.reason) == (theirs.status, theirs.reason)
        for name in ("forwards", "vjps", "accepted_steps"):
            a, b = (torch.as_tensor(getattr(out.cost, name)) for out in (ours, theirs))
            assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("f2d2", {"steps": 2}),
        ("ode", {"solver": "heun", "steps": 3}),
        ("ode", {"trace": "hutchinson", "rtol": 1e-2, "atol": 1e-2}),
    ],
)
def test_a_bound_estimator_answers_bit_for_bit_the_same_at_the_same_cost(name: str, options: Any) -> None:
    model = load_model("gmm-2d", "direct-f2d2")
    assert_same(get(name, **options), model, torch.randn(5, 2), items=torch.arange(7, 12))


def test_rows_that_fail_are_set_aside_and_charged_as_before(own: Own) -> None:
    x = torch.randn(20, 2)
    x[3] = 100.0
    assert_same(get("ode", rtol=1e-2, atol=1e-2), own, x)


def test_what_a_call_notes_on_the_model_is_no_change(own: Own) -> None:
    bound = get("ode", solver="euler", steps=4).bind(own)
    for _ in range(2):
        bound.log_prob(torch.zeros(1, 2))
    assert own.calls >= 8


def test_what_a_call_notes_on_a_model_that_is_no_module_is_no_change() -> None:
    class Plain:
        event_shape = (2,)
        factor: float | None = None

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            self.factor = 2.0 if self.factor is None else self.factor  # a table that is made once, say
            return -self.factor * x

    model = Plain()
    bound = get("ode", solver="euler", steps=4).bind(model)
    first, second = (bound.log_prob(torch.ones(1, 2)).log_prob for _ in range(2))
    assert torch.equal(first, second)
    model.factor = 3.0
    with pytest.raises(ValueError, match="a part or an attribute"):
        bound.log_prob(torch.ones(1, 2))


@pytest.mark.parametrize("guidance", [None, 0.0, 2.0])
def test_a_guided_field_is_bound_as_it_is_estimated(guidance: float | None) -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field, self.table = nn.Linear(2, 2), nn.Embedding(3, 2)

        def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
            value: Tensor = self.field(x) + self.table(label)
            return value

    torch.manual_seed(0)
    model = wrap(Labelled().eval(), event_shape=(2,), predicts="velocity", null=2)
    estimator = get("ode", solver="rk4", steps=2, guidance=guidance)
    assert_same(estimator, model, torch.randn(3, 2), cond=torch.tensor([0, 1, 0]))
    bound = estimator.bind(model)
    with torch.no_grad():
        model.network.net.table.weight.mul_(2.0)
    with pytest.raises(ValueError, match="its weights"):
        bound.log_prob(torch.zeros(1, 2), cond=torch.tensor([0]))


def away(self: Any, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
    return -x


class Away(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return -x


def _step(model: Own) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model.velocity(torch.ones(1, 2), torch.ones(1)).sum().backward()
    optimiser.step()


CHANGES: dict[str, tuple[Callable[[Own], object], str]] = {
    "a step of an optimiser": (_step, "its weights"),
    "load_state_dict": (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())), "its weights"),
    "a buffer in place": (lambda m: m.offset.add_(1.0), "its weights"),
    "another parameter": (lambda m: setattr(m.part[0], "bias", nn.Parameter(torch.ones(8))), "a part"),
    "another layer": (lambda m: m.part.__setitem__(2, nn.SiLU()), "a part"),
    "another attribute": (lambda m: setattr(m, "strength", 2.0), "an attribute"),
    "another network in a list": (lambda m: m.others.__setitem__(0, nn.Linear(2, 2)), "a part"),
    "another network in a dict": (lambda m: m.named.update(other=nn.Linear(2, 2)), "a part"),
    "another network in a closure": (lambda m: m.swap(), "a part"),
    "a layer's setting": (lambda m: setattr(m.part[1], "p", 0.1), "an attribute"),
    "a layer's forward": (lambda m: setattr(m.part[2], "forward", torch.sin), "an attribute"),
    "training mode": (lambda m: m.train(), "its mode"),
    "training mode of a part": (lambda m: m.part[1].train(), "its mode"),
    "another device": (lambda m: m.to("meta"), "its device"),
    "another type": (lambda m: m.double(), "its type"),
    "another velocity of its class": (lambda m: setattr(type(m), "velocity", away), "a class, a function"),
    "another velocity of a base": (
        lambda m: [delattr(type(m), "velocity"), setattr(type(m), "velocity", away)],
        "a class, a function",
    ),
    "a divergence of its class": (lambda m: setattr(type(m), "divergence", away), "a class, a function"),
    "one time a call": (lambda m: setattr(type(m), "scalar_time", True), "a class, a function"),
    "another class": (lambda m: setattr(m, "__class__", type("Other", (Own,), {})), "a class, a function"),
    "another class of a part": (lambda m: setattr(m.others[0], "__class__", Away), "a class, a function"),
    "a method that holds a network": (lambda m: setattr(type(m), "held", torch.neg), "a class, a function"),
    "its own velocity": (lambda m: setattr(m, "velocity", functools.partial(away, m)), "an attribute"),
    "a function's default": (lambda m: setattr(m.scaled, "__defaults__", (2.0,)), "a class, a function"),
    "an argument of a partial": (lambda m: m.partial.keywords.update(other=torch.zeros(())), "a part"),
    "a number in a list": (lambda m: m.numbers.__setitem__(0, 2.0), "a part"),
    "a number in a nested dict": (lambda m: m.table["factors"].update(one=2.0), "a part"),
    "a first network in a list": (lambda m: m.later.__setitem__(0, nn.Dropout(0.5)), "a part"),
    "other memory": (
        lambda m: setattr(m.part[0].weight, "data", torch.ones(8, 3)),
        "its weights lie elsewhere",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_told_and_bound_again_answers_anew(own: Own, change: str) -> None:
    estimator, x = get("ode", solver="euler", steps=2), torch.zeros(1, 2)
    bound = estimator.bind(own)
    bound.log_prob(x)
    act, what = CHANGES[change]
    act(own)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"changed after it was bound \(.*{what}.*\): bind it again"):
            bound.log_prob(x)
    if change not in ("another device", "another type"):
        assert torch.equal(estimator.bind(own).log_prob(x).log_prob, estimator.log_prob(own, x).log_prob)


LOOKED_UP: dict[str, Callable[[Own], object]] = {
    "a hook": lambda m: m.part.register_forward_hook(lambda module, args, out: 2 * out),
    "a hook before": lambda m: m.others[0].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "a method of its class": lambda m: setattr(type(m), "shifted", lambda self, x: x + 1),
    "a property of its class": lambda m: setattr(type(m), "offset", property(lambda self: torch.ones(2))),
}


@pytest.mark.parametrize("change", LOOKED_UP)
def test_what_is_looked_up_as_the_model_is_called_is_answered_for(own: Own, change: str) -> None:
    estimator, x = get("ode", solver="euler", steps=2), torch.ones(2, 2)
    bound = estimator.bind(own)
    before = bound.log_prob(x).log_prob
    LOOKED_UP[change](own)
    now = bound.log_prob(x).log_prob
    assert not torch.equal(now, before)
    assert torch.equal(now, estimator.log_prob(own, x).log_prob)


@pytest.mark.parametrize("number_type", [torch.float64, torch.bfloat16])
def test_torch_default_type_and_autocast_are_those_of_the_call(number_type: torch.dtype) -> None:
    torch.manual_seed(0)
    model = wrap(
        nn.Linear(2, 2).eval(), event_shape=(2,), predicts="velocity", call=lambda net, z, u, c: net(z)
    )
    estimator, x = get("ode", solver="euler", steps=2), torch.ones(2, 2)
    bound, default = estimator.bind(model), torch.get_default_dtype()
    bound.log_prob(x)
    try:
        if number_type == torch.float64:
            torch.set_default_dtype(number_type)
        with torch.autocast("cpu", torch.bfloat16, enabled=number_type == torch.bfloat16):
            assert torch.equal(bound.log_prob(x).log_prob, estimator.log_prob(model, x).log_prob)
    finally:
        torch.set_default_dtype(default)


SLIP = {"now": "none"}


class Slipping:
    """A model that a global variable changes."""

    event_shape = (2,)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        if SLIP["now"] == "has no graph":
            return torch.stack([-x[:, 0].detach(), -x[:, 1]], 1)
        if SLIP["now"] == "in place":
            x.data.sub_(0.1)
        return -x


@pytest.mark.parametrize("slip", ["has no graph", "in place"])
def test_every_call_looks_as_closely_as_the_first(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = get("ode", solver="euler", steps=2).bind(Slipping())
    assert bound.log_prob(torch.ones(2, 2)).status == "ok"
    monkeypatch.setitem(SLIP, "now", slip)
    with pytest.raises(ValueError, match=slip):
        bound.log_prob(torch.ones(2, 2))


def test_a_network_of_the_suite_that_changed_is_told() -> None:
    model = copy.deepcopy(load_model("gmm-2d", "direct-f2d2"))
    bound = get("f2d2", steps=1).bind(model)
    bound.log_prob(torch.zeros(1, 2))
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(ValueError, match="its weights"):
        bound.log_prob(torch.zeros(1, 2))


def test_misuse_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="f2d2 needs a joint flow map"):
        get("f2d2").bind(closed_form("gmm-64d"))
    bound = get("f2d2").bind(closed_form("gaussian-2d"))
    with pytest.raises(ValueError, match="x must have shape"):
        bound.log_prob(torch.zeros(1, 3))


NET = nn.Linear(2, 2)


def test_a_network_in_a_global_variable_is_no_change_and_its_weights_through_data_are_answered_for() -> None:
    model = wrap(lambda z, u: u[:, None] * NET(z), event_shape=(2,))
    estimator, x = get("ode", solver="euler", steps=2), torch.ones(3, 2)
    bound = estimator.bind(model)
    first = bound.log_prob(x).log_prob
    NET.weight.data.mul_(2.0)
    assert NET.training
    assert torch.equal(bound.log_prob(x).log_prob, estimator.log_prob(model, x).log_prob)
    assert not torch.equal(bound.log_prob(x).log_prob, first)


def test_another_network_in_a_global_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = get("ode", solver="euler", steps=2).bind(wrap(lambda z, u: u[:, None] * NET(z), event_shape=(2,)))
    monkeypatch.setitem(globals(), "NET", nn.Dropout(0.5))
    with pytest.raises(ValueError, match="a global network"):
        bound.log_prob(torch.ones(3, 2))
