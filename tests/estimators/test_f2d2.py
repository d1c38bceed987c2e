"""F2D2 on closed-form joint maps, where every number of steps is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_flows import Field, LinearMap, points, spd, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_estimators.counting import Cost
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.zoo import load_model


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 32, 128])
@pytest.mark.parametrize("grid", ["uniform", "cosine", "logsnr", "ramped"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_gaussian_joint_map_is_exact_at_any_number_of_steps(
    steps: int, grid: str, dtype: torch.dtype, tolerance: float
) -> None:
    for model in (closed_form("gaussian-2d"), Gaussian(points(8, seed=2), spd(8))):
        assert isinstance(model, Gaussian)
        x = model.sample(64, generator=torch.Generator().manual_seed(1), dtype=dtype)
        out = get("f2d2", steps=steps, grid=grid).log_prob(model, x)
        assert out.log_prob.dtype == torch.float64
        assert float((out.log_prob - model.log_prob(x.double())).abs().max()) < tolerance
        assert out.cost == Cost(forwards=steps, accepted_steps=steps)
        assert out.stderr is None


@pytest.mark.parametrize("steps", [1, 4])
def test_density_found_while_sampling_is_exact_and_found_again_while_inverting(steps: int) -> None:
    model = Gaussian(points(4, seed=2), spd(4))
    estimator = get("f2d2", steps=steps)
    drawn = estimator.sample(model, 30, dtype=torch.float64)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=1e-9)
    torch.testing.assert_close(drawn.log_prob, estimator.log_prob(model, drawn.x).log_prob, rtol=0, atol=1e-9)
    assert drawn.cost.forwards == steps
    assert estimator.sample(model, 30, log_prob=False).log_prob is None


def test_samples_at_one_step_are_those_of_the_ode() -> None:
    model = Gaussian(points(4, seed=2), spd(4))
    one = get("f2d2", steps=1).sample(model, 30, dtype=torch.float64)
    many = get("ode", rtol=1e-9, atol=1e-9).sample(model, 30, dtype=torch.float64, log_prob=False)
    torch.testing.assert_close(one.x, many.x, rtol=0, atol=1e-7)


def test_eps_moves_the_end_where_the_density_is_taken() -> None:
    model = Gaussian(points(3, seed=2), spd(3))
    x = points(5, 3)
    out = get("f2d2", steps=2, eps=0.25).log_prob(model, x)
    torch.testing.assert_close(out.log_prob, model.log_prob(x, t=0.75), rtol=0, atol=1e-9)
    model.eps = 0.25
    torch.testing.assert_close(get("f2d2", steps=2).log_prob(model, x).log_prob, out.log_prob, rtol=0, atol=0)


def test_model_without_divergence_head_is_refused() -> None:
    out = get("f2d2").log_prob(Field(lambda x, t: x), points(3, 2))
    assert (out.status, out.valid.any().item()) == ("refused", False)
    assert out.reason is not None
    assert "joint" in out.reason
    drawn = get("f2d2").sample(Field(lambda x, t: x), 3)
    assert drawn.status == "refused"
    assert drawn.reason == out.reason


def test_divergence_of_another_shape_is_an_error_not_a_broadcast() -> None:
    class Column(LinearMap):
        def joint(
            self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None
        ) -> tuple[Tensor, Tensor]:
            u, divergence = super().joint(x, t, s)
            return u, divergence[:, None]

    with pytest.raises(ValueError, match=r"average divergence has shape \(5, 1\), expected \(5,\)"):
        get("f2d2").log_prob(Column(stable_matrix(3)), points(5, 3))


def test_likelihood_is_differentiable_in_parameters_and_points() -> None:
    model = LinearMap(stable_matrix(3))
    x = points(4, 3).requires_grad_()
    for estimator in parse_spec("f2d2[steps=1|3]"):
        out = estimator.log_prob(model, x, differentiable=True)
        found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
        expected = torch.autograd.grad(model.log_prob(x).sum(), [model.matrix, x])
        torch.testing.assert_close(found, expected)


class Count(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> int:
    call()  # what is looked at the first time only
    with torch.no_grad(), Count() as count:
        call()
    return int(count.operations)


def test_one_sample_takes_few_tensor_operations_beside_its_forward() -> None:
    model: Any = load_model("gmm-2d", "direct-f2d2")
    x, estimator = torch.zeros(1, 2), get("f2d2", steps=1)
    bound = estimator.bind(model)
    forward = operations(lambda: model.joint(x, torch.ones(1), torch.zeros(1)))
    most = 28  # 9 of the estimate, 7 on what the model must not write into, 12 of checks and times
    assert operations(lambda: estimator.log_prob(model, x)) - forward <= most
    assert operations(lambda: bound.log_prob(x)) - forward <= most
