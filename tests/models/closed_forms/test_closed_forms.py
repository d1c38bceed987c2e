"""The models with a known answer, against autograd, the continuity equation and the committed controls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flowlik_models.closed_forms.catalogue import SYNTHETIC_TASKS, closed_form, constants_hash
from flowlik_models.closed_forms.gaussian import Gaussian

TIMES = (0.0, 1e-4, 0.2, 0.34, 0.5, 0.9, 0.99, 0.999)


def points(task: str, t: float, n: int = 40, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = closed_form(task).sample(n, generator=generator, t=t, dtype=torch.float64)
    return x + spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)


def trace(v: Tensor, x: Tensor) -> Tensor:
    columns = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1])]
    return torch.stack(columns).sum(0)


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
@pytest.mark.parametrize("t", TIMES)
def test_divergence_equals_autograd_trace(task: str, t: float) -> None:
    model, x = closed_form(task), points(task, t).requires_grad_()
    v, divergence = model.velocity_and_divergence(x, torch.full((len(x),), t, dtype=x.dtype))
    error = (trace(v, x) - divergence).abs() / (1 + divergence.abs())
    assert float(error.detach().max()) < 1e-8


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
@pytest.mark.parametrize("t", TIMES)
def test_density_and_field_satisfy_the_continuity_equation(task: str, t: float) -> None:
    model, x = closed_form(task), points(task, t).requires_grad_()
    time = torch.full((len(x),), t, dtype=x.dtype).requires_grad_()
    log_prob = model.log_prob(x, time)
    grad_x, grad_t = torch.autograd.grad(log_prob.sum(), (x, time))
    v, divergence = model.velocity_and_divergence(x, time)
    residual = (grad_t + divergence + (v * grad_x).sum(1)) / (1 + divergence.abs() + grad_t.abs())
    assert float(residual.detach().abs().max()) < 1e-9


@pytest.mark.parametrize("task", SYNTHETIC_TASKS)
def test_single_precision_field_follows_the_double_one(task: str) -> None:
    model = closed_form(task)
    for t in (0.1, 0.6, 0.95):
        x = points(task, t)
        v, divergence = model.velocity_and_divergence(x, torch.full((len(x),), t, dtype=x.dtype))
        v32, divergence32 = model.velocity_and_divergence(x.float(), torch.full((len(x),), t))
        assert v32.dtype == divergence32.dtype == torch.float32
        torch.testing.assert_close(v32.double(), v, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(divergence32.double(), divergence, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("task", "bpd"),
    [
        ("gaussian-2d", 1.886),
        ("gmm-2d", 1.541),
        ("thin-2d", -0.283),
        ("checkerboard-2d", 2.5),
        ("gmm-64d", -0.015),
        ("many-well-32", 1.240),
        ("funnel-10", 2.2056),
        ("gmm-40", 4.9485),
    ],
)
def test_mean_bits_per_dimension_are_the_tasks(task: str, bpd: float) -> None:
    model, generator = closed_form(task), torch.Generator().manual_seed(0)
    x = model.sample(60_000, generator=generator, dtype=torch.float64)
    found = -float(model.log_prob(x).mean()) / x.shape[1] / math.log(2)
    assert found == pytest.approx(bpd, abs=0.012)


def test_constants_are_pinned() -> None:
    assert {task: constants_hash(task) for task in SYNTHETIC_TASKS} == PINNED


PINNED = {
    "gaussian-2d": "ff8d1a34d315",
    "gmm-2d": "c1ca01771253",
    "gmm-64d": "7bbc6624f919",
    "checkerboard-2d": "05e906c0cfd5",
    "thin-2d": "3e22cbf28c7b",
    "many-well-32": "9b44198502ea",
    "funnel-10": "01c906702752",
    "gmm-40": "f74ea97b53a6",
}


def test_samples_of_a_mixture_have_its_moments() -> None:
    model = closed_form("gmm-2d")
    x = model.sample(100_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean, covariance = model.mean_and_covariance()
    torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(x.T), covariance, atol=0.05, rtol=0)


def test_checkerboard_is_uniform_inside_and_zero_outside() -> None:
    model = closed_form("checkerboard-2d")
    x = model.sample(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(model.log_prob(x), torch.full((500,), -math.log(32), dtype=torch.float64))
    shifted = x + torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert bool((model.log_prob(shifted) == -math.inf).all())
    assert bool((model.distance_outside(x) == 0).all())


def gaussian() -> Gaussian:
    return Gaussian(
        torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[2.0, 0.6, 0.0], [0.6, 0.5, 0.1], [0.0, 0.1, 1.0]])
    )


def random_times(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(3))  # type: ignore[return-value]


def test_joint_map_of_the_gaussian_is_a_semigroup() -> None:
    model, (t, r, s) = gaussian(), random_times(200, 0)
    x = 2 * torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, divergence = model.joint(x, t, s)
    first, first_divergence = model.joint(x, t, r)
    middle = x + (r - t)[:, None] * first
    second, second_divergence = model.joint(middle, r, s)
    torch.testing.assert_close((s - t)[:, None] * u, (r - t)[:, None] * first + (s - r)[:, None] * second)
    torch.testing.assert_close((s - t) * divergence, (r - t) * first_divergence + (s - r) * second_divergence)


def test_joint_map_of_the_gaussian_satisfies_the_lagrangian_condition() -> None:
    model, (t, _, s) = gaussian(), random_times(100, 2)
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (u, divergence), (du, d_divergence) = torch.func.jvp(
        lambda s: model.joint(x, t, s), (s,), (torch.ones_like(s),)
    )
    end = x + (s - t)[:, None] * u
    torch.testing.assert_close(u + (s - t)[:, None] * du, model.velocity(end, s))
    torch.testing.assert_close(divergence + (s - t) * d_divergence, model.divergence(end, s))


def test_joint_map_of_the_gaussian_satisfies_the_eulerian_condition() -> None:
    model, (t, _, s) = gaussian(), random_times(100, 3)
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v, div = model.velocity_and_divergence(x, t)
    (u, divergence), (du, d_divergence) = torch.func.jvp(
        lambda x, t: model.joint(x, t, s), (x, t), (v, torch.ones_like(t))
    )
    torch.testing.assert_close(u, v + (s - t)[:, None] * du)
    torch.testing.assert_close(divergence, div + (s - t) * d_divergence)


def test_average_divergence_is_smooth_through_equal_times() -> None:
    model = gaussian()
    x, t = torch.zeros(5, 3, dtype=torch.float64), torch.full((5,), 0.7, dtype=torch.float64)
    gaps = torch.tensor([0.0, 1e-12, 1e-6, 9e-4, 1.1e-3], dtype=torch.float64)
    values = model.joint(x, t, t - gaps)[1]
    assert float((values - values[0]).abs().max()) < 1e-2
    assert float((values[:3] - values[0]).abs().max()) < 1e-5


def test_singular_covariance_and_bad_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        Gaussian(torch.zeros(2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="no closed form"):
        closed_form("digits")
