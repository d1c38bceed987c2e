"""The determinant of each discrete step: the density of the map itself, whether or not it is a flow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field, LinearMap, points, spd, stable_matrix

from flowlik_estimators import flow_map_exact, get
from flowlik_estimators.call import standard_normal_log_prob
from flowlik_estimators.counting import Cost
from flowlik_models.closed_forms.gaussian import Gaussian


class Waves(nn.Module):
    """A map that is no flow: u(x, t, s) = a sin(B x + t - 2 s), one-to-one while |a| |B| |s - t| < 1."""

    def __init__(self, size: float = 0.3, d: int = 2, event_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.event_shape = event_shape or (d,)
        self.matrix = nn.Parameter(torch.eye(d, dtype=torch.float64) + stable_matrix(d))
        self.size = size

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        phase = (t - 2 * s)[:, None] if cond is None else (t - 2 * s + cond)[:, None]
        waves = self.size * torch.sin(x.flatten(1) @ self.matrix.to(x.dtype).T + phase)
        return waves.view_as(x)


def carried_to_noise(model: Waves, x: Tensor, steps: int) -> Tensor:
    """x_0 of one point (d,), by the steps of the uniform grid."""
    times = torch.linspace(1.0, 0.0, steps + 1, dtype=x.dtype)
    for t, s in pairwise(times):
        x = x + (s - t) * model.average_velocity(x[None], t[None], s[None])[0]
    return x


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("grid", ["uniform", "cosine", "logsnr"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_gaussian_map_is_exact_at_any_number_of_steps(
    steps: int, grid: str, dtype: torch.dtype, tolerance: float
) -> None:
    model = Gaussian(points(5, seed=2), spd(5))
    x = model.sample(16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    out = get("flow-map-exact", steps=steps, grid=grid).log_prob(model, x)
    assert float((out.log_prob - model.log_prob(x.double())).abs().max()) < tolerance
    assert out.cost == Cost(forwards=steps, vjps=5 * steps, accepted_steps=steps)
    assert out.stderr is None
    assert out.extra["sign_changes"].tolist() == [0] * 16


@pytest.mark.parametrize("steps", [1, 3])
def test_any_map_gives_the_change_of_variables_of_its_composition(steps: int) -> None:
    """The determinant of the whole composition by autograd, not step by step."""
    model = Waves(d=3)
    x = points(12, 3)
    out = get("flow-map-exact", steps=steps).log_prob(model, x)
    whole = torch.func.vmap(torch.func.jacrev(lambda y: carried_to_noise(model, y, steps)))(x)
    x0 = torch.stack([carried_to_noise(model, row, steps) for row in x])
    expected = standard_normal_log_prob(x0) + torch.linalg.slogdet(whole)[1]
    torch.testing.assert_close(out.log_prob, expected.detach(), rtol=0, atol=1e-9)


def test_density_of_a_one_to_one_map_has_mass_one_where_the_trace_has_not() -> None:
    model = Waves(0.5)
    middles = -6.0 + (torch.arange(120, dtype=torch.float64) + 0.5) * 0.1
    x = torch.cartesian_prod(middles, middles)

    def mass(name: str) -> float:
        return float(get(name, steps=2).log_prob(model, x).log_prob.exp().sum()) * 0.01

    assert get("flow-map-exact", steps=2).log_prob(model, x).extra["sign_changes"].sum() == 0
    assert mass("flow-map-exact") == pytest.approx(1.0, abs=1e-6)
    assert abs(mass("meanflow") - 1.0) > 0.01


def test_fold_is_finite_and_flagged() -> None:
    """x_0 = x - (x^2 + x) + ... : u = x + x^2, so x_0 = -x^2, whose determinant -2x changes sign at 0."""
    model = Field(lambda x, t: x, d=1, average_velocity=lambda x, t, s, cond=None: x + x.square())
    x = torch.tensor([[-1.5], [0.0], [0.5], [2.0]], dtype=torch.float64)
    out = get("flow-map-exact", steps=1).log_prob(model, x)
    expected = standard_normal_log_prob(-x.square()) + (2 * x[:, 0]).abs().log()
    torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-12)
    assert out.extra["sign_changes"].tolist() == [0, 0, 1, 1]
    assert out.reason == "the map folds: the determinant of a step is negative at 2 of 4 rows"
    assert out.extra["non_invertible"].tolist() == [0, 1, 0, 0]
    assert out.valid.tolist() == [True, False, True, True]
    torch.testing.assert_close(out.extra["min_log_abs_det"], (2 * x[:, 0]).abs().log())


def test_samples_carry_the_density_of_their_own_steps() -> None:
    model = Gaussian(points(4, seed=2), spd(4))
    drawn = get("flow-map-exact", steps=3).sample(model, 20, dtype=torch.float64)
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=1e-9)
    only = get("flow-map-exact", steps=3).sample(model, 20, dtype=torch.float64, log_prob=False)
    assert only.log_prob is None
    assert only.cost == Cost(forwards=3, accepted_steps=3)
    torch.testing.assert_close(only.x, drawn.x)


def test_pieces_of_a_batch_change_neither_values_nor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Waves(d=4, event_shape=(1, 2, 2))
    x, cond = points(7, 1, 2, 2), points(7)
    estimator = get("flow-map-exact", steps=2)
    whole = estimator.log_prob(model, x, cond=cond)
    monkeypatch.setattr(flow_map_exact, "JACOBIAN_NUMBERS", 3 * 16)
    pieces = estimator.log_prob(model, x, cond=cond)
    torch.testing.assert_close(pieces.log_prob, whole.log_prob, rtol=0, atol=1e-12)
    assert pieces.cost == whole.cost == Cost(forwards=2, vjps=8, accepted_steps=2)
    flat = Waves(d=4)
    flat.load_state_dict(model.state_dict())
    again = estimator.log_prob(flat, x.flatten(1), cond=cond)
    torch.testing.assert_close(again.log_prob, whole.log_prob, rtol=0, atol=1e-12)


def test_likelihood_is_differentiable_in_points_and_parameters() -> None:
    model = LinearMap(stable_matrix(3))
    x = points(4, 3).requires_grad_()
    out = get("flow-map-exact", steps=2).log_prob(model, x, differentiable=True)
    found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
    expected = torch.autograd.grad(model.log_prob(x).sum(), [model.matrix, x])
    torch.testing.assert_close(found, expected)


def test_map_that_does_not_move_keeps_the_source_density() -> None:
    """u does not depend on x: no graph, no products."""
    model = Field(lambda x, t: x, average_velocity=lambda x, t, s, cond=None: torch.ones_like(x))
    x = points(3, 2)
    out = get("flow-map-exact", steps=2).log_prob(model, x)
    torch.testing.assert_close(out.log_prob, standard_normal_log_prob(x - 1.0))
    assert out.cost.vjps == 0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Field(lambda x, t: x), "needs a flow map"),
        (Field(lambda x, t: x, d=785, average_velocity=None), "up to 784 dimensions, the model has 785"),
    ],
)
def test_models_that_do_not_fit_are_refused(model: Any, words: str) -> None:
    out = get("flow-map-exact").log_prob(model, points(2, *model.event_shape))
    assert out.status == "refused"
    assert words in str(out.reason)


def test_velocity_of_another_shape_is_an_error_not_a_broadcast() -> None:
    model = Field(lambda x, t: x, average_velocity=lambda x, t, s, cond=None: x[:, :1])
    with pytest.raises(ValueError, match=r"average velocity has shape \(3, 1\), expected \(3, 2\)"):
        get("flow-map-exact").log_prob(model, points(3, 2))
