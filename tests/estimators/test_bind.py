"""An estimator bound to a model: the same answers, and a model that has changed since is told."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowlik_estimators import Estimator, get
from flowlik_models.adapters.wrap import wrap
from flowlik_models.synthetic import closed_form
from flowlik_models.zoo import load_model


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

        self.enclosed, self.swap = (lambda x: net(x)), swap

    offset: Tensor

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        more = self.enclosed(self.named["other"](self.others[0](x)))
        value: Tensor = self.strength * self.part(torch.cat([x, t[:, None]], 1)) + self.offset + more
        return torch.where(x.abs().amax(1, keepdim=True) > 50, torch.nan, value)


@pytest.fixture
def own() -> Own:
    torch.manual_seed(0)
    return Own().eval()


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
