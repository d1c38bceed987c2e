"""What each way of taking a derivative must report, in network evaluations per sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp, vjp, vmap
from toy_flows import Field, Linear, LinearWithDivergence, points, spd, stable_matrix

from flowlik_estimators import get
from flowlik_estimators.counting import Cost, Counts, counted, evaluations
from flowlik_models.closed_forms.gaussian import Gaussian

BATCH, DIM = 5, 3
Velocity = Callable[[Tensor, Tensor], Tensor]


def network() -> Field:
    matrix = stable_matrix(DIM)
    return Field(lambda x, t: torch.tanh(x @ matrix.T) * t[:, None], DIM)


def at() -> tuple[Tensor, Tensor]:
    return points(BATCH, DIM), torch.linspace(0.1, 0.9, BATCH, dtype=torch.float64)


def basis() -> Tensor:
    return torch.eye(DIM, dtype=torch.float64)[:, None].expand(DIM, BATCH, DIM)


def by_loop(v: Velocity) -> Tensor:
    x, t = at()
    value = v(x.requires_grad_(), t)
    rows = [torch.autograd.grad(value[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(DIM)]
    return torch.stack(rows).sum(0)


def by_batched_gradients(v: Velocity) -> Tensor:
    x, t = at()
    value = v(x.requires_grad_(), t)
    (rows,) = torch.autograd.grad(value, x, basis(), is_grads_batched=True)
    return torch.einsum("ibi->b", rows)


def by_vmapped_vjp(v: Velocity) -> Tensor:
    x, t = at()
    (rows,) = vmap(vjp(lambda y: v(y, t), x)[1])(basis())
    return torch.einsum("ibi->b", rows)


def by_vmapped_gradient_of_a_plain_graph(v: Velocity) -> Tensor:
    x, t = at()
    value = v(x.requires_grad_(), t)
    rows = vmap(lambda e: torch.autograd.grad(value, x, e, retain_graph=True)[0])(basis())
    return torch.einsum("ibi->b", rows)


def by_vmapped_jacrev(v: Velocity) -> Tensor:
    jacobian = vmap(jacrev(lambda x, t: v(x[None], t[None])[0]))(*at())
    return torch.einsum("bii->b", jacobian)


def by_vmapped_jacfwd(v: Velocity) -> Tensor:
    jacobian = vmap(jacfwd(lambda x, t: v(x[None], t[None])[0]))(*at())
    return torch.einsum("bii->b", jacobian)


def by_vmapped_jvp(v: Velocity) -> Tensor:
    x, t = at()
    columns = vmap(lambda e: jvp(lambda y: v(y, t), (x,), (e,))[1])(basis())
    return torch.einsum("ibi->b", columns)


def by_jvp_loop(v: Velocity) -> Tensor:
    x, t = at()
    columns = [jvp(lambda y: v(y, t), (x,), (e,))[1] for e in basis()]
    return torch.einsum("ibi->b", torch.stack(columns))


def by_fold(v: Velocity) -> Tensor:
    x, t = at()
    folded = x.repeat_interleave(DIM, 0).requires_grad_()
    units = torch.eye(DIM, dtype=torch.float64).repeat(BATCH, 1)
    (rows,) = torch.autograd.grad(v(folded, t.repeat_interleave(DIM)), folded, units)
    return (rows * units).sum(1).view(BATCH, DIM).sum(1)


WAYS = [
    (by_loop, (1, DIM, 0)),
    (by_batched_gradients, (1, DIM, 0)),
    (by_vmapped_vjp, (1, DIM, 0)),
    (by_vmapped_gradient_of_a_plain_graph, (1, DIM, 0)),
    (by_vmapped_jacrev, (1, DIM, 0)),
    (by_vmapped_jacfwd, (1, 0, DIM)),
    (by_vmapped_jvp, (1, 0, DIM)),
    (by_jvp_loop, (DIM, 0, DIM)),
    (by_fold, (DIM, DIM, 0)),
]


@pytest.mark.parametrize(("way", "expected"), WAYS, ids=[way.__name__ for way, _ in WAYS])
def test_exact_trace_reports_d_products_however_it_is_taken(
    way: Callable[[Velocity], Tensor], expected: tuple[int, int, int]
) -> None:
    counts = Counts()
    trace = way(counted(network(), counts).velocity)
    cost = counts.per_sample(BATCH)
    assert (cost.forwards, cost.vjps, cost.jvps) == expected
    torch.testing.assert_close(trace, by_loop(network().velocity))


def test_functional_jacobians_count_every_row_of_the_batch() -> None:
    x, t = at()
    for strategy, kind in (("reverse-mode", "vjps"), ("forward-mode", "jvps")):
        counts = Counts()
        field = counted(network(), counts)
        torch.autograd.functional.jacobian(
            lambda y, f=field: f.velocity(y, t), x, vectorize=True, strategy=strategy
        )
        cost = counts.per_sample(BATCH)
        assert cost.forwards == 1
        assert getattr(cost, kind) == BATCH * DIM


def test_derivative_in_time_alone_is_a_product() -> None:
    x, t = at()
    counts = Counts()
    field = counted(network(), counts)
    jvp(lambda r: field.velocity(x, r), (t,), (torch.ones_like(t),))
    torch.autograd.grad(field.velocity(x, t.requires_grad_()).sum(), t)
    assert counts.per_sample(BATCH) == Cost(forwards=2.0, vjps=1.0, jvps=1.0)


def test_gradient_through_a_product_is_right_behind_the_counter() -> None:
    x, t = at()
    x.requires_grad_()

    def second(v: Velocity) -> Tensor:
        (first,) = torch.autograd.grad(v(x, t).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    torch.testing.assert_close(second(counted(network(), Counts()).velocity), second(network().velocity))


def test_no_product_is_counted_without_gradients() -> None:
    counts = Counts()
    with torch.no_grad():
        counted(network(), counts).velocity(*at())
    assert counts == Counts(forwards=BATCH)


def test_methods_that_call_each_other_count_once() -> None:
    model = Gaussian(torch.zeros(DIM), spd(DIM))  # velocity, divergence and average_velocity all call joint
    x, t = at()
    counts = Counts()
    proxy = counted(model, counts)
    proxy.velocity(x, t)
    proxy.average_velocity(x, t, 0.5 * t)
    proxy.velocity_and_divergence(x, t)
    assert counts.per_sample(BATCH).forwards == 3


def test_proxy_offers_what_the_model_offers() -> None:
    model = Gaussian(torch.zeros(DIM), spd(DIM))
    proxy = counted(model, Counts())
    assert proxy.event_shape == (DIM,)
    assert proxy.eps == 0.0
    assert proxy.eigenvalues is model.eigenvalues
    assert not hasattr(proxy, "own_samples")


class Guided(nn.Module):
    """Two networks in one field, as classifier-free guidance with two models has them."""

    networks = ("strong", "weak")

    def __init__(self) -> None:
        super().__init__()
        self.strong = Linear(stable_matrix(DIM, 0))
        self.weak = nn.Linear(DIM, DIM, dtype=torch.float64)
        self.event_shape = (DIM,)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        strong = self.strong.velocity(x, t)
        return strong + 0.5 * (strong - self.weak(x))


def test_guided_model_counts_each_network_and_is_left_as_it_was() -> None:
    model = Guided()
    before = dict(model.named_modules())
    out = get("ode", solver="euler", steps=2).log_prob(model, points(BATCH, DIM))
    assert (out.cost.forwards, out.cost.vjps) == (4.0, 2 * 2 * DIM)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_network_that_is_named_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To follow every tensor of every evaluation takes longer than a small network does."""
    model = Guided()
    layers = [nn.Linear(DIM, DIM, dtype=torch.float64) for _ in range(2)]
    model.weak = nn.Sequential(*layers)  # type: ignore[assignment]
    followed = []
    follow = evaluations._Following.__torch_function__

    def counting(self: Any, func: Any, *rest: Any) -> Any:
        followed.append(func)
        return follow(self, func, *rest)

    monkeypatch.setattr(evaluations._Following, "__torch_function__", counting)
    few, many = (_followed(model, steps, followed) for steps in (1, 20))
    assert few == many


def _followed(model: nn.Module, steps: int, followed: list[Any]) -> int:
    followed.clear()
    out = get("ode", solver="euler", steps=steps).log_prob(model, points(BATCH, DIM))
    assert out.cost.forwards == 2 * steps
    return len(followed)


def test_guided_model_that_is_no_module_counts_each_network() -> None:
    inner = Linear(stable_matrix(DIM))

    class Plain:
        networks = ("inner",)
        event_shape = (DIM,)

        def __init__(self) -> None:
            self.inner = inner

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            return self.inner.velocity(x, t) + self.inner.velocity(x, 0.5 * t)

    plain = Plain()
    out = get("ode", solver="midpoint", steps=3).log_prob(plain, points(BATCH, DIM))
    assert out.cost.forwards == 2 * 6
    assert plain.inner is inner


class Scaler(nn.Module):
    """Of a network's own units, as data are scaled before it and answers after it."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(DIM, dtype=torch.float64)) if weights else 1.0

    def inverse(self, x: Tensor) -> Tensor:
        return x * self.scale


class Plainly:
    def inverse(self, x: Tensor) -> Tensor:
        return x * 1.0


@pytest.mark.parametrize("scaler", [Scaler(weights=False), Scaler(weights=True), Plainly()])
def test_a_part_with_an_inverse_is_no_network_for_that(scaler: Any) -> None:
    class Scaled(nn.Module):
        event_shape = (DIM,)

        def __init__(self) -> None:
            super().__init__()
            self.net, self.scaler = nn.Linear(DIM, DIM, dtype=torch.float64), scaler

        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            answer: Tensor = self.scaler.inverse(self.net(x))
            return answer

    out = get("ode", solver="euler", steps=2).log_prob(Scaled().eval(), points(BATCH, DIM))
    assert (out.cost.forwards, out.cost.vjps) == (2.0, 2 * DIM)


@pytest.mark.parametrize("kind", [nn.Module, object])
def test_an_exact_flow_of_several_layers_with_inverses_is_one_forward(kind: type) -> None:
    class Layer(kind):  # type: ignore[misc]
        def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return 2.0 * x, x.new_full(x.shape[:1], DIM * math.log(2.0))

    class Layers:
        event_shape = (DIM,)
        layers = (Layer(), Layer(), Layer())

        def inverse(self, x: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
            total = x.new_zeros(x.shape[:1])
            for layer in self.layers:
                x, log_det = layer.inverse(x)
                total = total + log_det
            return x, total

    out = get("exact-flow").log_prob(Layers(), torch.zeros(BATCH, DIM))
    assert out.cost.forwards == 1.0
    assert float(out.log_prob[0]) == pytest.approx(DIM * (3 * math.log(2.0) - 0.5 * math.log(2 * math.pi)))


@pytest.mark.parametrize(
    ("spec", "forwards", "vjps"),
    [
        ({"trace": "exact"}, 4, 4 * DIM),
        ({"trace": "hutchinson"}, 4, 4),
        ({"trace": "hutchinson", "probes": 3}, 4, 12),
        ({"trace": "closed"}, 8, 0),  # velocity and divergence apart: two evaluations
    ],
)
def test_trace_of_a_solve_costs_what_is_documented(spec: dict[str, Any], forwards: int, vjps: int) -> None:
    model = LinearWithDivergence(stable_matrix(DIM))
    cost = get("ode", solver="rk4", steps=1, **spec).log_prob(model, points(BATCH, DIM)).cost
    assert (cost.forwards, cost.vjps, cost.jvps) == (forwards, vjps, 0)
    assert cost.nfe == forwards
    assert cost.work == forwards + vjps


def test_closed_trace_in_one_evaluation_is_one_forward() -> None:
    model = Gaussian(torch.zeros(DIM), spd(DIM))
    cost = get("ode", solver="euler", steps=4, trace="closed").log_prob(model, points(BATCH, DIM)).cost
    assert cost == Cost(forwards=4.0, accepted_steps=4.0)
