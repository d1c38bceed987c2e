"""The counter finds the networks itself: each way in which a field may reach them, and how many evaluations that is."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, stack_module_state, vmap
from toy_flows import Field, Linear, points, stable_matrix

from flowlik_estimators import Estimate, Estimator, Run, get
from flowlik_estimators.call import Samples
from flowlik_estimators.counting import Counts, counted
from flowlik_models.networks.vector import VectorFlowMap
from flowlik_models.synthetic import closed_form

BATCH, DIM = 5, 3


def mlp(width: int = 16, d: int = DIM) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(d + 1, width), nn.SiLU(), nn.Linear(width, d)).double()


class Net(nn.Module):
    """A network of x and t; ``width`` may be that of the point, where layers look like networks."""

    def __init__(self, width: int = DIM) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.event_shape = (DIM,)
        self.first = nn.Linear(DIM + 1, width).double()
        self.blocks = nn.ModuleList(nn.Linear(width, width).double() for _ in range(2))
        self.last = nn.Linear(width, DIM).double()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.first(torch.cat((x, t[:, None]), 1))
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        h = h if label is None else h + label
        answer: Tensor = self.last(h)
        return answer


class Module(nn.Module):
    """A field that is a module, made of parts and a function of them."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.event_shape = (DIM,)
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        return self.function(self, x, t)


class Plain:
    """The same without being a module."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        self.event_shape = (DIM,)
        self.function = function
        self.__dict__.update(parts)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        return self.function(self, x, t)


either = pytest.mark.parametrize("kind", [Module, Plain])


def evaluations(model: Any) -> tuple[float, float]:
    """Forwards and vector-Jacobian products of one evaluation with one product, per sample."""
    x, t = points(BATCH, DIM), torch.linspace(0.1, 0.9, BATCH, dtype=torch.float64)
    for _ in range(2):  # the second one knows more
        counts = Counts()
        model_seen = counted(model, counts)
        for _ in range(2):
            y = x.clone().requires_grad_()
            value = model_seen.velocity(y, t)
            torch.autograd.grad(value.sum(), y)
    cost = counts.per_sample(2 * BATCH)
    with torch.no_grad():
        torch.testing.assert_close(model_seen.velocity(x, t), model.velocity(x, t), rtol=0, atol=0)
    return float(cost.forwards), float(cost.vjps)


def cat(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat((x, t[:, None]), 1)


def guided(self: Any, x: Tensor, t: Tensor) -> Tensor:
    strong = self.net(x, t)
    return strong + 0.5 * (strong - self.net(x, 0.5 * t))


WAYS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]], int]] = {
    "one network": (lambda self, x, t: self.net(x, t), lambda: {"net": Net()}, 1),
    "one network twice": (guided, lambda: {"net": Net()}, 2),
    "by forward": (
        lambda self, x, t: self.net.forward(x, t) - self.net.forward(x, 0.5 * t),
        lambda: {"net": Net()},
        2,
    ),
    "two networks": (
        lambda self, x, t: self.strong(x, t) - self.weak(x, t),
        lambda: {"strong": Net(16), "weak": Net(8)},
        2,
    ),
    "a layer as a network": (
        lambda self, x, t: self.strong(x, t) - self.weak(x),
        lambda: {"strong": Net(16), "weak": nn.Linear(DIM, DIM).double()},
        2,
    ),
    "both in one batch": (
        lambda self, x, t: self.net(torch.cat((x, x)), torch.cat((t, t))).view(2, BATCH, DIM).mean(0),
        lambda: {"net": Net()},
        2,
    ),
    "of one tensor": (
        lambda self, x, t: self.net(cat(x, t)) + self.net(cat(0.9 * x, t)),
        lambda: {"net": mlp()},
        2,
    ),
    "in a list of modules": (
        lambda self, x, t: sum(net(x, t) for net in self.nets),
        lambda: {"nets": nn.ModuleList([Net(), Net(), Net(8)])},
        3,
    ),
    "in a dict of modules": (
        lambda self, x, t: self.nets["a"](x, t) + self.nets["b"](x, t),
        lambda: {"nets": nn.ModuleDict({"a": Net(), "b": Net(8)})},
        2,
    ),
    "in a plain list": (
        lambda self, x, t: self.nets[0](x, t) + self.nets[1](x, t),
        lambda: {"nets": [Net(), Net(8)]},
        2,
    ),
    "in a plain dict": (
        lambda self, x, t: self.nets["a"](x, t) + self.nets["b"](x, t),
        lambda: {"nets": {"a": Net(), "b": Net(8)}},
        2,
    ),
    "in a namespace": (
        lambda self, x, t: self.held.net(x, t) + self.held.net(x, t),
        lambda: {"held": SimpleNamespace(net=Net())},
        2,
    ),
    "as a partial": (
        lambda self, x, t: self.call(x, t=t) + self.call(x, t=t),
        lambda: {"call": partial(Net(), label=None)},
        2,
    ),
    "as a bound method": (
        lambda self, x, t: self.call(x, t) + self.call(x, t),
        lambda: {"call": Net().forward},
        2,
    ),
    "by functional_call": (
        lambda self, x, t: sum(
            functional_call(self.net, dict(self.net.named_parameters()), (x, t)) for _ in "ab"
        ),
        lambda: {"net": Net()},
        2,
    ),
    "by keyword": (
        lambda self, x, t: self.net(x=x, t=t) + self.net(t=t, x=x),
        lambda: {"net": Net()},
        2,
    ),
    "behind a change of the point": (
        lambda self, x, t: self.net((x - t[:, None]) / (1 + t[:, None]), t) + self.net(x.flip(1), t),
        lambda: {"net": Net()},
        2,
    ),
    "with an embedding of the label": (
        lambda self, x, t: (
            self.net(x, t, self.embed(torch.zeros(len(x), dtype=torch.int64))) + self.net(x, t)
        ),
        lambda: {"net": Net(16), "embed": nn.Embedding(3, 16).double()},
        2,
    ),
    "with an embedding of the time": (
        lambda self, x, t: self.net(x, t, self.embed(t[:, None])) + self.net(x, t),
        lambda: {"net": Net(16), "embed": nn.Linear(1, 16).double()},
        2,
    ),
    "a solver's step": (
        lambda self, x, t: self.net(x + 0.1 * self.net(x, t), t),
        lambda: {"net": Net()},
        2,
    ),
    "with a learned strength": (
        lambda self, x, t: self.strength * self.net(x, t) + self.net(x, 0.5 * t),
        lambda: {"net": Net(), "strength": nn.Parameter(torch.ones((), dtype=torch.float64))},
        2,
    ),
    "behind a shared layer": (
        lambda self, x, t: self.net(self.shared(x), t) + self.net(self.shared(x), 0.5 * t),
        lambda: {"net": Net(16), "shared": nn.Linear(DIM, DIM).double()},
        2,
    ),
    "composites of composites": (
        lambda self, x, t: self.pair.velocity(x, t) + self.pair(x, t) + self.net(x, t),
        lambda: {"pair": Pair(), "net": Net()},
        5,
    ),
    "models by their methods": (
        lambda self, x, t: self.a.velocity(x, t) + self.b.velocity(self.a.velocity(x, t), t),
        lambda: {"a": Linear(stable_matrix(DIM)), "b": Linear(stable_matrix(DIM, 1))},
        3,
    ),
    "layers": (
        lambda self, x, t: self.last(torch.tanh(self.first(x))),
        lambda: {"first": nn.Linear(DIM, DIM).double(), "last": nn.Linear(DIM, DIM).double()},
        1,
    ),
    "layers in a list": (
        lambda self, x, t: self.layers[1](torch.tanh(self.layers[0](cat(x, t)))),
        lambda: {"layers": [nn.Linear(DIM + 1, 8).double(), nn.Linear(8, DIM).double()]},
        1,
    ),
    "one layer several times": (
        lambda self, x, t: self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x))))),
        lambda: {"layer": nn.Linear(DIM, DIM).double()},
        1,
    ),
    "two heads of one trunk": (
        lambda self, x, t: self.shift(self.trunk(cat(x, t))) + self.gain(self.trunk(cat(x, t))) * x,
        lambda: {
            "trunk": nn.Linear(DIM + 1, DIM).double(),
            "shift": nn.Linear(DIM, DIM).double(),
            "gain": nn.Linear(DIM, DIM).double(),
        },
        1,
    ),
    "network behind an encoder": (
        lambda self, x, t: self.decode(self.net(self.encode(x), t)),
        lambda: {
            "encode": nn.Linear(DIM, DIM).double(),
            "net": Net(8),
            "decode": nn.Linear(DIM, DIM).double(),
        },
        1,
    ),
    "no network": (lambda self, x, t: torch.tanh(x) * t[:, None], dict, 1),
}


class Pair(nn.Module):
    """Two networks as one module, which is a field itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Net(), Net(8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = self.left(x, t) - self.right(x, t)
        return answer

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        return self.forward(x, t)


@either
@pytest.mark.parametrize("way", list(WAYS))
def test_every_evaluation_of_a_network_is_counted(kind: Any, way: str) -> None:
    function, parts, expected = WAYS[way]
    assert evaluations(kind(function, **parts())) == (expected, expected)


GLOBAL_NET = Net()


def by_a_global(x: Tensor, t: Tensor) -> Tensor:
    answer: Tensor = GLOBAL_NET(x, t) + GLOBAL_NET.forward(x, 0.5 * t)
    return answer


def test_networks_that_only_functions_hold_are_counted() -> None:
    net = Net()

    def enclosed(x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = net(x, t)
        return value

    def default(x: Tensor, t: Tensor, inner: Any = net) -> Tensor:
        value: Tensor = inner(x, t) - inner(x, 0.5 * t)
        return value

    class Enclosing:
        event_shape = (DIM,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            value: Tensor = net(x, t) + enclosed(x, t)
            return value

    assert evaluations(Field(enclosed, DIM)) == (1, 1)
    assert evaluations(Field(lambda x, t: enclosed(x, t) + enclosed(x, 0.5 * t), DIM)) == (2, 2)
    assert evaluations(Field(default, DIM)) == (2, 2)
    assert evaluations(Field(by_a_global, DIM)) == (2, 2)
    assert evaluations(Enclosing()) == (2, 2)


@either
@pytest.mark.parametrize(
    "names", [["net"], ("net",), "net", {"net"}, {"net": 1}.keys()], ids=lambda names: type(names).__name__
)
def test_declared_networks_are_counted_however_they_are_named_and_called(kind: Any, names: Any) -> None:
    def velocity(self: Any, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = self.net(x, t) + self.net.forward(x, 0.5 * t) + self.other(x)
        return value

    model = kind(velocity, net=Net(), other=nn.Linear(DIM, DIM).double())
    assert evaluations(model) == (3, 3)
    model.networks = names
    assert evaluations(model) == (2, 2)
    model.networks = ()
    assert evaluations(model) == (1, 1)


def test_declared_networks_may_be_collections_paths_or_themselves() -> None:
    def velocity(self: Any, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = self.nets[1](self.nets[0](x, t), t)
        return value

    for kind in (Module, Plain):
        for nets in (nn.ModuleList([Net(), Net(8)]), [Net(), Net(8)]):
            assert evaluations(kind(velocity, nets=nets)) == (1, 1)
            assert evaluations(kind(velocity, nets=nets, networks=("nets",))) == (2, 2)
            assert evaluations(kind(velocity, nets=nets, networks=list(nets))) == (2, 2)
    pair = Pair()
    model = Plain(lambda self, x, t: self.pair.left(x, t) * self.pair.right(x, t), pair=pair)
    model.networks = ("pair.left",)  # type: ignore[attr-defined]
    assert evaluations(model) == (1, 1)


def test_declared_networks_within_declared_networks_are_counted() -> None:
    class Inner(nn.Module):
        networks = ["a", "b"]  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Net(), Net(8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            answer: Tensor = self.b(self.a.forward(x, t), t)
            return answer

    model = Module(lambda self, x, t: self.one(x, t) + self.two(x, t), one=Inner(), two=Inner())
    assert evaluations(model) == (4, 4)
    model.networks = ["one", "two"]  # type: ignore[assignment]
    assert evaluations(model) == (4, 4)


def test_declared_functions_are_counted() -> None:
    matrix = stable_matrix(DIM)
    model = Plain(lambda self, x, t: self.f(x) + self.f(2 * x), f=lambda x: x @ matrix, networks=["f"])
    assert evaluations(model) == (2, 2)
    assert model.f.__name__ == "<lambda>"


def test_guidance_without_declaration_costs_twice_what_its_network_costs() -> None:
    inner = closed_form("gmm-2d")
    plain = Plain(lambda self, x, t: 1.5 * self.net.velocity(x, t) - 0.5 * self.net.velocity(x, t), net=inner)
    plain.event_shape = (2,)
    x = points(BATCH, 2)
    options: dict[str, Any] = {"solver": "rk4", "steps": 4, "trace": "hutchinson"}
    once, twice = (get("ode", **options).log_prob(model, x) for model in (inner, plain))
    assert (once.cost.forwards, once.cost.vjps) == (16, 16)
    assert (twice.cost.forwards, twice.cost.vjps) == (32, 32)
    torch.testing.assert_close(once.log_prob, twice.log_prob)


def test_guidance_on_some_of_the_times_alone_is_counted_where_it_is() -> None:
    def velocity(self: Any, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = self.net(x, t)
        return value + self.weak(x, t) if float(t[0]) < 0.5 else value

    out = get("ode", solver="euler", steps=4, trace="hutchinson").log_prob(
        Plain(velocity, net=Net(), weak=Net(8)), points(BATCH, DIM)
    )
    assert (out.cost.forwards, out.cost.vjps) == (4 + 1, 4 + 1)


@pytest.mark.parametrize("first", [True, False])
def test_guidance_behind_an_embedding_is_counted_whichever_call_comes_first(first: bool) -> None:
    class Guided(nn.Module):
        event_shape = (DIM,)

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.label = nn.Linear(DIM, DIM).double(), nn.Embedding(2, DIM + 1).double()
            self.net = nn.Sequential(mlp(32), nn.Linear(DIM, DIM).double())

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            h = torch.cat((self.embed(x), t[:, None]), 1)
            free: Tensor = self.net(h)
            return free if cond is None else 2.0 * self.net(h + self.label(cond)) - free

    model, ode, x = Guided().eval(), get("ode", solver="euler", steps=4), points(BATCH, DIM)
    label = torch.zeros(BATCH, dtype=torch.int64)
    for guided in (first, not first):
        cost = ode.log_prob(model, x, cond=label if guided else None).cost
        assert cost.forwards == (8 if guided else 4)


def test_members_of_an_ensemble_in_a_vmap_over_parameters_are_counted() -> None:
    nets = [Net(8) for _ in range(4)]
    parameters, buffers = stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def velocity(self: Any, x: Tensor, t: Tensor) -> Tensor:
        one = lambda p, b: functional_call(base, (p, b), (x, t))  # noqa: E731
        value: Tensor = vmap(one)(parameters, buffers).mean(0)
        return value

    assert evaluations(Plain(velocity))[0] == 4


def test_networks_within_transforms_are_counted() -> None:
    def by_vmap(self: Any, x: Tensor, t: Tensor) -> Tensor:
        def one(y: Tensor, r: Tensor) -> Tensor:
            value: Tensor = self.net(y[None], r[None])[0] + self.net(y[None], 0.5 * r[None])[0]
            return value

        value: Tensor = vmap(one)(x, t)
        return value

    def by_jvp(self: Any, x: Tensor, t: Tensor) -> Tensor:
        value, rate = jvp(lambda r: self.net(x, r), (t,), (torch.ones_like(t),))
        return value + 0.1 * rate + self.net(x, 0.5 * t)

    def energy(self: Any, x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(y, t).square().sum(), y, create_graph=True)
        return slope

    assert evaluations(Plain(by_vmap, net=Net()))[0] == 2
    counts = Counts()
    seen = counted(Plain(by_jvp, net=Net()), counts)
    x, t = points(BATCH, DIM), torch.full((BATCH,), 0.5, dtype=torch.float64)
    seen.velocity(x, t)
    cost = counts.per_sample(BATCH)
    assert (cost.forwards, cost.jvps) == (2, 1)
    counts = Counts()
    with torch.no_grad():
        counted(Plain(energy, net=Net()), counts).velocity(x, t)
    assert (counts.forwards, counts.vjps) == (BATCH, BATCH)


def test_an_answer_with_no_evaluation_counted_is_refused() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Past(Estimator):
        name = "past"
        direct: bool = True

        def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
            value = (past if self.direct else model).velocity(x, run.at(0.5))
            return Estimate(log_prob=value.sum(1))

        def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
            return Samples(x=(past if self.direct else model).velocity(x0, run.at(0.5)))

    past = Plain(guided, net=Net())
    x = points(BATCH, DIM)
    for direct, status in ((True, "refused"), (False, "ok")):
        out, drawn = Past(direct=direct).log_prob(past, x), Past(direct=direct).sample(past, 4, dtype=x.dtype)
        assert (out.status, drawn.status) == (status, status)
        assert bool(out.valid.any()) == bool(drawn.valid.any()) == (not direct)
        if direct:
            assert out.reason is not None
            assert "no evaluation of the model was counted" in out.reason


def test_nothing_is_left_behind_by_calls_that_end_or_fail() -> None:
    def velocity(self: Any, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = self.net(x, t)
        if self.broken:
            raise KeyError("broken")
        return value + self.net(x, t)

    for kind in (Module, Plain):
        net = Net()
        net.velocity = net.forward  # type: ignore[assignment, method-assign]
        model = kind(velocity, net=net, broken=False)
        before = [dict(vars(part)) for part in net.modules()]
        evaluations(model)
        model.broken = True
        with pytest.raises(KeyError):
            counted(model, Counts()).velocity(points(BATCH, DIM), torch.zeros(BATCH))
        model.broken = False
        assert [dict(vars(part)) for part in net.modules()] == before
        assert evaluations(model) == (2, 2)
    from torch.nn.modules import module
    from torch.overrides import _get_current_function_mode_stack

    assert not module._global_forward_pre_hooks
    assert not module._global_forward_hooks
    assert not _get_current_function_mode_stack()


def test_calls_of_one_model_in_many_threads_count_their_own() -> None:
    model = Plain(guided, net=Net())
    wrong: list[Any] = []

    def work() -> None:
        for _ in range(30):
            counts = Counts()
            seen = counted(model, counts)
            x = points(BATCH, DIM).requires_grad_()
            value = seen.velocity(x, torch.full((BATCH,), 0.5, dtype=torch.float64))
            torch.autograd.grad(value.sum(), x)
            if (counts.forwards, counts.vjps) != (2 * BATCH, 2 * BATCH):
                wrong.append(counts)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert "forward" not in vars(model.net)  # type: ignore[attr-defined]


@pytest.mark.parametrize("clusters", [0, 2])
def test_layers_as_wide_as_the_point_are_no_networks(clusters: int) -> None:
    d = 4
    model = VectorFlowMap(
        torch.zeros(d), torch.ones(d), torch.eye(d), hidden=d, gate_rank=d, clusters=clusters
    )
    cost = get("f2d2", steps=3).log_prob(model, points(BATCH, d).float()).cost
    assert cost.forwards == 3
