"""One-step generators: every route on maps of known density, folds included; what is refused, and what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowlik_estimators import generator, get, standard_normal_log_prob
from flowlik_models.closed_forms.gaussian import Gaussian

LINEAR = torch.tensor([[1.5, 0.4], [-0.3, 0.7]], dtype=torch.float64)
SHIFT = torch.tensor([0.5, -2.0], dtype=torch.float64)


class Affine(nn.Module):
    """x = A z + b, with the exact flow of the same Gaussian as fake model and as joint map."""

    event_shape = (2,)
    networks = ("inner", "fake")

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, dtype=torch.float64)
        self.inner.weight.data.copy_(LINEAR)
        self.inner.bias.data.copy_(SHIFT)
        self.fake = Gaussian(SHIFT, LINEAR @ LINEAR.T)

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.inner(z.double()).to(z)  # type: ignore[no-any-return]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.fake.joint(x, t, s)


class Fold(nn.Module):
    """x = |z| + tilt z in one dimension: two roots wherever x > 0, of slopes tilt + 1 and tilt - 1; none below."""

    event_shape = (1,)

    def __init__(self, tilt: float = 0.25) -> None:
        super().__init__()
        self.tilt = tilt

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return z.abs() + self.tilt * z

    def log_prob(self, x: Tensor) -> Tensor:
        roots = torch.stack([x / (self.tilt + 1), x / (self.tilt - 1)])
        slopes = torch.tensor([1 + self.tilt, 1 - self.tilt], dtype=x.dtype)
        return torch.stack(
            [standard_normal_log_prob(z) - slope.log() for z, slope in zip(roots, slopes, strict=True)]
        ).logsumexp(0)


class Shifted(nn.Module):
    """x = z + x_0: conditioned on x_0."""

    event_shape = (2,)
    conditional = True

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        return z + cond


def points(n: int = 40, d: int = 2) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize(("route", "within"), [("invert", 1e-9), ("fake-flow", 1e-4), ("head", 1e-9)])
def test_every_route_knows_the_density_of_an_affine_map(route: str, within: float) -> None:
    x = SHIFT + 1.5 * points()
    exact = Gaussian(SHIFT, LINEAR @ LINEAR.T).log_prob(x)
    out = get("generator", route=route).log_prob(Affine(), x)
    assert out.status == "ok"
    assert float((out.log_prob - exact).abs().max()) < within


@pytest.mark.parametrize("route", ["own-samples", "invert", "fake-flow", "head"])
def test_samples_come_with_the_density_of_the_map(route: str) -> None:
    out = get("generator", route=route).sample(Affine(), 50, dtype=torch.float64)
    exact = Gaussian(SHIFT, LINEAR @ LINEAR.T).log_prob(out.x)
    assert out.log_prob is not None
    assert float((out.log_prob - exact).abs().max()) < 1e-4


def test_a_fold_sums_its_two_roots_and_reports_both_signs() -> None:
    model, x = Fold(), points(d=1).abs() + 0.05
    out = get("generator").log_prob(model, x)
    torch.testing.assert_close(out.log_prob, model.log_prob(x), atol=1e-8, rtol=0)
    assert set(out.extra["roots"].tolist()) == {2}
    assert set(out.extra["negative_roots"].tolist()) == {1}
    assert "folds" in str(out.reason)


class Waves(nn.Module):
    """x = z + swing sin(speed z)/speed on each axis: with swing above 1 it folds again and again."""

    def __init__(self, speed: float, swing: float = 3.0, d: int = 1, shift: float = 0.0) -> None:
        super().__init__()
        self.speed, self.swing, self.shift = speed, swing, shift
        self.event_shape = (d,)

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return z + self.swing * (self.speed * z).sin() / self.speed + self.shift

    def roots(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How many roots each x (n,) has, and log p there, by bisection between all points of a fine grid."""
        z = torch.linspace(-9, 9, 300_001, dtype=torch.float64)
        image = self.generate(z)
        counts, values = [], []
        for point in x.double():
            side = image >= point
            low = (side[1:] != side[:-1]).nonzero()[:, 0]
            a, b, left = z[low].clone(), z[low + 1].clone(), side[low]
            for _ in range(50):
                middle = (a + b) / 2
                same = (self.generate(middle) >= point) == left
                a, b = torch.where(same, middle, a), torch.where(same, b, middle)
            slope = 1 + self.swing * (self.speed * a).cos()
            counts.append(len(a))
            values.append((standard_normal_log_prob(a[:, None]) - slope.abs().log()).logsumexp(0))
        return torch.tensor(counts), torch.stack(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("speed", "swing", "most"), [(5.0, 12.0, 9), (5.0, 20.0, 13), (2.0, 20.0, 13)])
def test_starts_are_doubled_until_all_roots_are_found(
    speed: float, swing: float, most: int, dtype: torch.dtype
) -> None:
    model, x = Waves(speed, swing), points(60, 1).to(dtype)
    counts, truth = model.roots(x[:, 0])
    assert int(counts.max()) == most
    out = get("generator").log_prob(model, x)
    assert bool((out.extra["roots"] <= counts).all())  # none counts twice
    assert float((out.log_prob - truth).abs().mean()) < 1e-4
    assert float((_eight_starts(model, x) - truth).abs().mean()) > 0.05


def test_few_rows_try_several_halves_at_once_and_find_the_same_roots() -> None:
    """Each round takes Jacobians: a row that halves its step time and again would have as many as it has halves."""
    model, x = Waves(5.0, swing=12.0), points(6, 1)
    outs, calls = zip(*(_inverted(model, x, together) for together in (1, generator.TOGETHER)), strict=True)
    for part in ("roots", "negative_roots", "starts", "unsettled"):
        torch.testing.assert_close(outs[1].extra[part], outs[0].extra[part], atol=0, rtol=0)
    torch.testing.assert_close(outs[1].log_prob, outs[0].log_prob, atol=1e-8, rtol=0)
    assert outs[1].cost.vjps == outs[0].cost.vjps
    assert 3 * calls[1] < 2 * calls[0]


def _inverted(model: nn.Module, x: Tensor, together: int) -> tuple[Any, int]:
    """The estimate with so many trial points in an evaluation of few, and how many calls took Jacobians."""
    calls = []
    taken = generator._with_jacobian
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "TOGETHER", together)
        patch.setattr(
            generator, "_with_jacobian", lambda *args, **rest: calls.append(1) or taken(*args, **rest)
        )
        return get("generator").log_prob(model, x), len(calls)


def _eight_starts(model: nn.Module, x: Tensor) -> Tensor:
    """log p from the roots that eight starts find."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "STILL", 0)
        return get("generator").log_prob(model, x).log_prob


@pytest.mark.parametrize("starts", [8, 26, 32, 64])
def test_no_root_counts_twice_however_many_starts_there_are(starts: int) -> None:
    """Far from zero in single precision, where distances by products are off by more than roots lie apart."""
    model = Affine()
    x = (SHIFT + 4.0 * points()).float()
    out = get("generator", starts=starts).log_prob(model, x)
    assert set(out.extra["roots"].tolist()) == {1}
    exact = Gaussian(SHIFT, LINEAR @ LINEAR.T).log_prob(x.double())
    assert float((out.log_prob - exact).abs().max()) < 1e-3
    waves = Waves(5.0, swing=12.0)
    x = points(40, 1).float()
    counts, _ = waves.roots(x[:, 0])
    assert bool((get("generator", starts=starts).log_prob(waves, x).extra["roots"] <= counts).all())


def test_one_root_takes_four_times_the_starts_and_says_nothing() -> None:
    out = get("generator").log_prob(Affine(), points())
    assert set(out.extra["starts"].tolist()) == {32.0}
    assert not out.extra["unsettled"].any()
    assert out.reason is None


def test_roots_that_do_not_stand_still_are_said_with_their_share() -> None:
    """Half of the rows lie where there is one root, half where there are hundreds."""

    class Half(Waves):
        def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return torch.where(z < 0, z - 3, super().generate(z))

    model = Half(200.0, swing=60.0)
    x = torch.cat([torch.linspace(-5, -4, 30), torch.linspace(0.2, 1.2, 30)])[:, None].double()
    out = get("generator").log_prob(model, x)
    assert out.extra["unsettled"][:30].sum() == 0
    share = float(out.extra["unsettled"].mean())
    assert 0.4 < share <= 0.5
    assert f"the roots of {100 * share:.3g} % of the rows did not stand still" in str(out.reason)
    assert set(out.extra["starts"][out.extra["unsettled"] == 1].tolist()) == {512.0}


def test_own_samples_of_a_fold_have_one_root_of_two() -> None:
    model = Fold()
    own, whole = (
        get("generator", route=route).sample(model, 60, dtype=torch.float64)
        for route in ("own-samples", "invert")
    )
    assert torch.equal(own.x, whole.x)
    assert own.log_prob is not None
    assert whole.log_prob is not None
    torch.testing.assert_close(whole.log_prob, model.log_prob(own.x), atol=1e-8, rtol=0)
    assert bool((own.log_prob < whole.log_prob).all())
    assert "folds" in str(own.reason)


def test_points_without_a_root_have_density_nought_and_are_invalid() -> None:
    x = torch.tensor([[1.0], [-1.0], [2.0], [-0.01]], dtype=torch.float64)
    out = get("generator").log_prob(Fold(), x)
    assert out.valid.tolist() == [True, False, True, False]
    assert out.log_prob[~out.valid].tolist() == [-math.inf, -math.inf]
    assert "no root of G(z) = x found for 2 of 4 rows" in str(out.reason)
    torch.testing.assert_close(out.extra["residual"][1], torch.tensor(1.0).double(), atol=1e-2, rtol=0)
    assert float(out.extra["failed_starts"][1]) == 1.0
    nothing = get("generator").log_prob(Fold(), -points(5, 1).abs())
    assert nothing.status == "diverged"
    assert "5 of 5 rows" in str(nothing.reason)
    assert nothing.log_prob.tolist() == [-math.inf] * 5
    assert nothing.extra["roots"].tolist() == [0] * 5
    assert set(nothing.extra) == set(out.extra)
    x = -points(5, 1).abs().requires_grad_()
    assert get("generator").log_prob(Fold(), x, differentiable=True).status == "diverged"


def test_density_of_a_crooked_map_integrates_to_one() -> None:
    class Crooked(nn.Module):
        event_shape = (2,)

        def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return torch.stack((z[:, 0] + 0.5 * (2 * z[:, 1]).sin(), z[:, 1] + 0.3 * (2 * z[:, 0]).cos()), 1)

    side = torch.linspace(-6, 6, 61, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    out = get("generator").log_prob(Crooked(), grid)
    assert bool(out.valid.all())
    mass = float(out.log_prob.exp().sum()) * float(side[1] - side[0]) ** 2
    assert abs(mass - 1) < 1e-3


def test_condition_reaches_every_start() -> None:
    x, cond = points(), 3 * points(40).flip(0)
    out = get("generator").log_prob(Shifted(), x, cond=cond)
    torch.testing.assert_close(out.log_prob, standard_normal_log_prob(x - cond), atol=1e-9, rtol=0)
    without = get("generator").log_prob(Shifted(), x)
    assert without.status == "refused"
    assert "cond=" in str(without.reason)


def test_gradient_is_that_of_the_density() -> None:
    model, x = Affine(), points(10).requires_grad_()
    out = get("generator").log_prob(model, x, differentiable=True)
    exact = Gaussian(SHIFT, LINEAR @ LINEAR.T).log_prob(x)
    found, expected = (
        torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (out.log_prob, exact)
    )
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-8)
    torch.autograd.backward(out.log_prob.sum())
    weight, bias = (nn.Parameter(part.clone()) for part in (LINEAR, SHIFT))
    z = torch.linalg.solve(weight, (x.detach() - bias).T).T
    torch.autograd.backward((standard_normal_log_prob(z) - torch.linalg.slogdet(weight)[1]).sum())
    assert weight.grad is not None
    torch.testing.assert_close(model.inner.weight.grad, weight.grad, atol=1e-7, rtol=1e-7)


def test_cost_counts_bank_newton_steps_and_trials() -> None:
    x, model = points(64), Affine()
    cost = get("generator", starts=2).log_prob(model, x).cost
    # a bank of 1024; one Jacobian at each start, one full step that lands, one Jacobian there (steps may be capped)
    assert cost.forwards >= 1024 / 64 + 2 * 3
    assert cost.vjps >= 2 * 2 * 2
    own = get("generator", route="own-samples").sample(model, 64).cost
    assert (own.forwards, own.vjps) == (1, 2)
    flow = get("generator", route="fake-flow").log_prob(model, x).cost
    assert flow.forwards > 0
    assert flow.vjps == 2 * flow.forwards


def test_fake_model_without_a_name_for_the_counter_is_counted() -> None:
    model = Affine()
    model.networks = ()  # type: ignore[assignment]
    assert get("generator", route="fake-flow").log_prob(model, points(8)).cost.forwards > 0


def test_routes_a_model_does_not_support_name_those_that_work() -> None:
    class Bare(nn.Module):
        event_shape = (2,)

        def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return z

    mixed_in = Affine()
    mixed_in.fake_is_flow = False  # type: ignore[assignment]
    cases: list[tuple[Any, str, str]] = [
        (Bare(), "fake-flow", "needs a fake model .*; use route=invert or route=own-samples"),
        (Bare(), "head", "needs a joint flow map .*; use route=invert or route=own-samples"),
        (mixed_in, "fake-flow", "fitted to real data too.*; use route=invert or .* or route=head"),
        (Gaussian(SHIFT, LINEAR @ LINEAR.T), "fake-flow", "needs a fake model"),
    ]
    for model, route, message in cases:
        out = get("generator", route=route).log_prob(model, points())
        assert out.status == "refused"
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(out.reason)
    own = get("generator", route="own-samples").log_prob(Bare(), points())
    assert own.status == "refused"
    assert "use route=invert" in str(own.reason)


def test_options_without_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="starts has no effect with route=head"):
        get("generator", route="head", starts=4)
    with pytest.raises(ValueError, match="at most 1024"):
        get("generator", starts=5000)
    with pytest.raises(ValueError, match="unknown route"):
        get("generator", route="newton")
