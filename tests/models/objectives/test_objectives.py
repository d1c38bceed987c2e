"""Every condition holds for the exact joint map, and fails for a wrong one; the faults do what they are named for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.images import CATALOG
from flowlik_models.objectives import CONDITIONS, Context, evaluation, residuals
from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.round_trip import round_trip_errors
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import batches
from flowlik_models.training.batches import draw_times

TRUTH = closed_form("gaussian-2d")
OFF_DIAGONAL = sorted(set(CONDITIONS) - {"direct"})


def batch(n: int = 100) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x = TRUTH.sample(n, generator=generator, dtype=torch.float64)
    t, s = (torch.rand(n, dtype=torch.float64, generator=generator) for _ in range(2))
    s[:10] = t[:10]
    return Batch(x, t, s, *TRUTH.velocity_and_divergence(x, t))


def context(**options: object) -> Context:
    target = evaluation(TRUTH, joint=True)
    made = Context(target=target, field=lambda x, t: TRUTH.velocity_and_divergence(x, t), derivative="jvp")
    return dataclasses.replace(made, **options)


class Off:
    """The exact joint map with its average divergence off by a constant."""

    def joint(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        u, divergence = TRUTH.joint(x, t, s)
        return u, divergence + 0.1


@pytest.mark.parametrize("velocity", OFF_DIAGONAL)
@pytest.mark.parametrize("divergence", OFF_DIAGONAL)
def test_exact_map_meets_every_pair_of_conditions(velocity: str, divergence: str) -> None:
    found = residuals(TRUTH, batch(), CONDITIONS[velocity], CONDITIONS[divergence], context())
    assert all(error.shape == (100,) for error in found.values())
    assert max(float(error.max()) for error in found.values()) < 1e-20


@pytest.mark.parametrize("name", OFF_DIAGONAL)
def test_wrong_divergence_fails_every_condition_and_leaves_the_velocity(name: str) -> None:
    found = residuals(Off(), batch(), CONDITIONS[name], CONDITIONS[name], context())
    assert float(found["divergence"].min()) == pytest.approx(0.05**2, rel=1e-6)
    assert float(found["velocity"].max()) < 1e-20


@pytest.mark.parametrize("name", ["lsd", "esd", "meanflow"])
def test_differences_stand_in_for_derivatives(name: str) -> None:
    condition = CONDITIONS[name]
    found = residuals(TRUTH, batch(), condition, condition, context(derivative="difference"))
    assert max(float(error.mean()) for error in found.values()) < 1e-5


def test_map_alone_has_no_divergence_error() -> None:
    alone = dataclasses.replace(batch(), divergence=None)
    target = evaluation(TRUTH, joint=False)
    condition = CONDITIONS["shortcut"]
    assert set(residuals(TRUTH, alone, condition, condition, context(target=target))) == {"velocity"}


@pytest.mark.parametrize("name", ["lsd", "esd"])
def test_gradients_pass_through_the_derivative(name: str) -> None:
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)

    class Scaled:
        def joint(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            u, divergence = TRUTH.joint(x, t, s)
            return u, scale * divergence * (1 + s - t)

    loss = residuals(Scaled(), batch(), CONDITIONS[name], CONDITIONS[name], context())["divergence"].mean()
    (slope,) = torch.autograd.grad(loss, scale)
    before = float(loss.detach())
    with torch.no_grad():
        scale += 1e-5
        ahead = residuals(Scaled(), batch(), CONDITIONS[name], CONDITIONS[name], context())
    after = float(ahead["divergence"].mean().detach())
    assert float(slope) == pytest.approx((after - before) / 1e-5, rel=1e-3)


def test_direct_regression_refuses_rows_without_averages() -> None:
    with pytest.raises(ValueError, match="90 rows off the diagonal without their averages"):
        residuals(TRUTH, batch(), CONDITIONS["direct"], CONDITIONS["direct"], context())
    known = dataclasses.replace(batch(), direct=torch.ones(100, dtype=torch.bool))
    found = residuals(TRUTH, known, CONDITIONS["direct"], CONDITIONS["direct"], context())
    assert (
        float(found["velocity"][:10].max()) < 1e-20
    )  # the diagonal is right, averages differ from the field
    assert float(found["velocity"][10:].max()) > 1e-3


def test_divergence_of_shape_batch_by_one_is_refused() -> None:
    wrong = dataclasses.replace(batch(), divergence=torch.zeros(100, 1, dtype=torch.float64))
    with pytest.raises(AssertionError):
        residuals(TRUTH, wrong, CONDITIONS["meanflow"], CONDITIONS["meanflow"], context())


# --- the faults of the released code ------------------------------------------------------------------------


def test_broadcast_error_adds_the_spread_of_the_targets() -> None:
    condition = CONDITIONS["shortcut"]
    found = residuals(TRUTH, batch(), condition, condition, context(broadcast=True))["divergence"]
    assert float(found[:10].max()) < 1e-20  # the diagonal was right in the released code
    moving = batch().moving()
    targets = TRUTH.joint(batch().x, batch().t, batch().s)[1][moving] / 2
    expected = targets.var(correction=0) + (targets - targets.mean()).square()
    torch.testing.assert_close(found[moving], expected)


def released(**options: object) -> Recipe:
    return Recipe(objective="shortcut").with_options(dyadic=True, diagonal=0.0, **options)


def test_one_direction_draws_times_towards_the_data_only() -> None:
    generator = torch.Generator().manual_seed(0)
    both, one = released(), released(faults=("one-direction",))
    t, s = draw_times(1000, 1.0, both, generator)
    assert 0.4 < float((t < s).float().mean()) < 0.6
    t, s = draw_times(1000, 1.0, one, generator)
    assert bool((t < s).all())


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24])
def test_all_rows_of_direct_regression_are_on_the_diagonal(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the uniform draw is: one of 2^24 is 0."""
    monkeypatch.setattr(batches, "_uniform", lambda n, generator: torch.full((n,), value))
    generator = torch.Generator().manual_seed(0)
    recipe = Recipe(objective="meanflow").with_options(
        objective="direct", divergence=True, direct=0.9, pool=8
    )
    t, s = draw_times(8, 1.0, recipe, generator)
    assert torch.equal(t, s)
    t, s = draw_times(8, 1.0, Recipe(objective="meanflow").with_options(diagonal=0.0, ends=0.0), generator)
    assert bool((t != s).any())


def test_dyadic_steps_start_at_multiples_of_their_length() -> None:
    t, s = draw_times(1000, 1.0, released(), torch.Generator().manual_seed(0))
    parts = 1 / (t - s).abs()
    assert torch.equal(parts, 2 ** parts.log2().round())
    assert {int(k) for k in parts.log2()} == set(range(8))
    assert bool((t * parts).frac().abs().lt(1e-6).all())


def test_shortest_steps_are_field_steps_unless_the_hole_is_there() -> None:
    shortest = 1 / 128
    x, t = batch().x, torch.full((100,), 0.5, dtype=torch.float64)
    rows = Batch(x, t, t + shortest, *TRUTH.velocity_and_divergence(x, t))
    asked: list[float] = []

    def target(x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        asked.append(float((s - t).abs().max()))
        return TRUTH.joint(x, t, s)

    for smallest, lengths in ((shortest, [0.0, 0.0]), (0.0, [shortest / 2] * 2)):
        asked.clear()
        options = context(target=target, smallest=smallest, middle="half")
        residuals(TRUTH, rows, CONDITIONS["shortcut"], CONDITIONS["shortcut"], options)
        assert asked == pytest.approx(lengths)


# --- recipes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "meanflo"}, "unknown objective 'meanflo'"),
        ({"divergence_scale": 0.0}, "divergence_scale must be positive, got 0"),
        ({"faults": ("broadcasts",)}, "unknown fault 'broadcasts'"),
        ({"faults": ("step-hole",)}, "needs objective shortcut with dyadic steps"),
        ({"objective": "flow-matching", "divergence": True}, "no divergence head"),
        ({"divergence_objective": "lsd"}, "divergence is off"),
        ({"objective": "direct"}, "needs a share of direct rows"),
        ({"direct": 0.5}, "needs a pool"),
        ({"teacher": "data"}, "on the path only"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(objective="meanflow").with_options(**options)


def test_every_task_without_image_files_has_the_whole_family() -> None:
    family = {
        "meanflow-f2d2",
        "shortcut-f2d2",
        "shortcut-distill-f2d2",
        "lsd-f2d2",
        "esd-f2d2",
        "direct-f2d2",
    }
    for task, models in RECIPES.items():
        own = (
            {"direct-f2d2", "teacher"} if task == "digits-flow" else family
        )  # which judges a teacher and its map
        assert own <= set(models) or task in CATALOG, task


class Folded:
    """Every step maps x to its modulus, so that half of the plane does not come back."""

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        assert cond is None
        return (x.abs() - x) / (s - t)[:, None]


def test_a_map_that_is_a_flow_comes_back_and_one_that_folds_does_not() -> None:
    rows = batch()
    assert float(round_trip_errors(TRUTH, rows).max()) < 1e-20
    moved = rows.rows(rows.moving())
    off = round_trip_errors(Folded(), moved)
    assert off.shape == moved.t.shape
    expected = (moved.x.abs() - moved.x).square().mean(1)
    torch.testing.assert_close(off, expected)


def test_the_round_trip_is_of_flow_maps_and_its_weight_is_not_negative() -> None:
    with pytest.raises(ValueError, match="round_trip has no effect with objective energy"):
        RECIPES["gmm-2d"]["energy"].with_options(round_trip=1.0)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="round_trip is a weight of at least 0"):
            Recipe(objective="meanflow").with_options(round_trip=wrong)
