"""A call leaves the model as it was, in every thread: modes, gradients, statistics and attributes of its own."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sizes import figure, size
from torch import Tensor, nn
from toy_flows import points

from flowlik_estimators import get
from flowlik_estimators.model_checks import stand_in

ODE = get("ode", solver="euler", steps=3)


class Net(nn.Module):
    """A field with dropout and batch norm."""

    event_shape = (3,)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.layers = nn.Sequential(*layers).double()
        self.calls = 0
        self.seen: list[tuple[bool, bool]] = []

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.seen.append((self.training, self.layers[0].weight.requires_grad))
        return self.layers(torch.cat((x, t[:, None]), 1))


class Wrapper:
    """A plain object around a network, which it reaches in one of many ways."""

    event_shape = (3,)

    def __init__(self, ask: Callable[..., Tensor], **held: Any) -> None:
        self.ask = ask
        self.__dict__.update(held)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.ask(x, t)


class Slotted:
    event_shape = (3,)
    __slots__ = ("net",)

    def __init__(self, net: Net) -> None:
        self.net = net

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.net.velocity(x, t)


def _local_class(net: Net) -> Any:
    class Local:
        event_shape = (3,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return net.velocity(x, t)

    return Local()


def _class_attribute(net: Net) -> Any:
    return type(
        "Held",
        (),
        {"event_shape": (3,), "net": net, "velocity": lambda self, x, t, cond=None: self.net.velocity(x, t)},
    )()


def _global(net: Net) -> Any:
    globals()["_NET"] = net
    return Wrapper(lambda x, t: _NET.velocity(x, t))  # type: ignore[name-defined] # noqa: F821


def _nested(net: Net) -> Any:
    inner = SimpleNamespace(parts=[{"net": (net,)}])
    return Wrapper(lambda x, t: inner.parts[0]["net"][0].velocity(x, t))


def _patched(net: Net) -> Any:
    net.velocity = functools.partial(Net.velocity, net)  # type: ignore[method-assign]
    return net


HOLDERS: dict[str, Callable[[Net], Any]] = {
    "itself": lambda net: net,
    "bound method": lambda net: Wrapper(net.velocity),
    "closure": lambda net: Wrapper(lambda x, t: net.velocity(x, t)),
    "partial": lambda net: Wrapper(functools.partial(Net.velocity, net)),
    "default": lambda net: Wrapper(lambda x, t, net=net: net.velocity(x, t)),
    "nested": _nested,
    "slots": Slotted,
    "local class": _local_class,
    "class attribute": _class_attribute,
    "global": _global,
    "method of an instance": _patched,
}
every_holder = pytest.mark.parametrize("holder", HOLDERS)


def _modes(net: Net) -> list[bool]:
    return [module.training for module in net.modules()]


def _expected(x: Tensor) -> Tensor:
    return ODE.log_prob(Net().eval(), x).log_prob


@every_holder
def test_a_call_evaluates_in_eval_mode_and_leaves_modes_statistics_and_gradients(holder: str) -> None:
    net = Net()
    net.layers[3].eval()
    modes, state = _modes(net), {name: value.clone() for name, value in net.state_dict().items()}
    model, x = HOLDERS[holder](net), points(6, 3)
    one, two = (ODE.log_prob(model, x) for _ in range(2))
    assert torch.equal(one.log_prob, two.log_prob)
    torch.testing.assert_close(one.log_prob, _expected(x), rtol=0, atol=1e-12)
    drawn = ODE.sample(model, 4, dtype=torch.float64, log_prob=False).x
    assert torch.equal(drawn, ODE.sample(model, 4, dtype=torch.float64, log_prob=False).x)
    assert _modes(net) == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert {mode for mode, _ in net.seen} == {False}
    assert (one.status, one.reason) == ("ok", None)


@every_holder
def test_modes_are_as_before_where_a_call_raises(holder: str) -> None:
    class Broken(Net):
        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            raise KeyError("a bug of the model")

    net = Broken()
    net.layers[1].eval()
    modes = _modes(net)
    model = HOLDERS[holder](net) if holder not in ("partial", "method of an instance") else net
    with pytest.raises(KeyError):
        ODE.log_prob(model, points(6, 3))
    assert _modes(net) == modes


def test_what_a_model_writes_to_itself_is_there_after_the_call() -> None:
    class Counting(Net):
        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            self.last = x
            self.count = self.count + 1
            return super().velocity(x, t)

    net = Counting()
    net.register_buffer("count", torch.zeros(()))
    ODE.log_prob(net, points(6, 3))
    assert (net.calls, int(net.count), len(net.seen)) == (3, 3, 3)
    assert net.last.shape == (6, 3)


def test_compiled_and_scripted_networks_are_held_in_eval_mode_and_put_back() -> None:
    net = Net()
    shared = stand_in.of(Wrapper(torch.compile(net.velocity, backend="eager"))).shared
    assert {type(module).__name__ for module in shared} >= {"Dropout", "BatchNorm1d"}
    script = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double().eval(), points(2, 3))
    script.train()
    model = Wrapper(lambda x, t: script(x))
    out = [ODE.log_prob(model, points(6, 3)).log_prob for _ in range(2)]
    assert torch.equal(*out)
    assert script.training


def test_a_differentiable_call_leaves_the_mode_and_says_which_it_was() -> None:
    net, x = Net(), points(6, 3)
    out = ODE.log_prob(net, x, differentiable=True)
    assert out.status == "ok"
    assert out.reason is not None
    assert "training mode (BatchNorm1d, Dropout)" in out.reason
    assert {mode for mode, _ in net.seen} == {True}
    net.eval()
    out = ODE.log_prob(net, x, differentiable=True)
    assert out.reason is None
    torch.testing.assert_close(out.log_prob, ODE.log_prob(net, x).log_prob, rtol=0, atol=1e-12)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)).double()
    assert ODE.log_prob(Wrapper(lambda x, t: plain(x)), x, differentiable=True).reason is None


@every_holder
def test_scoring_in_one_thread_takes_nothing_from_gradients_or_modes_in_another(holder: str) -> None:
    """Steps of training, the estimator's and plain ones, beside scores of the same network."""
    net = Net()
    net.layers[1].eval()  # statistics that a step of training moves would be others for each score
    modes, model, x = _modes(net), HOLDERS[holder](net), points(4, 3)
    expected = _expected(x)
    rounds, done, wrong = size(20, 150), threading.Event(), list[object]()

    def score() -> None:
        try:
            while not done.is_set():
                scored = ODE.log_prob(model, x).log_prob
                wrong.extend([scored] if not torch.allclose(scored, expected, rtol=0, atol=1e-9) else [])
        except Exception as error:
            wrong.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    lost = 0
    try:
        for k in range(rounds):
            net.zero_grad(set_to_none=True)
            loss = (
                ODE.log_prob(model, x, differentiable=True).log_prob if k % 2 else model.velocity(x, x[:, 0])
            ).sum()
            loss.backward()
            lost += sum(p.grad is None or not p.requires_grad for p in net.parameters()) > 0
            lost += holder not in SHARED and _modes(net) != modes
    finally:
        done.set()
        thread.join()
    figure(f"gradients lost of {rounds} beside scores, network held by {holder}", lost, "0")
    assert (lost, wrong) == (0, [])
    assert _modes(net) == modes


SHARED = ("slots", "class attribute", "global")
"""Networks that no stand-in can be made for: their modes are switched for a score."""


def test_what_another_thread_adds_to_meanwhile_does_not_disturb() -> None:
    net, x, done, errors = Net().eval(), points(4, 3), threading.Event(), list[Exception]()
    table: dict[str, int] = {}
    model = Wrapper(net.velocity, notes=(table, net.seen))

    def write() -> None:
        while not done.is_set():
            table[str(len(table) % 500)] = 1
            net.seen.append((False, False))
            del net.seen[500:]

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(40):
            stand_in.of(model)
    except Exception as error:
        errors.append(error)
    done.set()
    thread.join()
    assert errors == []
    assert ODE.log_prob(model, x).status == "ok"


def test_two_threads_lose_no_gradient_in_150_calls_and_score_right() -> None:
    net, x = Net().eval(), points(4, 3)
    expected = ODE.log_prob(net, x).log_prob
    done, wrong, scores = threading.Event(), list[object](), [0]

    def score() -> None:
        try:
            while not done.is_set():
                scores[0] += 1
                scored = ODE.log_prob(net, x).log_prob
                wrong.extend([] if torch.equal(scored, expected) else [scored])
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=score) for _ in range(2)]
    for thread in threads:
        thread.start()
    lost = 0
    for _ in range(150):
        net.zero_grad(set_to_none=True)
        ODE.log_prob(net, x, differentiable=True).log_prob.sum().backward()
        lost += any(parameter.grad is None for parameter in net.parameters())
    done.set()
    for thread in threads:
        thread.join()
    figure("gradients lost in 150 calls beside two scoring threads", lost, "0")
    assert (lost, wrong) == (0, [])
    assert scores[0] > 0


class Hooked(nn.Module):
    """A field read off by a hook, as features are, at a layer that is called in one of many ways."""

    event_shape = (2,)

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.Linear(2, 2).double()
        self.kept: dict[str, Tensor] = {}
        notes = {"method": self._note, "closure": lambda _, __, out: self.kept.update(seen=out)}
        layer.register_forward_hook(notes.get(way, self._note))
        self.weight = layer.weight
        self.net: Any = torch.compile(layer, backend="eager") if way == "compiled" else nn.Sequential(layer)

    def _note(self, _: nn.Module, __: Any, out: Tensor) -> None:
        self.kept["seen"] = out

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.net(x)
        return self.kept["seen"]


@pytest.mark.parametrize("way", ["method", "closure", "compiled"])
def test_what_a_hook_reads_off_is_of_this_call_and_not_of_an_earlier_one(way: str) -> None:
    model, x = Hooked(way), points(4, 2)
    model.velocity(torch.full((4, 2), 7.0, dtype=x.dtype), x[:, 0])
    out = get("ode", solver="euler", steps=1, trace="exact").log_prob(model, x)
    with torch.no_grad():
        z = x - model.net(x)
    truth = -0.5 * z.square().sum(1) - math.log(2 * math.pi) - model.weight.trace()
    torch.testing.assert_close(out.log_prob, truth.detach())
    assert model.training


def test_another_function_of_a_class_is_seen_by_the_next_call() -> None:
    net = nn.Linear(2, 2).double()

    class Field:
        event_shape = (2,)

        def field(self, x: Tensor) -> Tensor:
            return net(x)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return self.field(x)

    def other(self: Any, x: Tensor) -> Tensor:
        return 2.0 * net(x)

    class Other(Field):
        field = other

    x = points(4, 2)
    ODE.log_prob(Field(), x)
    Field.field = other  # type: ignore[method-assign]
    assert torch.equal(ODE.log_prob(Field(), x).log_prob, ODE.log_prob(Other(), x).log_prob)
