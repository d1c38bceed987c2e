"""The loss of one training step, put together as the recipe says."""

from __future__ import annotations

import dataclasses
from typing import cast

import torch
from torch import Tensor, nn

from flowlik_models.conditional_paths import PATHS
from flowlik_models.interfaces import ExactFlow, data_end_of
from flowlik_models.numerics.standard_normal import standard_normal_log_prob
from flowlik_models.objectives import (
    CONDITIONS,
    Context,
    adaptive,
    evaluation,
    flow_matching_loss,
    own_field,
    residuals,
)
from flowlik_models.objectives.batch import Batch, TeacherField
from flowlik_models.objectives.calibration import calibration_loss
from flowlik_models.objectives.conditions.condition import Evaluate
from flowlik_models.objectives.energy import energy_errors, exact_targets
from flowlik_models.objectives.imitation import imitation_loss
from flowlik_models.objectives.realuid import matching_loss, realuid_loss
from flowlik_models.objectives.round_trip import round_trip_errors
from flowlik_models.recipes.recipe import DATA_TEACHER, Recipe, smallest_step
from flowlik_models.training.batches import ClosedFormSource, Source, draw_conditional, trajectory_starts
from flowlik_models.training.process_group import WHOLE, Part


def loss_of(
    recipe: Recipe,
    network: nn.Module,
    average: nn.Module,
    source: Source,
    generator: torch.Generator,
    device: str,
    step: int,
    part: Part = WHOLE,
) -> Tensor:
    """The loss of a part of the batch of step ``step``, freshly drawn, a scalar with graph to the network's parameters.

    ``average`` is the averaged network, in evaluation mode: it gives the targets that a recipe takes from its own
    model.
    """
    if recipe.path is not None:
        return _conditional_loss(recipe, network, average, source, generator, device, step, part)
    if recipe.objective == "calibration":
        return _calibration_loss(recipe, network, source, generator, device, part)
    if recipe.objective == "energy":
        return _energy_loss(recipe, network, source, generator, device, part)
    if recipe.objective == "likelihood":
        return _likelihood_loss(recipe, network, source, generator, device, part)
    batch = source.batch(recipe, generator, part)
    generator = part.generator(generator)
    if recipe.objective == "flow-matching":
        return flow_matching_loss(network, _to(batch, device))["velocity"].mean()
    if recipe.imitation is not None:
        at, field = _to(batch, device), _on(device, source.field(recipe, generator))
        relative = recipe.weights.relative
        return imitation_loss(
            network, at.x, at.t, at.s, field, recipe.imitation, generator, relative=relative
        )
    if recipe.divergence and batch.divergence is None:
        x, t = batch.x.to(device), batch.t.to(device)
        _, divergence = recipe.divergence_target(average, x, t, generator)
        batch = dataclasses.replace(batch, divergence=divergence)
    target = evaluation(average, recipe.divergence)
    taught = recipe.teacher != DATA_TEACHER
    field = _on(device, source.field(recipe, generator)) if taught else own_field(target)
    return _map_loss(recipe, network, _to(batch, device), target, field)


def _map_loss(
    recipe: Recipe, network: nn.Module, batch: Batch, target: Evaluate, field: TeacherField
) -> Tensor:
    """The weighted loss of a flow map, of a joint one with its divergence, by the recipe's conditions."""
    end = data_end_of(network)
    context = Context(
        target=target,
        field=field,
        end=end,
        delta=recipe.times.delta,
        derivative=recipe.derivative,
        middle=recipe.times.middle,
        smallest=end * smallest_step(recipe),
        broadcast="broadcast" in recipe.faults,
    )
    errors = residuals(
        network,
        batch,
        CONDITIONS[recipe.objective],
        CONDITIONS[recipe.divergence_objective or recipe.objective],
        context,
        divergence_scale=recipe.weights.divergence_scale,
        relative=recipe.weights.relative,
    )
    weights = dict(zip(("velocity", "divergence"), recipe.weights.weight_c, strict=True))
    loss = torch.stack([adaptive(error, weights[name]).mean() for name, error in errors.items()]).sum()
    if recipe.weights.round_trip:
        loss = loss + recipe.weights.round_trip * round_trip_errors(network, batch).mean()
    return loss


def _calibration_loss(
    recipe: Recipe,
    network: nn.Module,
    source: Source,
    generator: torch.Generator,
    device: str,
    part: Part,
) -> Tensor:
    """The loss of a divergence head against the likelihoods of the pool's data points."""
    assert source.pool is not None
    rows = source.pool.likelihoods(recipe.optimiser.batch, generator, part)
    x, log_prob = (values.to(device) for values in rows)
    return calibration_loss(network, x, log_prob, data_end_of(network))


def _energy_loss(
    recipe: Recipe,
    network: nn.Module,
    source: Source,
    generator: torch.Generator,
    device: str,
    part: Part,
) -> Tensor:
    """The loss of a scalar network at the points where trajectories of direct regression start."""
    assert isinstance(source, ClosedFormSource)
    starts = trajectory_starts(source.truth, recipe, generator, recipe.optimiser.batch)
    x = starts if part.count == 1 else starts[part.rows(len(starts))]
    targets = exact_targets(source.truth, x, 1 - source.truth.eps)
    rows = (values.to(device) for values in (x, *targets))
    errors = energy_errors(network, *rows, relative=recipe.weights.relative)
    return adaptive(errors, recipe.weights.weight_c[0]).mean()


def _likelihood_loss(
    recipe: Recipe,
    network: nn.Module,
    source: Source,
    generator: torch.Generator,
    device: str,
    part: Part,
) -> Tensor:
    """Minus the mean log-density a dimension that an exact flow gives the data."""
    data = source.data(recipe.optimiser.batch, recipe, generator)
    rows = data if part.count == 1 else data[part.rows(len(data), device=data.device)]
    z, log_det = cast("ExactFlow", network).inverse(rows.to(device))
    return -(standard_normal_log_prob(z) + log_det).mean() / z[0].numel()


def _conditional_loss(
    recipe: Recipe,
    network: nn.Module,
    average: nn.Module,
    source: Source,
    generator: torch.Generator,
    device: str,
    step: int,
    part: Part,
) -> Tensor:
    """The loss of a field of any framework, or of a one-step generator distilled from one."""
    assert recipe.path is not None
    path = PATHS[recipe.path]
    draw = draw_conditional(source, recipe, path, generator, device, part)
    if recipe.realuid is None:
        return matching_loss(network, path, draw)
    steps = recipe.optimiser.steps
    return realuid_loss(network, average, source.teacher, path, draw, recipe.realuid, step, steps)


def _on(device: str, field: TeacherField) -> TeacherField:
    return lambda x, t: tuple(part.to(device) for part in field(x, t))


def _to(batch: Batch, device: str) -> Batch:
    return batch.each(lambda value: value.to(device))
