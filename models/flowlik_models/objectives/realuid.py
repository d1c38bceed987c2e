"""RealUID: distillation into a one-step generator with real data, without discriminator (arXiv 2509.22459).

Formulas: docs/math.md section 7. With f* the frozen teacher, f the fake model, f_cond the conditional target of
generated or real points x_1 on the path,

    L(f, G) = E_gen[a |f|^2 - 2 b f . f_cond] + E_real[(1 - a) |f|^2 - 2 (1 - b) f . f_cond],

which is the published loss with its squares multiplied out, less what does not depend on f: no coefficient divides.
The fake model minimises it, the generator minimises L(f*, G) - L(f, G). a = b = 1 is the data-free case. Generated and
real points share their noise and time.

Cost of a step: the fake model's is one forward of the generator, a forward and a backward of the fake model on
generated and (a or b below 1) real points; the generator's is a forward and a backward of all three networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowlik_models.conditional_paths import ConditionalPath, column, mixed, weight
from flowlik_models.objectives.frozen_parameters import frozen

_LEAST_NOISE = 1e-4  # at the data end of a path there is none to divide by
_SLOPE = 0.05  # of a monotone map, at least
_FLAT = 0.1  # slope of a map below which errors of slopes are no longer relative to it
_SHORTEST = 0.01  # of the steps over which that is required, as a share of the distance between two latents


@dataclass(frozen=True, kw_only=True)
class RealUID:
    """How a one-step generator is trained.

    ``a``, ``b``: coefficients of the generated points, as above. ``fake_steps``: of the fake model for each of the
    generator's. ``start``: time of the path at which the generator's field is taken. ``settle``: share of the steps,
    the last ones, in which the averaged generator stands still and the fake model alone goes on with a = b = 1, so
    that its ODE becomes the generator's (0: none, as published). ``monotone``: weight of the penalty on folds (0: none,
    as published), see `monotone_penalty`.

    ``warm``: share of the steps, the first ones, in which the generator is fitted to the ends of the teacher's
    trajectories (`warm_loss`) from noise of standard deviation ``reach``. ``slope``: weight of their difference
    quotients (`slope_error`), there and with the distillation loss, which by itself leaves ripples in the density.
    ``rate``: learning rate of the distillation proper, between warm start and settling, as a share of the recipe's.
    ``stable``: the fake model's targets are averaged over the batch (`averaged_target`).
    """

    a: float = 1.0
    b: float = 1.0
    fake_steps: int = 5
    start: float = 0.3
    settle: float = 0.2
    monotone: float = 0.0
    warm: float = 0.0
    slope: float = 0.0
    reach: float = 1.0
    stable: bool = False
    rate: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for options out of range."""
        if not (0 < self.a <= 1 and 0 < self.b <= 1):
            raise ValueError(f"a and b are shares above 0, got {self.a} and {self.b}")
        if self.fake_steps < 1:
            raise ValueError(f"fake_steps must be at least 1, got {self.fake_steps}")
        if not 0 < self.start < 1 or not 0 <= self.settle < 1:
            raise ValueError("start lies between 0 and 1, settle is a share below 1")
        if self.warm < 0 or self.warm + self.settle >= 1:
            raise ValueError(f"warm and settle are shares that leave some, got {self.warm} and {self.settle}")
        if self.monotone < 0 or self.slope < 0:
            raise ValueError(f"monotone and slope are weights, got {self.monotone} and {self.slope}")
        if self.reach <= 0:
            raise ValueError(f"reach is a standard deviation, got {self.reach}")
        if not self.warm and (self.slope or self.reach != 1):
            raise ValueError("slope and reach have no effect without a warm start")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate is a share above 0, got {self.rate}")

    @property
    def fake_is_flow(self) -> bool:
        """Whether the fake model ends up fitted to the generator alone."""
        return self.settle > 0 or self.a == self.b == 1

    def ends(self, steps: int) -> tuple[int, int]:
        """Steps at which the warm start ends and the settling begins."""
        return round(self.warm * steps), steps - round(self.settle * steps)

    def stage(self, step: int, steps: int) -> tuple[int, int, float]:
        """First step and end of the stage that ``step`` of ``steps`` belongs to, and its share of the learning rate."""
        warmed, settling = self.ends(steps)
        if step < warmed:
            return 0, warmed, 1.0
        return (warmed, settling, self.rate) if step < settling else (settling, steps, 1.0)

    @property
    def whole_batch(self) -> bool:
        """Whether rows of a batch are compared with each other."""
        return bool(self.monotone or self.slope or self.stable)


@dataclass(frozen=True)
class Draw:
    """What one step draws: data x_1, noise and latents (batch, *event), times (batch,), and x_0 on a paired path.

    ``solved`` and ``end``: latents and where the teacher's ODE takes them, (batch, *event) each.
    """

    data: Tensor
    noise: Tensor
    latent: Tensor
    t: Tensor
    start: Tensor | None = None
    solved: Tensor | None = None
    end: Tensor | None = None


def matching_loss(field: Any, path: ConditionalPath, draw: Draw) -> Tensor:
    """Weighted squared error of a field against the conditional target, mean over dimensions, a scalar."""
    x, target = _on_path(path, draw.data, draw)
    prediction = field(x, draw.t, cond=draw.start)
    assert prediction.shape == target.shape
    loss: Tensor = (weight(path, draw.t) * (prediction - target).flatten(1).square().mean(1)).mean()
    return loss


def fake_loss(
    model: Any, path: ConditionalPath, draw: Draw, a: float, b: float, *, stable: bool = False
) -> Tensor:
    """L(f, G) up to what does not depend on the fake model f, a scalar."""
    with torch.no_grad():
        made = model.generate(draw.latent, cond=draw.start)
    loss = _expanded(model.fake, path, made, draw, a, b, stable=stable)
    if (a, b) != (1, 1):
        loss = loss + _expanded(model.fake, path, draw.data, draw, 1 - a, 1 - b, stable=stable)
    return loss


def averaged_target(path: ConditionalPath, x: Tensor, t: Tensor, data: Tensor) -> Tensor:
    """E[f_cond | x_t = x] where x_1 is any row of ``data``, (batch, *event): the target without most of its noise.

    The stable target field (Xu, Tong, Jaakkola 2023, arXiv 2302.00670) with the batch as reference: it tends to the
    exact field as the batch grows, and to the conditional target where a row has no neighbour within the noise.
    """
    (a, _, g), (alpha, _, gamma) = path.point(t), path.target(t)
    g = g.clamp_min(_LEAST_NOISE)
    flat, rows = x.flatten(1), data.flatten(1)
    noise = (flat[:, None] - a[:, None, None] * rows) / g[:, None, None]
    posterior = (-0.5 * noise.square().sum(2)).softmax(1) @ rows
    target = alpha[:, None] * posterior + (gamma / g)[:, None] * (flat - a[:, None] * posterior)
    return target.reshape(x.shape)


def warm_loss(model: Any, draw: Draw, slope: float) -> Tensor:
    """Mean squared distance of the generator from the ends of the teacher's trajectories, and ``slope`` times its
    `slope_error`, a scalar."""
    error = _off_the_ends(model, draw)
    loss: Tensor = error.square().mean()
    return loss + slope * _relative(error, draw) if slope else loss


def slope_error(model: Any, draw: Draw) -> Tensor:
    """Mean squared relative error of the generator's difference quotients to those of the teacher's flow, a scalar.

    The second half of the rows are neighbours of the first; slopes below `_FLAT` count as that. A log-density is off by
    the relative error of a map's slopes (slopes as targets: Czarnecki et al. 2017, arXiv 1706.04859).
    """
    return _relative(_off_the_ends(model, draw), draw)


def _off_the_ends(model: Any, draw: Draw) -> Tensor:
    made = model.generate(draw.solved)
    assert draw.end is not None
    assert made.shape == draw.end.shape
    return torch.as_tensor(made - draw.end).flatten(1)


def _relative(error: Tensor, draw: Draw) -> Tensor:
    assert draw.solved is not None
    assert draw.end is not None
    distance, moved, wrong = (
        torch.sub(*part.flatten(1).chunk(2)).square().mean(1) for part in (draw.solved, draw.end, error)
    )
    assert distance.shape == moved.shape == wrong.shape
    loss: Tensor = (wrong / (moved + _FLAT**2 * distance)).mean()
    return loss


def generator_loss(model: Any, teacher: Any, path: ConditionalPath, draw: Draw, a: float, b: float) -> Tensor:
    """L(f*, G) - L(f, G), a scalar with graph to the generator alone."""
    made = model.generate(draw.latent, cond=draw.start)
    with frozen(model.fake.parameters()), frozen(teacher.parameters()):
        fake, taught = (_expanded(field, path, made, draw, a, b) for field in (model.fake, teacher))
    return taught - fake


def monotone_penalty(model: Any, draw: Draw) -> Tensor:
    """Mean squared lack of ``h . (G(z + h) - G(z))/|h|^2`` below `_SLOPE`, a scalar.

    A map that is monotone between any two latents is one-to-one, and every law has a monotone map from N(0, I), the one
    of optimal transport (Brenier 1991), so the penalty takes no law away from the generator. Its own distillation loss
    does not mind folds. h is the step to another latent, shortened by factors from 1 down to a hundredth.
    """
    z = draw.latent
    share = torch.linspace(0, 1, len(z), dtype=z.dtype, device=z.device)
    h = column(_SHORTEST**share, z) * (z.roll(1, 0) - z)
    moved = model.generate(z + h, cond=draw.start) - model.generate(z, cond=draw.start)
    slope = (h * moved).flatten(1).sum(1) / h.flatten(1).square().sum(1)
    lack: Tensor = (_SLOPE - slope).clamp_min(0).square().mean()
    return lack


def realuid_loss(
    model: Any,
    average: Any,
    teacher: Any,
    path: ConditionalPath,
    draw: Draw,
    options: RealUID,
    step: int,
    steps: int,
) -> Tensor:
    """The loss of step ``step`` of ``steps``: of the fake model, and every ``fake_steps + 1`` steps of the generator.

    ``average``: the averaged model, whose generator the model takes over when it settles.
    """
    warmed, settling = options.ends(steps)
    if step == settling:
        model.generator.load_state_dict(average.generator.state_dict())
    if step >= settling:
        return fake_loss(model, path, draw, 1.0, 1.0, stable=options.stable)
    if step < warmed:
        loss = warm_loss(model, draw, options.slope)
    elif step % (options.fake_steps + 1) == options.fake_steps:
        loss = generator_loss(model, teacher, path, draw, options.a, options.b)
        if options.slope:
            loss = loss + options.slope * slope_error(model, draw)
    else:
        return fake_loss(model, path, draw, options.a, options.b, stable=options.stable)
    return loss + options.monotone * monotone_penalty(model, draw) if options.monotone else loss


def _on_path(path: ConditionalPath, data: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Points of the path and their conditional targets, (batch, *event) each."""
    x0, noise, t = draw.start, draw.noise, draw.t
    return mixed(path.point(t), data, x0, noise), mixed(path.target(t), data, x0, noise)


def _expanded(
    field: Any, path: ConditionalPath, data: Tensor, draw: Draw, a: float, b: float, *, stable: bool = False
) -> Tensor:
    """Weighted ``a |f|^2 - 2 b f . f_cond``, mean over dimensions and batch."""
    x, target = _on_path(path, data, draw)
    if stable:
        target = averaged_target(path, x, draw.t, data)
    prediction = field(x, draw.t, cond=draw.start)
    assert prediction.shape == target.shape
    terms = (a * prediction.square() - 2 * b * prediction * target).flatten(1).mean(1)
    weights = weight(path, draw.t)
    assert weights.shape == terms.shape
    loss: Tensor = (weights * terms).mean()
    return loss
