"""Conditional paths, the RealUID loss and its training: what is compared with what, and that it resumes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowlik.tasks.registry import get_task
from flowlik.training.card import accuracy
from flowlik_estimators import get
from flowlik_models.checkpoints import CheckpointError, read_checkpoint
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.coupling import TurnedPairs
from flowlik_models.conditional_paths import PATHS, PathName, ends, mixed, weight
from flowlik_models.networks.one_step import OneStepGenerator, PathField
from flowlik_models.objectives.realuid import (
    Draw,
    RealUID,
    _on_path,
    averaged_target,
    fake_loss,
    generator_loss,
    matching_loss,
    monotone_penalty,
    realuid_loss,
    slope_error,
)
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import trainer
from flowlik_models.training.generated_flow import GeneratedFlow
from flowlik_models.training.trainer import train
from flowlik_models.training.trajectories import solve
from flowlik_models.zoo import load_model, recipe_for

EVERY = pytest.mark.parametrize("name", PATHS)
MEAN, VALUES = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.3, 2.0]).double()


def field(name: Any, *, trained: float = 0.0) -> PathField:
    torch.manual_seed(0)
    made = PathField(MEAN, VALUES, torch.eye(2).double(), path=name, hidden=16, depth=2, gate_rank=4).double()
    for parameter in made.parameters():
        parameter.data.add_(trained * torch.randn_like(parameter))
    return made


def draw(n: int, *, paired: bool, seed: int = 0) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    data, noise, latent, start = (
        torch.randn(n, 2, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    t = 0.02 + 0.96 * torch.rand(n, generator=generator, dtype=torch.float64)
    return Draw(MEAN + VALUES.sqrt() * data, noise, latent, t, start if paired else None)


def one_step(name: Any = "flow-matching") -> OneStepGenerator:
    parts = [field(name, trained=0.2) for _ in range(2)]
    return OneStepGenerator(*parts, name, MEAN, VALUES, start=0.3, fake_is_flow=True).double()


@EVERY
def test_target_and_point_give_back_data_and_noise(name: Any) -> None:
    path = PATHS[name]
    d = draw(50, paired=path.paired)
    x, target = _on_path(path, d.data, d)
    data, noise = ends(path, x, d.t, target, d.start)
    torch.testing.assert_close(data, d.data, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(noise, d.noise, atol=1e-9, rtol=1e-9)


@EVERY
def test_targets_are_those_of_their_frameworks(name: Any) -> None:
    path = PATHS[name]
    d = draw(50, paired=path.paired)
    x, target = _on_path(path, d.data, d)
    t = d.t[:, None]
    start = d.start if d.start is not None else torch.zeros(1)
    gamma = (2 * t * (1 - t)).sqrt()
    expected = {
        "flow-matching": d.data - d.noise,
        "noise": d.noise,
        "data": d.data,
        "bridge": (d.data - x) / (1 - t),
        "interpolant": d.data - start + (1 - 2 * t) / gamma * d.noise,
    }[name]
    torch.testing.assert_close(target, expected, atol=1e-9, rtol=1e-9)
    if name in ("noise", "data"):
        a, _, g = path.point(d.t)
        torch.testing.assert_close(a.square() + g.square(), torch.ones_like(a))


@EVERY
def test_untrained_field_is_the_regression_on_gaussian_data(name: Any) -> None:
    """No function of x_t (and x_0) beats the closed form, and its error is the variance that x_t leaves open."""
    path, d = PATHS[name], draw(40_000, paired=PATHS[name].paired)
    x, target = _on_path(path, d.data, d)
    error = target - field(name)(x, d.t, cond=d.start).detach()
    (a, _, g), (alpha, _, gamma) = (
        tuple(c[:, None] for c in parts) for parts in (path.point(d.t), path.target(d.t))
    )
    open_variance = (alpha * g - gamma * a).square() * VALUES / (a.square() * VALUES + g.square())
    whitened = error / open_variance.sqrt()
    assert float((whitened.square().mean(0) - 1).abs().max()) < 0.03
    centred = (x - a * MEAN) if d.start is None else (x - a * MEAN - (1 - d.t[:, None]) * d.start)
    seen = centred / (a.square() * VALUES + g.square()).sqrt()
    assert float((whitened * seen).mean(0).abs().max()) < 0.02  # nothing linear is left in the point


@pytest.mark.parametrize("name", ["flow-matching", "noise", "data"])
def test_velocity_of_every_framework_is_the_flow_of_its_path(name: Any) -> None:
    net, path = field(name), PATHS[name]
    rates = path.rates(torch.tensor([0.4, 0.7]).double())
    assert rates is not None
    t = torch.tensor([0.4, 0.7]).double().requires_grad_()
    a, _, g = path.point(t)
    for coefficient, rate in zip((a, g), rates, strict=True):
        (exact,) = torch.autograd.grad(coefficient.sum(), t, retain_graph=True)
        torch.testing.assert_close(rate, exact)
    x = torch.randn(2, 2, dtype=torch.float64)
    a, g = (part.detach()[:, None] for part in (a, g))
    # of N(m, L): dm_t/dt + (dw/dt)/(2 w) (x - m_t), w the variance of the path
    w = a.square() * VALUES + g.square()
    slope = (a * rates[0][:, None] * VALUES + g * rates[1][:, None]) / w
    torch.testing.assert_close(net.velocity(x, t.detach()), rates[0][:, None] * MEAN + slope * (x - a * MEAN))


def test_frameworks_that_start_from_a_point_have_no_ode_and_need_it() -> None:
    for name in ("bridge", "interpolant"):
        assert not hasattr(field(name), "velocity")
        with pytest.raises(ValueError, match="needs x_0 as cond"):
            field(name)(torch.zeros(3, 2).double(), torch.full((3,), 0.5).double())
    with pytest.raises(ValueError, match="takes no cond"):
        field("noise")(torch.zeros(3, 2).double(), torch.full((3,), 0.5).double(), cond=torch.zeros(3, 2))


def published(model: Any, of: Any, path: Any, d: Draw, a: float, b: float) -> Tensor:
    """The loss with its squares, as published, (1 - b)/(1 - a) and b/a included."""
    made = model.generate(d.latent, cond=d.start)
    total = torch.zeros(())
    for data, share, ratio in ((made, a, b / a), (d.data, 1 - a, (1 - b) / (1 - a))):
        x, target = _on_path(path, data, d)
        square = (of(x, d.t, cond=d.start) - ratio * target).square().mean(1)
        total = total + share * (weight(path, d.t) * square).mean()
    return total


@EVERY
def test_expanded_loss_is_the_published_one(name: Any) -> None:
    model, teacher, path = one_step(name), field(name, trained=0.1), PATHS[name]
    d = draw(30, paired=path.paired)
    a, b = 0.94, 0.96
    fake = list(model.fake.parameters())
    found, expected = (
        torch.autograd.grad(loss, fake, allow_unused=True)
        for loss in (fake_loss(model, path, d, a, b), published(model, model.fake, path, d, a, b))
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    loss = generator_loss(model, teacher, path, d, a, b)
    difference = published(model, teacher, path, d, a, b) - published(model, model.fake, path, d, a, b)
    # the real-data terms of the two fields do not depend on the generator
    real = torch.zeros(())
    for of, sign in ((teacher, 1), (model.fake, -1)):
        x, target = _on_path(path, d.data, d)
        square = (of(x, d.t, cond=d.start) - (1 - b) / (1 - a) * target).square().mean(1)
        real = real + sign * (1 - a) * (weight(path, d.t) * square).mean()
    torch.testing.assert_close(loss, difference - real, atol=1e-9, rtol=1e-7)


@EVERY
def test_data_free_case_is_matching_on_generated_points(name: Any) -> None:
    """a = b = 1: the fake model regresses the generator's targets; the generator's loss is a gap of two such errors."""
    model, teacher, path = one_step(name), field(name, trained=0.1), PATHS[name]
    d = draw(30, paired=path.paired)
    with torch.no_grad():
        made = model.generate(d.latent, cond=d.start)
    own = Draw(made, d.noise, d.latent, d.t, d.start)
    fake = list(model.fake.parameters())
    found = torch.autograd.grad(fake_loss(model, path, d, 1.0, 1.0), fake)
    expected = torch.autograd.grad(matching_loss(model.fake, path, own), fake)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    gap = matching_loss(teacher, path, own) - matching_loss(model.fake, path, own)
    torch.testing.assert_close(generator_loss(model, teacher, path, d, 1.0, 1.0), gap, atol=1e-9, rtol=1e-7)


def test_losses_reach_the_network_they_are_meant_for_and_no_other() -> None:
    model, teacher, path = one_step(), field("flow-matching"), PATHS["flow-matching"]
    d = draw(20, paired=False)

    def reached(step: int) -> tuple[bool, bool]:
        model.zero_grad(set_to_none=True)
        options = RealUID(a=0.94, b=0.96, fake_steps=2, settle=0.25)
        torch.autograd.backward(realuid_loss(model, model, teacher, path, d, options, step, 8))
        return tuple(
            any(p.grad is not None for p in net.parameters()) for net in (model.generator, model.fake)
        )  # type: ignore[return-value]

    # two of the fake model's, one of the generator's, and from step 6 on only the fake model's
    assert [reached(step) for step in range(8)] == 2 * [(False, True), (False, True), (True, False)] + 2 * [
        (False, True)
    ]
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())


def test_settling_takes_over_the_averaged_generator_and_forgets_real_data() -> None:
    model, average, path = one_step(), one_step(), PATHS["flow-matching"]
    for parameter in average.parameters():
        parameter.data.mul_(0.5)
    d = draw(20, paired=False)
    options = RealUID(a=0.94, b=0.96, settle=0.5)
    loss = realuid_loss(model, average, field("flow-matching"), path, d, options, 4, 8)
    for ours, theirs in zip(model.generator.parameters(), average.generator.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(loss, fake_loss(model, path, d, 1.0, 1.0))


def test_each_stage_has_a_schedule_of_its_own() -> None:
    """The rate falls from its peak to nothing within a stage, and the distillation's peak is lower."""
    options = RealUID(warm=0.5, settle=0.25, rate=0.1)
    recipe = recipe_for("gmm-2d", "realuid").with_options(
        realuid=options, steps=8_000, pool=64, learning_rate=1e-3
    )
    rates = [trainer._learning_rate(recipe, step) for step in range(8_000)]
    for first, last, peak in ((0, 4_000, 1e-3), (4_000, 6_000, 1e-4), (6_000, 8_000, 1e-3)):
        assert options.stage(first, 8_000)[:2] == options.stage(last - 1, 8_000)[:2] == (first, last)
        assert 0.9 * peak < max(rates[first:last]) <= peak
        assert rates[last - 1] <= 1e-2 * peak
        assert rates[first] <= 0.02 * peak  # moments of the other networks' gradients: warmed up anew


@pytest.mark.parametrize("name", ["flow-matching", "noise", "data"])
def test_averaged_targets_are_the_posterior_mean_over_the_batch(name: PathName) -> None:
    """Against a sum over the batch with the normal densities themselves, row by row."""
    path, d = PATHS[name], draw(30, paired=False)
    x = mixed(path.point(d.t), d.data, None, d.noise)
    found = averaged_target(path, x, d.t, d.data)
    a, _, g = path.point(d.t)
    for i in range(30):
        noises = (x[i] - a[i] * d.data) / g[i]
        density = torch.distributions.Normal(0.0, 1.0).log_prob(noises).sum(1).exp()
        each = mixed(tuple(part[i].expand(30) for part in path.target(d.t)), d.data, None, noises)  # type: ignore[arg-type]
        torch.testing.assert_close(found[i], (density[:, None] * each).sum(0) / density.sum())
    assert averaged_target(path, d.data, torch.ones_like(d.t), d.data).isfinite().all()


def test_averaged_targets_tend_to_the_exact_field() -> None:
    """Gaussian data: the mean squared distance from the exact field falls with the batch, far below that of one row."""
    path, exact = PATHS["flow-matching"], field("flow-matching").double()

    def error(n: int) -> tuple[float, float]:
        d = draw(n, paired=False)
        x = mixed(path.point(d.t), d.data, None, d.noise)
        truth, early = exact(x, d.t).detach(), d.t < 0.8
        one = mixed(path.target(d.t), d.data, None, d.noise)
        averaged = averaged_target(path, x, d.t, d.data)
        return tuple(float((v - truth)[early].square().mean()) for v in (averaged, one))  # type: ignore[return-value]

    (small, _), (large, alone) = error(100), error(2_000)
    assert large < 0.25 * small
    assert large < 0.02 * alone


def test_the_teachers_trajectories_end_where_its_flow_takes_the_noise() -> None:
    """With Gaussian data the flow is affine: x = mean + standard deviation * z."""
    paths = solve(field("flow-matching").float(), 48, data_share=0.0, neighbour_distance=0.1)
    latent, end = paths.ends(200, torch.Generator().manual_seed(0))
    assert paths.own == 48
    torch.testing.assert_close(end.double(), MEAN + VALUES.sqrt() * latent, atol=2e-3, rtol=0)
    torch.testing.assert_close((latent[100:] - latent[:100]).norm(dim=1), torch.full((100,), 0.1))
    wide = solve(field("flow-matching").float(), 48, data_share=0.0, neighbour_distance=0.1, reach=2.0)
    further, there = wide.ends(200, torch.Generator().manual_seed(0))
    torch.testing.assert_close(further[:100], 2 * latent[:100])
    torch.testing.assert_close((further[100:] - further[:100]).norm(dim=1), torch.full((100,), 0.1))
    torch.testing.assert_close(there.double(), MEAN + VALUES.sqrt() * further, atol=4e-3, rtol=0)


def test_a_warm_start_fits_the_generator_alone_to_those_ends_and_to_their_slopes() -> None:
    model, teacher, path = one_step(), field("flow-matching"), PATHS["flow-matching"]
    latent = torch.randn(20, 2, dtype=torch.float64)
    latent = torch.cat((latent, latent + 1e-4 * torch.tensor([1.0, 0.0])))
    d = dataclasses.replace(draw(40, paired=False), solved=latent, end=MEAN + VALUES.sqrt() * latent)
    values, both = (
        realuid_loss(model, model, teacher, path, d, RealUID(warm=0.5, slope=slope), 3, 8)
        for slope in (0.0, 3.0)
    )
    made = model.generate(latent)
    torch.testing.assert_close(values, (made - MEAN - VALUES.sqrt() * latent).square().sum() / 80)
    first = torch.func.vmap(torch.func.jacrev(lambda z: model.generate(z[None])[0]))(latent[:20])[:, :, 0]
    wrong = (first - torch.stack((VALUES[0].sqrt(), torch.zeros(()).double()))).square().sum(1)
    wanted = (wrong / (VALUES[0] + 0.1**2)).mean()
    torch.testing.assert_close(both - values, 3.0 * wanted, rtol=1e-2, atol=0)
    torch.autograd.backward(both)
    assert all(p.grad is None for p in model.fake.parameters())
    other = realuid_loss(model, model, teacher, path, d, RealUID(warm=0.5), 4, 8)
    torch.testing.assert_close(other, fake_loss(model, path, d, 1.0, 1.0))


def test_the_distillation_holds_the_slopes_where_they_have_a_weight() -> None:
    model, teacher, path = one_step(), field("flow-matching"), PATHS["flow-matching"]
    latent = torch.randn(20, 2, dtype=torch.float64)
    latent = torch.cat((latent, latent + 1e-3 * torch.randn(20, 2, dtype=torch.float64)))
    d = dataclasses.replace(draw(40, paired=False), solved=latent, end=MEAN + VALUES.sqrt() * latent)
    without, held = (
        realuid_loss(model, model, teacher, path, d, RealUID(warm=0.1, slope=slope, fake_steps=1), 3, 10)
        for slope in (0.0, 3.0)
    )
    torch.testing.assert_close(without, generator_loss(model, teacher, path, d, 1.0, 1.0))
    torch.testing.assert_close(held - without, 3.0 * slope_error(model, d))
    fakes = [
        realuid_loss(model, model, teacher, path, d, RealUID(warm=0.1, slope=slope, fake_steps=1), 4, 10)
        for slope in (0.0, 3.0)
    ]
    torch.testing.assert_close(fakes[0], fakes[1])


def test_penalty_on_folds_is_nought_for_monotone_maps_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: list[float]) -> None:
            super().__init__()
            self.scale = torch.tensor(scale, dtype=torch.float64)

        def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return z.sinh() * self.scale

    d = draw(64, paired=False)
    assert float(monotone_penalty(Scaled([1.0, 0.1]), d)) == 0.0
    assert float(monotone_penalty(Scaled([1.0, -0.5]), d)) > 0.05
    assert float(monotone_penalty(Scaled([0.0, 0.0]), d)) > 0.0  # a map to one point has no density either


def test_generator_of_a_teacher_is_its_denoiser() -> None:
    """With Gaussian data the field is exact: G(z) is the posterior mean at the start, an affine map of z."""
    parts = [field("flow-matching") for _ in range(2)]
    model = OneStepGenerator(*parts, "flow-matching", MEAN, VALUES, start=0.3, fake_is_flow=True).double()
    z = torch.randn(50, 2, dtype=torch.float64)
    scale = 0.3 * VALUES / (0.09 * VALUES + 0.49).sqrt()
    torch.testing.assert_close(model.generate(z), MEAN + scale * z, atol=1e-7, rtol=1e-7)


def test_pairs_have_the_density_that_they_say() -> None:
    pairs = TurnedPairs(closed_form("gmm-2d"))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    data = pairs.truth.sample(20_000, generator=generator, dtype=torch.float64)
    start = pairs.pairs(data, generator)
    mean, covariance = pairs.starts.mean_and_covariance()
    assert float((torch.cov(start.T) - covariance).abs().max()) < 0.06
    assert float((start.mean(0) - mean).abs().max()) < 0.06
    side = torch.linspace(-4, 4, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    for x0 in start[:3]:
        mass = float(pairs.log_prob(grid, x0.expand(len(grid), 2)).exp().sum()) * 0.05**2
        assert abs(mass - 1) < 1e-6
    with pytest.raises(ValueError, match="plane"):
        TurnedPairs(closed_form("gmm-64d"))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def few_trajectories(monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("gmm-2d", "digits"):
        small = {
            name: recipe.with_options(pool=64)
            for name, recipe in RECIPES[task].items()
            if recipe.realuid and recipe.trajectories.pool
        }
        monkeypatch.setitem(RECIPES, task, RECIPES[task] | small)


def tensors_of(path: Path) -> dict[str, Tensor]:
    return read_checkpoint(path)[0]


class TurnedBack(torch.nn.Module):
    """x_1 = R^T x_0 + 0.7 z: right about the noise, wrong about the modes."""

    conditional, event_shape = True, (2,)

    def generate(self, z: Tensor, *, cond: Tensor) -> Tensor:
        return cond @ TurnedPairs(closed_form("gmm-2d")).rotation.to(z) + 0.7 * z  # type: ignore[arg-type]


def test_card_of_a_generator_given_x0() -> None:
    card = accuracy(get_task("gmm-2d"), TurnedBack(), "cpu")["pairs"]
    coupling = TurnedPairs(closed_form("gmm-2d"))  # type: ignore[arg-type]
    draws = torch.Generator().manual_seed(5)
    x = coupling.truth.sample(20_000, generator=draws, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=draws, dtype=torch.float64)
    start = x @ coupling.rotation.T + 0.7 * noise
    wrong = -0.5 * noise.square().sum(1) - math.log(2 * math.pi * 0.49)
    expected = float((coupling.log_prob(x, start) - wrong).mean()) / (2 * math.log(2))
    assert card["bpd_error"] == pytest.approx(expected, abs=0.05)
    assert card["valid_share"] == 1
    assert card["energy_distance"] > 10 * max(card["energy_distance_se"], abs(card["energy_distance_fresh"]))


@pytest.mark.parametrize(("name", "cuts"), [("realuid-plain", (3, 13)), ("realuid", (3, 9, 13))])
def test_interrupted_training_resumes_to_the_same_result(
    name: str, cuts: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut before the generator's first step, in a warm start, between the stages, and while the generator settles."""
    for folder in ("whole", "cut"):
        train("gmm-2d", "teacher", out=tmp_path / folder, steps=2)
    whole = train("gmm-2d", name, out=tmp_path / "whole", steps=15)
    monkeypatch.setattr(trainer, "_SAVE_EVERY", 0.0)
    update = trainer._Training.update
    for last in cuts:

        def interrupted(self: trainer._Training, loss: Tensor, last: int = last) -> None:
            if self.step == last:
                raise KeyboardInterrupt
            update(self, loss)

        monkeypatch.setattr(trainer._Training, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("gmm-2d", name, out=tmp_path / "cut", steps=15)
    monkeypatch.setattr(trainer._Training, "update", update)
    resumed = train("gmm-2d", name, out=tmp_path / "cut", steps=15)
    expected, found = tensors_of(whole), tensors_of(resumed)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    start = tensors_of(tmp_path / "whole" / "gmm-2d" / "teacher.safetensors")
    assert not torch.equal(expected["generator.first.weight"], start["first.weight"])


def test_parts_of_a_batch_make_the_same_steps(tmp_path: Path) -> None:
    train("gmm-2d", "teacher", out=tmp_path, steps=2)
    kept = []
    for accumulate in (1, 4):
        made = train("gmm-2d", "realuid-plain", out=tmp_path, steps=9, accumulate=accumulate, resume=False)
        kept.append(tensors_of(made))
    worst = max(float((kept[0][name] - kept[1][name]).abs().max()) for name in kept[0])
    assert worst < 1e-5
    with pytest.raises(ValueError, match="train realuid in one process, accumulate 1"):
        train("gmm-2d", "realuid", out=tmp_path, steps=1, accumulate=2)


@pytest.mark.parametrize("name", ["noise", "data", "bridge", "interpolant"])
def test_every_framework_trains_from_its_own_teacher(name: str, tmp_path: Path) -> None:
    train("gmm-2d", f"teacher-{name}", out=tmp_path, steps=2)
    made = train("gmm-2d", f"realuid-{name}", out=tmp_path, steps=8)
    model: Any = load_model("gmm-2d", f"realuid-{name}", path=made)
    cond = torch.zeros(4, 2) if model.conditional else None
    assert bool(torch.isfinite(model.generate(torch.randn(4, 2), cond=cond)).all())
    assert hasattr(model.fake, "velocity") == (not model.conditional)


def test_real_data_and_fine_tuning_and_digits_train(tmp_path: Path) -> None:
    train("gmm-2d", "teacher", out=tmp_path, steps=2)
    for model in ("realuid-data-free", "realuid", "realuid-fine-tuned"):
        train("gmm-2d", model, out=tmp_path, steps=7)
    made = train("digits", "realuid", out=tmp_path, steps=7)
    model: Any = load_model("digits", "realuid", path=made)
    assert model.generate(torch.randn(2, 1, 8, 8)).shape == (2, 1, 8, 8)


def test_head_is_taught_by_the_flow_of_the_fake_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("gmm-2d", "teacher", out=tmp_path, steps=2)
    train("gmm-2d", "realuid", out=tmp_path, steps=7)
    small = recipe_for("gmm-2d", "realuid-f2d2").with_options(pool=64, batch=64)
    monkeypatch.setitem(RECIPES["gmm-2d"], "realuid-f2d2", small)
    made = train("gmm-2d", "realuid-f2d2", out=tmp_path, steps=3)
    head = load_model("gmm-2d", "realuid-f2d2", path=made)
    out = get("generator", route="head").log_prob(head, torch.randn(5, 2))
    assert out.status == "ok"
    assert out.cost.forwards == 1


def test_flow_of_a_generator_is_its_fake_models_with_the_exact_divergence() -> None:
    model = one_step()
    flow = GeneratedFlow(model)
    x, t = torch.randn(20, 2, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    velocity, divergence = flow.velocity_and_divergence(x, t)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda y, r: model.fake(y[None], r[None])[0]))(x, t)
    torch.testing.assert_close(velocity, model.fake(x, t).detach())
    torch.testing.assert_close(divergence, torch.diagonal(jacobian, dim1=1, dim2=2).sum(1).detach())
    assert flow.sample(7, generator=torch.Generator().manual_seed(0)).shape == (7, 2)
    model.fake_is_flow = False
    with pytest.raises(ValueError, match="train one with settle"):
        GeneratedFlow(model)


def test_a_missing_teacher_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowlik_models.zoo.SHIPPED", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"teacher\.safetensors"):
        train("gmm-2d", "realuid", out=tmp_path, steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": 0.0}, "shares above 0"),
        ({"b": 1.5}, "shares above 0"),
        ({"fake_steps": 0}, "fake_steps must be at least 1"),
        ({"start": 1.0}, "start lies between 0 and 1"),
        ({"settle": 1.0}, "settle is a share below 1"),
        ({"monotone": -1.0}, "monotone and slope are weights"),
        ({"slope": 1.0}, "no effect without a warm start"),
        ({"reach": 1.5}, "no effect without a warm start"),
        ({"reach": 0.0, "warm": 0.5}, "reach is a standard deviation"),
        ({"warm": 0.9, "settle": 0.2}, "shares that leave some"),
        ({"rate": 0.0}, "rate is a share above 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RealUID(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"realuid": None}, "need each other"),
        ({"objective": "flow-matching"}, "need each other"),
        ({"path": None}, "needs a path"),
        ({"path": "bridges"}, "valid: flow-matching, noise, data, bridge, interpolant"),
        ({"teacher": "closed-form"}, "needs a trained teacher"),
        ({"objective": "meanflow", "realuid": None}, "path has no effect"),
        ({"realuid": RealUID(warm=0.3), "pool": 0}, "warm start and a pool"),
        ({"realuid": RealUID(stable=True), "path": "bridge", "pool": 0}, "not for paired ones"),
    ],
)
def test_recipes_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    recipe = recipe_for("gmm-2d", "realuid")
    with pytest.raises(ValueError, match=message):
        recipe.with_options(**options)
