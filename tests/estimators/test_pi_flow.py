"""Following policies: exact where the policy is, refused where it says nothing, counted apart from the network."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import points, random_policy

from flowlik_estimators import get
from flowlik_estimators.call import standard_normal_log_prob
from flowlik_estimators.counting import Cost
from flowlik_estimators.pi_flow import _substeps
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.policies import MixturePolicy, Positions, PredictionPolicy

EPS = 1e-3


class Asked(nn.Module):
    """Policies that change with the point they are asked at: a mixture with means B x, or predictions."""

    def __init__(self, d: int = 3, kind: str = "mixture", segments: tuple[int, ...] = (1, 2)) -> None:
        super().__init__()
        self.event_shape, self.segments, self.eps = (d,), segments, EPS
        self.frozen_density = kind == "mixture"
        self.matrix = nn.Parameter(0.3 * points(4, d, d, seed=2))
        self.widths = torch.tensor([0.2, 0.3, 0.4, 0.6], dtype=torch.float64)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Any:
        means = torch.tanh(torch.einsum("kde,be->bkd", self.matrix.to(x), x)) + 0.1 * s[:, None, None]
        if not self.frozen_density:
            return PredictionPolicy(means, t, s)
        weights = means.sum(2)[:, None]
        widths = self.widths.to(x).expand(len(x), 1, -1)
        return MixturePolicy(Positions(self.event_shape, "whole"), weights, means[:, None], widths)


def test_a_flow_that_starts_next_to_the_noise_is_one_step() -> None:
    truth = closed_form("gmm-2d")
    x = truth.sample(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = get("pi-flow", eps=0.9999).log_prob(truth, x)
    assert out.status == "ok"
    noise = -0.5 * x.square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(out.log_prob, noise, atol=1e-2, rtol=0)


@pytest.mark.parametrize(("substeps", "tolerance"), [(32, 1e-2), (64, 1e-3)])
def test_true_posterior_gives_the_exact_likelihood_both_ways(substeps: int, tolerance: float) -> None:
    truth = closed_form("gmm-2d")
    x = truth.sample(200, generator=torch.Generator().manual_seed(0), t=1 - EPS, dtype=torch.float64)
    estimator = get("pi-flow", substeps=substeps, eps=EPS)
    out, drawn = estimator.log_prob(truth, x), estimator.sample(truth, 200, dtype=torch.float64)
    assert float((out.log_prob - truth.log_prob(x, 1 - EPS)).abs().max()) < tolerance
    assert drawn.log_prob is not None
    assert float((drawn.log_prob - truth.log_prob(drawn.x, 1 - EPS)).abs().max()) < tolerance


def test_truncation_is_reported_apart() -> None:
    truth = closed_form("gmm-2d")
    x = truth.sample(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = get("pi-flow", eps=EPS).log_prob(truth, x).extra["truncation"]
    missing = truth.log_prob(x) - truth.log_prob(x, 1 - EPS)
    assert float((found - missing).abs().max()) < 0.02 * float(missing.abs().max())
    assert "truncation" not in get("pi-flow", eps=0.0).log_prob(truth, x).extra


@pytest.mark.parametrize("task", ["gaussian-2d", "gmm-2d"])
@pytest.mark.parametrize("solver", ["rk4", "heun"])
def test_smooth_data_can_be_scored_at_the_data_end_itself(task: str, solver: str) -> None:
    truth = closed_form(task)
    x = truth.sample(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out = get("pi-flow", segments=3, substeps=256, solver=solver).log_prob(truth, x)
    assert float((out.log_prob - truth.log_prob(x)).abs().max()) < 2e-3


def runge_kutta(
    slopes: Any, state: tuple[Tensor, ...], t: float, s: float, substeps: int
) -> tuple[Tensor, ...]:
    """A state from t to s by the estimator's own substeps; ``slopes(state, time)`` are derivatives in t."""

    def moved(state: tuple[Tensor, ...], h: float, rates: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part + h * rate for part, rate in zip(state, rates, strict=True))

    for (h, before, middle, after), logit in _substeps(t, s, substeps):
        ks: list[tuple[Tensor, ...]] = []
        for share, time in ((0.0, before), (0.5, middle), (0.5, middle), (1.0, after)):
            at = moved(state, share * h, ks[-1]) if ks else state
            speed = time * (1 - time) if logit else 1.0
            ks.append(tuple(speed * rate for rate in slopes(at, time)))
        for weight, rates in zip((1, 2, 2, 1), ks, strict=True):
            state = moved(state, weight * h / 6, rates)
    return state


def at(value: float) -> Tensor:
    return torch.full((1,), value, dtype=torch.float64)


def carried(model: Asked, x: Tensor, segments: int, substeps: int) -> Tensor:
    """x_0 of one point (d,), segment by segment."""
    times = torch.linspace(1 - EPS, 0, segments + 1, dtype=torch.float64).tolist()
    for t, s in pairwise(times):
        policy = model.policy(x[None], at(t), at(s))
        (x,) = runge_kutta(lambda y, r, p=policy: (p.velocity(y[0][None], at(r))[0],), (x,), t, s, substeps)
    return x


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("kind", ["mixture", "predictions"])
def test_full_jacobian_is_the_log_determinant_of_the_whole_map(kind: str, segments: int) -> None:
    """Of the composition of all segments by autograd, not segment by segment."""
    model, x = Asked(kind=kind), points(6, 3)
    estimator = get("pi-flow", segments=segments, substeps=16 * segments, jacobian="full")
    whole = torch.func.vmap(torch.func.jacrev(lambda y: carried(model, y, segments, 16)))(x)
    end = torch.stack([carried(model, row, segments, 16) for row in x])
    expected = standard_normal_log_prob(end) + torch.linalg.slogdet(whole)[1]
    found = estimator.log_prob(model, x).log_prob
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)


def test_log_determinant_changes_by_the_trace_and_by_what_moves_the_policy() -> None:
    """d log |det J|/dt = tr A + tr(B J^-1), A the policy's own slope and B that in the point it was asked at."""
    model, x = Asked(), points(2, 3)
    full = get("pi-flow", substeps=128, jacobian="full").log_prob(model, x)

    def velocity(y: Tensor, anchor: Tensor, time: float) -> Tensor:
        return model.policy(anchor[None], at(1 - EPS), at(0.0)).velocity(y[None], at(time))[0]

    for row, expected in zip(x, full.log_prob, strict=True):

        def slopes(state: tuple[Tensor, ...], time: float, anchor: Tensor = row) -> tuple[Tensor, ...]:
            y, jacobian, _ = state
            a, b = torch.func.jacrev(velocity, argnums=(0, 1))(y, anchor, time)
            rate = a.trace() + torch.linalg.solve(jacobian.T, b.T).trace()
            return velocity(y, anchor, time), a @ jacobian + b, rate

        with torch.no_grad():
            start = (row, torch.eye(3, dtype=torch.float64), at(0.0)[0])
            y, _, change = runge_kutta(slopes, start, 1 - EPS, 0.0, 128)
        assert float(standard_normal_log_prob(y[None])[0] + change - expected) == pytest.approx(0, abs=1e-6)


def test_the_gap_between_full_and_frozen_stands_beside_the_estimate() -> None:
    model, x = Asked(), points(5, 3)
    frozen, full = (get("pi-flow", jacobian=kind).log_prob(model, x) for kind in ("frozen", "full"))
    torch.testing.assert_close(full.extra["frozen_gap"], full.log_prob - frozen.log_prob)
    assert full.extra["sign_changes"].shape == (5,)


def test_costs_are_networks_and_policies_apart() -> None:
    model, x = Asked(), points(5, 3)
    frozen = get("pi-flow", segments=2, substeps=32).log_prob(model, x)
    # four a substep, one substep more from t = 0.001 to 0, and one evaluation for the truncation
    assert frozen.cost == Cost(forwards=2, policy_calls=4 * 33 + 1, accepted_steps=2)
    heun = get("pi-flow", segments=2, substeps=32, solver="heun").log_prob(model, x)
    assert heun.cost.policy_calls == 2 * 33 + 1
    full = get("pi-flow", segments=2, substeps=32, jacobian="full").log_prob(model, x)
    assert (full.cost.forwards, full.cost.vjps) == (2, 6)
    drawn = get("pi-flow", segments=2).sample(model, 7, dtype=torch.float64, log_prob=False)
    assert drawn.cost.nfe == 2
    assert drawn.log_prob is None


def test_samples_carry_the_density_of_their_own_steps() -> None:
    """Scoring the samples of an exact policy by the same steps gives back what was said of them on the way."""
    truth, estimator = closed_form("gaussian-2d"), get("pi-flow", substeps=64, eps=EPS, jacobian="full")
    drawn = estimator.sample(truth, 6, dtype=torch.float64)
    torch.testing.assert_close(drawn.log_prob, estimator.log_prob(truth, drawn.x).log_prob, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn.log_prob, truth.log_prob(drawn.x, 1 - EPS), rtol=0, atol=1e-5)
    frozen = get("pi-flow", substeps=64, eps=EPS).sample(truth, 6, dtype=torch.float64)
    torch.testing.assert_close(frozen.x, drawn.x)


def test_more_segments_than_trained_names_what_works() -> None:
    out = get("pi-flow", segments=4).log_prob(Asked(), points(2, 3))
    assert out.status == "refused"
    assert out.reason == "the model was not trained for segments=4; use segments=1 or segments=2"


def test_frozen_estimate_of_predictions_is_refused_with_the_reason() -> None:
    model = Asked(kind="predictions")
    out = get("pi-flow").log_prob(model, points(2, 3))
    assert out.status == "refused"
    assert "whatever x is" in str(out.reason)
    assert "jacobian=full" in str(out.reason)
    assert get("pi-flow", jacobian="full").log_prob(model, points(2, 3)).status == "ok"


def test_other_models_and_large_determinants_are_refused() -> None:
    class Large:
        event_shape = (785,)
        policy = None

    class Plain:
        event_shape = (2,)

    assert "needs a policy flow" in str(get("pi-flow").log_prob(Plain(), points(2, 2)).reason)
    reason = get("pi-flow", jacobian="full").log_prob(Large(), points(2, 785)).reason
    assert "up to 784 dimensions, the model has 785; use jacobian=frozen" in str(reason)


class Broken(Asked):
    """A variance that is no number, in rows whose first coordinate is positive."""

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Any:
        found = super().policy(x, t, s)
        bad = (x[:, :1, None] > 0).expand_as(found.variances)
        return MixturePolicy(
            found.positions, found.log_weights, found.means, found.variances.masked_fill(bad, math.nan)
        )


def test_policies_without_a_finite_variance_are_invalid_and_diverge_where_all_are() -> None:
    x = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]], dtype=torch.float64)
    some = get("pi-flow").log_prob(Broken(), x)
    assert some.valid.tolist() == [False, True]
    assert some.status == "ok"
    assert "a variance is not positive in 1 of 2 rows" in str(some.reason)
    none = get("pi-flow").log_prob(Broken(), x[:1])
    assert none.status == "diverged"
    assert "not finite or a variance is not positive in 1 of 1 rows" in str(none.reason)


def test_steps_that_are_not_finite_diverge_with_the_reason() -> None:
    class Exploding:
        event_shape = (2,)

        def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Any:
            return self

        def velocity(self, x: Tensor, t: Tensor) -> Tensor:
            return 1e30 * x**5

        def divergence(self, x: Tensor, t: Tensor) -> Tensor:
            return x.sum(1)

    x = points(3, 2)
    out = get("pi-flow").log_prob(Exploding(), x)
    assert out.status == "diverged"
    assert "do not stay finite in 3 of 3 rows; more than substeps=32 may help" in str(out.reason)
    some = get("pi-flow").log_prob(Exploding(), x.index_fill(0, torch.tensor([1]), 0.0))
    assert some.status == "ok"
    assert some.valid.tolist() == [False, True, False]
    assert "in 2 of 3 rows" in str(some.reason)


def test_samples_of_broken_policies_are_no_numbers_and_say_why() -> None:
    drawn = get("pi-flow").sample(Broken(), 40, dtype=torch.float64)
    assert 0 < int(drawn.valid.sum()) < 40
    assert bool(drawn.x[~drawn.valid].isnan().all())
    assert "a variance is not positive in" in str(drawn.reason)


def test_likelihood_is_differentiable_in_points_and_parameters() -> None:
    model = Asked()
    x = points(3, 3).requires_grad_()
    for kind in ("frozen", "full"):
        out = get("pi-flow", substeps=8, jacobian=kind).log_prob(model, x, differentiable=True)
        found = torch.autograd.grad(out.log_prob.sum(), [model.matrix, x])
        assert all(bool((part != 0).any()) for part in found)


def test_anchored_and_rotated_policies_are_followed_as_they_are() -> None:
    policy = random_policy((6,), "position", "component", anchored=False, rotated=True)

    class Fixed:
        event_shape = (6,)

        def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> MixturePolicy:
            return policy.rows(slice(0, len(x)))

    x = points(5, 6)
    one, four = (get("pi-flow", segments=n, substeps=256).log_prob(Fixed(), x).log_prob for n in (1, 4))
    torch.testing.assert_close(one, four, rtol=0, atol=1e-5)
