"""The divergence by vector-Jacobian products, against matrices whose trace is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_flows import points, spd, stable_matrix

from flowlik_estimators import get
from flowlik_estimators.call import PROBE_STREAM
from flowlik_estimators.divergence.products import (
    exact,
    hutch_plus_plus,
    hutchinson,
    jacobian_rows,
    with_graph,
)
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.moments.moments import attach, from_covariance
from flowlik_models.numerics import random


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    event=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_field_has_divergence_tr_a(batch: int, event: list[int], double: bool, seed: int) -> None:
    dtype = torch.float64 if double else torch.float32
    matrix = stable_matrix(math.prod(event), seed).to(dtype)
    x = points(batch, *event, dtype=dtype)
    value, divergence = exact(lambda y: (y.flatten(1) @ matrix.T).view_as(y), x)
    assert divergence.shape == (batch, 1)
    assert value.dtype == divergence.dtype == dtype
    torch.testing.assert_close(divergence[:, 0], matrix.trace().expand(batch))


class Unbatched(torch.autograd.Function):
    """Squares, with a backward pass that no batch of cotangents goes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2.0 * ctx.saved_tensors[0] * torch.from_numpy(grads[0].numpy())


@pytest.mark.parametrize("batch", [1, 40, 65])
@pytest.mark.parametrize("square", [torch.square, Unbatched.apply], ids=["batched", "loop"])
def test_rows_of_the_jacobian_are_the_same_by_groups_and_one_by_one(
    batch: int, square: Callable[[Tensor], Tensor]
) -> None:
    matrix, x = stable_matrix(20), points(batch, 20)
    leaf, value = with_graph(lambda y: square(y) @ matrix.T, x, differentiable=False)
    rows = torch.stack(list(jacobian_rows(value, leaf, differentiable=False)), 1)
    torch.testing.assert_close(rows, 2.0 * matrix * x[:, None, :])


def test_hutchinson_column_is_the_quadratic_form_of_its_probe() -> None:
    matrix, x = stable_matrix(4), points(3, 4)
    probes = random.gaussian(5, torch.arange(3), (6, 4), stream=PROBE_STREAM, dtype=torch.float64)
    _, columns = hutchinson(lambda y: y @ matrix.T, x, probes)
    torch.testing.assert_close(columns, torch.einsum("bki,ij,bkj->bk", probes, matrix, probes))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_variance_of_its_noise(noise: str) -> None:
    matrix, n = stable_matrix(3), 20_000
    draw = {"rademacher": random.rademacher, "gaussian": random.gaussian}[noise]
    probes = draw(11, torch.arange(n), (1, 3), stream=PROBE_STREAM, dtype=torch.float64)
    _, columns = hutchinson(lambda y: y @ matrix.T, torch.zeros(n, 3, dtype=torch.float64), probes)
    symmetric = (matrix + matrix.T) / 2
    variance = 2 * symmetric.square().sum()
    if noise == "rademacher":
        variance -= 2 * symmetric.diagonal().square().sum()
    assert abs(columns.mean() - matrix.trace()) < 5 * (variance / n).sqrt()
    torch.testing.assert_close(columns.var(), variance, rtol=0.1, atol=0)


def test_field_that_ignores_x_has_divergence_zero() -> None:
    x = points(3, 2)
    _, divergence = exact(lambda y: torch.ones(3, 2, dtype=torch.float64), x)
    _, column = hutchinson(lambda y: torch.ones(3, 2, dtype=torch.float64), x, torch.ones(3, 1, 2))
    assert not divergence.any()
    assert not column.any()


def test_exact_trace_builds_no_graph_unless_asked() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def field(y: Tensor) -> Tensor:
        return scale * y.square()

    x = points(3, 2)
    value, divergence = exact(field, x)
    assert not value.requires_grad
    assert not divergence.requires_grad
    _, divergence = exact(field, x, differentiable=True)
    (slope,) = torch.autograd.grad(divergence.sum(), scale)
    torch.testing.assert_close(slope, 2 * x.sum())


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_error_of_a_gaussian_is_its_quadratic_form(noise: str) -> None:
    """One probe z fixed along the path moves log p by exactly tr L - z^T L z, L = log(S)/2."""
    covariance = spd(4)
    model = Gaussian(points(4, seed=3), covariance)
    x = model.sample(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimator = get("ode", rtol=1e-10, atol=1e-10, trace="hutchinson", noise=noise)
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(4))
    key = random.draw_key(torch.Generator().manual_seed(4))
    draw = {"rademacher": random.rademacher, "gaussian": random.gaussian}[noise]
    z = draw(key, torch.arange(8), (1, 4), stream=PROBE_STREAM, dtype=torch.float64)[:, 0]
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    half_log = vectors @ torch.diag(eigenvalues.log() / 2) @ vectors.T
    expected = model.log_prob(x) + half_log.trace() - torch.einsum("bi,ij,bj->b", z, half_log, z)
    torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-7)
    assert out.stderr is None


def test_several_probes_give_their_mean_and_standard_error() -> None:
    model = Gaussian(torch.zeros(4), spd(4))
    x = points(6, 4)
    out = get("ode", solver="rk4", steps=8, trace="hutchinson", probes=8).log_prob(model, x)
    exactly = get("ode", solver="rk4", steps=8, trace="exact").log_prob(model, x)
    assert out.stderr is not None
    assert bool((out.stderr > 0).all())
    assert bool(((out.log_prob - exactly.log_prob).abs() < 6 * out.stderr).all())
    assert out.cost.forwards == exactly.cost.forwards


class _UNet(torch.nn.Module):
    """The operations of one, on a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 1)))
        self.norm = torch.nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.nn.functional.silu(self.norm(self.into(x)))
        y = y + torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(y, 2), scale_factor=2.0)
        return torch.tanh(self.out(y))  # type: ignore[no-any-return]


def test_products_of_a_u_net_are_one_pass_backward_and_not_one_after_the_other() -> None:
    torch.manual_seed(0)
    net, x = _UNet(), torch.randn(2, 1, 4, 4)
    backward = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal backward
            backward += func is torch.ops.aten.convolution_backward.default
            return func(*args, **(kwargs or {}))

    with Counting():
        _, divergence = exact(net, x)
    assert backward == 2  # once for each of its convolutions
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: net(one[None])[0]))(x)
    trace = jacobian.reshape(2, 16, 16).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence[:, 0], trace)


def test_hutch_plus_plus_is_unbiased_and_exact_where_its_head_is_all() -> None:
    matrix = stable_matrix(6, seed=3) + torch.triu(torch.ones(6, 6, dtype=torch.float64))  # not symmetric
    low = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = points(4000, 6, dtype=torch.float64)
    for a, count, sure in ((matrix, 2, False), (low @ low.T, 2, True), (matrix, 6, True)):
        probes = random.gaussian(0, torch.arange(4000), (2 * count, 6), stream=0, dtype=torch.float64)
        value, columns = hutch_plus_plus(lambda y, a=a: y @ a.T, x, probes)
        assert columns.shape == (4000, count)
        assert not value.requires_grad
        off = columns.mean(1) - a.trace()
        if sure:
            assert float(off.abs().max()) < 1e-9
        else:
            assert abs(float(off.mean())) < 3 * float(off.std()) / 4000**0.5
            assert float(off.std()) > 0.1


def test_hutch_plus_plus_along_a_path_counts_its_products_and_its_bar_covers() -> None:
    options = {"solver": "rk4", "steps": 2, "trace": "hutchinson", "noise": "hutch++"}
    model = Gaussian(torch.zeros(20), spd(20))
    x = model.sample(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = attach(
        Gaussian(torch.zeros(20), spd(20)), from_covariance(torch.zeros(20), torch.eye(20), "another")
    )
    for family, field in (("ode", model), ("whitened-ode", other)):
        exact_trace = get(family, solver="rk4", steps=2).log_prob(field, x).log_prob
        out = get(family, **options, probes=12).log_prob(field, x)
        assert out.cost.vjps == 12 * out.cost.forwards
        assert out.stderr is not None
        off = out.log_prob - exact_trace
        assert abs(float(off.mean())) < 3 * float(off.std()) / 400**0.5
        bar = float(student.ppf(0.975, 3)) * out.stderr
        assert float((off.abs() <= bar).double().mean()) == pytest.approx(0.95, abs=0.03)
        assert float(out.extra["dof"][0]) == 3.0
    small = Gaussian(torch.zeros(3), spd(3))
    y = small.sample(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact_trace = get("ode", solver="rk4", steps=2).log_prob(small, y).log_prob
    whole = get("ode", **options, probes=9).log_prob(small, y).log_prob
    torch.testing.assert_close(whole, exact_trace, rtol=0, atol=1e-8)
    assert get("ode", trace="hutchinson", noise="hutch++").probes == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"probes": 4}, "multiple of 3"),
        ({"redraw": True, "solver": "rk4", "steps": 4}, "noise=hutch\\+\\+ needs"),
        ({"divergence": "quadrature"}, "noise=hutch\\+\\+ needs"),
        ({"control": "gaussian"}, "noise=hutch\\+\\+ needs"),
        ({"basis": "auto"}, "noise=hutch\\+\\+ needs"),
    ],
)
def test_hutch_plus_plus_with_what_it_has_no_meaning_for_is_refused(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        get("ode", trace="hutchinson", noise="hutch++", **options)
    many = get("ode", trace="hutchinson", noise="hutch++", probes=21)
    assert "at most 3 d = 18" in (many.supports(Gaussian(torch.zeros(6), spd(6))) or "")
