"""What the conditions that make (u, D) a joint flow map have in common (docs/math.md section 3).

A condition turns rows with ``s != t`` into pairs of a prediction, which carries the graph, and a target, which does
not. Rows on the diagonal and rows whose averages are known regress the batch's own values; ``residuals`` joins the
three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flowlik_models.objectives.batch import Batch

Derivative = Literal["jvp", "difference"]
Outputs = tuple[Tensor, ...]  # (u,) or (u, D)
Evaluate = Callable[[Tensor, Tensor, Tensor], Outputs]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a condition may use besides the network that is trained.

    ``target``: the averaged network in evaluation mode, ``(x, t, s) -> outputs``. ``field``: velocity and, for a joint
    map, divergence at points (x, t), of the teacher or of the averaged network's own diagonal. ``end``: time of the
    data. ``derivative``: how derivatives are taken. ``middle``: where a step is cut, ``half`` or ``random``.
    ``smallest``: steps up to this length take the diagonal in place of two halves (0: none do). ``broadcast``: compare
    every divergence off the diagonal with every target of the batch, a fault of the released F2D2 code.
    """

    target: Evaluate
    field: Callable[[Tensor, Tensor], Outputs]
    end: float = 1.0
    delta: float = 5e-3
    derivative: Derivative = "difference"
    middle: Literal["half", "random"] = "random"
    smallest: float = 0.0
    broadcast: bool = False


class Condition(Protocol):
    """Predictions and targets at rows with s != t; ``outputs`` are the network's own there, with graph."""

    def __call__(
        self, evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context
    ) -> tuple[Outputs, Outputs]:
        """(predictions, targets), one of each an output."""
        ...


def column(values: Tensor, like: Tensor) -> Tensor:
    """(batch,) values that broadcast over the event of ``like``; unchanged where that is (batch,) itself."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def evaluation(network: Any, joint: bool) -> Evaluate:
    """(x, t, s) -> (u, D) of a joint map, (u,) of a map alone."""
    if joint:
        return lambda x, t, s: tuple(network.joint(x, t, s))
    return lambda x, t, s: (network.average_velocity(x, t, s),)


def moved(x: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
    """Phi(x, t, s), shaped like x."""
    return x + column(s - t, x) * u


def own_field(target: Evaluate) -> Callable[[Tensor, Tensor], Outputs]:
    """The map's own diagonal as the field, ``(x, t) -> outputs`` without graph."""

    def field(x: Tensor, t: Tensor) -> Outputs:
        with torch.no_grad():
            return target(x, t, t)

    return field


def total_derivative(
    function: Evaluate,
    batch: Batch,
    *,
    method: Derivative,
    end: float,
    step: float = 1e-2,
    delta: float = 5e-3,
    graph: bool = False,
) -> Outputs:
    """d/dt of ``function(x, t, s)`` with dx/dt = velocity and s fixed.

    ``jvp`` is exact and costs about three evaluations; ``difference`` takes two evaluations in one batch, a central
    difference whose step shrinks with the distance to the data end (``step * (1 - t + delta)``) and with the speed.
    In float32 its error is near 1e-3 relative, far below the error of the regression it serves. ``graph``: keep the
    graph to the parameters.
    """
    x, t, s, velocity = batch.x, batch.t, batch.s, batch.velocity
    with torch.set_grad_enabled(graph):
        if method == "jvp":
            pair = torch.func.jvp(lambda x, t: function(x, t, s), (x, t), (velocity, torch.ones_like(t)))
            return tuple(pair[1])
        speed = velocity.flatten(1).square().mean(1).sqrt()
        h = _step(step * torch.minimum(1 - t + delta, 1 / (1 + speed)), t, end, delta)
        shift = column(h, x) * velocity
        outputs = function(torch.cat((x + shift, x - shift)), torch.cat((t + h, t - h)), torch.cat((s, s)))
        return tuple(_slope(output, 2 * h) for output in outputs)


def target_derivative(function: Evaluate, batch: Batch, context: Context, *, step: float = 1e-2) -> Outputs:
    """d/ds of ``(s - t) function(x, t, s)`` at fixed x and t, with graph: the Lagrangian side of a flow map."""
    x, t, s = batch.x, batch.t, batch.s

    def scaled(x: Tensor, t: Tensor, s: Tensor) -> Outputs:
        return tuple(column(s - t, output) * output for output in function(x, t, s))

    if context.derivative == "jvp":
        return tuple(torch.func.jvp(lambda s: scaled(x, t, s), (s,), (torch.ones_like(s),))[1])
    h = _step(step * (1 - s + context.delta), s, context.end, context.delta)
    outputs = scaled(torch.cat((x, x)), torch.cat((t, t)), torch.cat((s + h, s - h)))
    return tuple(_slope(output, 2 * h) for output in outputs)


def _step(h: Tensor, t: Tensor, end: float, delta: float) -> Tensor:
    """Steps that do not reach far beyond the data end."""
    return torch.where(t + h > end + delta / 2, h / 2, h)


def _slope(output: Tensor, width: Tensor) -> Tensor:
    ahead, behind = output.chunk(2)
    return (ahead - behind) / column(width, ahead)


def residuals(
    network: Any,
    batch: Batch,
    velocity: Condition,
    divergence: Condition,
    context: Context,
    *,
    divergence_scale: float | None = None,
    relative: float | None = None,
) -> dict[str, Tensor]:
    """Squared errors (batch,) of the average velocity, mean over dimensions, and, where the batch carries
    divergences, of the average divergence in units of ``divergence_scale`` (None: the number of dimensions). With
    ``relative`` each is divided by ``1 + (target/relative)^2``.

    ``velocity`` and ``divergence`` are the conditions off the diagonal; where they are the same it is worked out once.
    """
    targets = batch.targets()
    joint = len(targets) == 2
    evaluate = evaluation(network, joint=joint)
    predictions = evaluate(batch.x, batch.t, batch.s)
    _same_shapes(predictions, targets)
    moving = batch.moving()  # on the diagonal the batch's own values are the targets
    if len(moving):
        rows = batch.rows(moving)
        outputs = tuple(output[moving] for output in predictions)
        pair = velocity(evaluate, outputs, rows, context)
        if joint and divergence is not velocity:
            other = divergence(evaluate, outputs, rows, context)
            pair = (pair[0][0], other[0][1]), (pair[1][0], other[1][1])
        _same_shapes(*pair)
        predictions, targets = (
            tuple(whole.index_copy(0, moving, part) for whole, part in zip(wholes, parts, strict=True))
            for wholes, parts in zip((predictions, targets), pair, strict=True)
        )
    errors = {"velocity": _squares(predictions[0].flatten(1), targets[0].flatten(1), relative)}
    if joint:
        scale = divergence_scale or batch.x[0].numel()
        prediction, target = predictions[1][:, None] / scale, targets[1][:, None] / scale
        errors["divergence"] = _squares(prediction, target, relative)
        if context.broadcast and len(moving):
            wrong = (prediction[moving] - target[moving].T.detach()).square().mean(1)
            errors["divergence"] = errors["divergence"].index_copy(0, moving, wrong)
    return errors


def _squares(prediction: Tensor, target: Tensor, relative: float | None) -> Tensor:
    """Mean squares over the second dimension, (batch,)."""
    target = target.detach()
    squares = (prediction - target).square().mean(1)
    return squares if relative is None else squares / (1 + target.square().mean(1) / relative**2)


def _same_shapes(predictions: Outputs, targets: Outputs) -> None:
    for prediction, target in zip(predictions, targets, strict=True):
        # (batch,) against (batch, 1) would broadcast and pull every value to the batch mean
        assert prediction.shape == target.shape, (prediction.shape, target.shape)
