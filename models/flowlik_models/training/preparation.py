"""What training needs before its first step: the network as it starts, and the source of its batches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowlik_models.checkpoints import CheckpointError, read_checkpoint
from flowlik_models.closed_forms.catalogue import SYNTHETIC_TASKS, closed_form, constants_hash
from flowlik_models.moments.training_images import (
    IMAGE_SHAPES,
    TrainingImages,
    training_images,
    training_moments,
)
from flowlik_models.networks.images import Moments
from flowlik_models.networks.one_step import OneStepGenerator
from flowlik_models.networks.policy import PolicyImages
from flowlik_models.networks.vector import VectorFlowMap
from flowlik_models.objectives.calibration import only_the_head
from flowlik_models.recipes.recipe import CLOSED_FORM_TEACHER, DATA_TEACHER, Recipe
from flowlik_models.training.batches import ClosedFormSource, Source, path_starts
from flowlik_models.training.generated_flow import GeneratedFlow
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.training.process_group import ALONE, Group
from flowlik_models.training.trajectories import Paths, solve, solve_closed_form, stored_paths
from flowlik_models.zoo import build, checkpoint_path, load_model, model_hash

_POOL_SEED = 77
_FITTED = 20_000  # points that clusters are fitted to

_BESIDE = (
    0.02  # distance of the latents whose trajectories tell a warm start the slopes of the teacher's flow
)


def _trained(task: str, model: str, out: Path) -> Path:
    """A model this one builds on: from the same output folder, else the shipped one."""
    own = out / task / f"{model}.safetensors"
    return own if own.is_file() else checkpoint_path(task, model)


def prepared(
    task: str, recipe: Recipe, out: Path, device: str, group: Group = ALONE
) -> tuple[nn.Module, Source]:
    """Network and source of a recipe, on the device.

    Moments of the data are worked out once and kept, by the first process; solved trajectories are shared out.

    Raises:
        CheckpointError, MissingDataError, DataError: as of `network_for` and `source_for`.
    """
    if not group.first:
        group.wait()
    network = network_for(task, recipe, out).to(device)
    if group.first:
        group.wait()
    return network, source_for(task, recipe, out, device, group)


def training_hash(task: str) -> str:
    """Names the training data of a task, or the constants of its closed form."""
    return constants_hash(task) if task in SYNTHETIC_TASKS else training_images(task).identity


def network_for(task: str, recipe: Recipe, out: Path) -> nn.Module:
    """The network of a recipe as training begins: clusters fitted, weights taken from the model it starts from.

    Raises:
        CheckpointError: that model is missing, of another task, or does not fit.
    """
    network = build(task, recipe, _moments(task, recipe) if task in IMAGE_SHAPES else None)
    if isinstance(network, VectorFlowMap) and network.clusters is not None:
        generator = torch.Generator().manual_seed(_POOL_SEED)
        network.clusters.fit(closed_form(task).sample(_FITTED, generator=generator))
    _start(network, task, recipe, out)
    if recipe.objective == "calibration":
        only_the_head(network)
    return network


def _moments(task: str, recipe: Recipe) -> Moments:
    """Moments of the training images; eigenvectors rounded as the checkpoint will store them."""
    mean, values, vectors = training_moments(task)
    return mean, values, vectors.half() if recipe.execution.stored == "float16" else vectors


def source_for(task: str, recipe: Recipe, out: Path, device: str, group: Group = ALONE) -> Source:
    """Where the batches of a recipe come from; trajectories it needs are solved now and kept below ``out``.

    Raises:
        CheckpointError: its teacher is missing or does not fit.
        MissingDataError, DataError: the images are not there, or not as published.
    """
    if task in SYNTHETIC_TASKS:
        return _closed_form_source(task, recipe, out, device, group)
    if recipe.teacher == DATA_TEACHER:
        return ImageSource(training_images(task), device=device)
    path = _trained(task, recipe.teacher, out)
    teacher = load_model(task, recipe.teacher, path=path, device=device).requires_grad_(False)
    if not recipe.trajectories.pool:
        return ImageSource(training_images(task), teacher, device=device)
    weights = model_hash(task, recipe.teacher, path=path)
    images = training_images(task)
    paths = _teacher_paths(out / task, recipe, teacher, weights, group, images)
    return ImageSource(images, teacher, paths, device)


def _teacher_paths(
    folder: Path,
    recipe: Recipe,
    teacher: Any,
    weights: str,
    group: Group,
    images: TrainingImages | None = None,
) -> Paths:
    """The recipe's pool of a network's trajectories, kept in ``folder`` under a name that tells how it was made."""
    pool = recipe.trajectories
    told: dict[str, Any] = {
        "probes": pool.pool_probes,
        "data": pool.pool_data,
        "shift": recipe.points.shift,
    }
    if recipe.realuid is not None:
        told = {"data": 0.0, "beside": _BESIDE, "reach": recipe.realuid.reach}
    name = hashlib.sha256(f"{weights} {pool.pool} {told}".encode()).hexdigest()[:12]
    cache = folder / f"{recipe.teacher}-paths-{name}.safetensors"
    told |= {"images": images, "parts": cache.with_suffix(".parts"), "group": group}
    return stored_paths(cache, lambda: solve(teacher, pool.pool, **told), group)


def _closed_form_source(task: str, recipe: Recipe, out: Path, device: str, group: Group) -> Source:
    truth: Any = closed_form(task)
    told = constants_hash(task)
    if recipe.realuid is not None:
        path = _trained(task, recipe.teacher, out)
        teacher = load_model(task, recipe.teacher, path=path).requires_grad_(False)
        teacher = teacher.to(device)
        weights = model_hash(task, recipe.teacher, path=path)
        pooled = recipe.trajectories.pool > 0
        paths = _teacher_paths(out / task, recipe, teacher, weights, group) if pooled else None
        return ClosedFormSource(truth, paths, teacher)
    if recipe.teacher not in (CLOSED_FORM_TEACHER, DATA_TEACHER):
        path = _trained(task, recipe.teacher, out)
        truth = GeneratedFlow(load_model(task, recipe.teacher, path=path))
        told += model_hash(task, recipe.teacher, path=path)
    if not recipe.trajectories.pool:
        return ClosedFormSource(truth)
    points, delta = recipe.points, recipe.times.delta
    law = (points.altered, points.altered_scale, points.altered_law, delta, recipe.trajectories.pool)
    name = hashlib.sha256(f"{told} {law}".encode()).hexdigest()[:12]

    def solved() -> Paths:
        generator = torch.Generator().manual_seed(_POOL_SEED)
        starts = path_starts(truth, recipe, generator)
        return solve_closed_form(truth, starts, delta=delta, generator=generator)

    return ClosedFormSource(truth, stored_paths(out / task / f"paths-{name}.safetensors", solved, group))


def _start(network: nn.Module, task: str, recipe: Recipe, out: Path) -> None:
    """Take the weights of the model the recipe starts from; a head it lacks stays as initialised."""
    if recipe.start_from is None:
        return
    path = _trained(task, recipe.start_from, out)
    tensors, card = read_checkpoint(path)
    found = (card.get("task", task), card.get("model", recipe.start_from))
    if found != (task, recipe.start_from):
        raise CheckpointError(
            f"{path}: expected {recipe.start_from} on {task}, found {found[1]} on {found[0]}"
        )
    if isinstance(network, PolicyImages | OneStepGenerator):
        tensors = network.adopted(tensors)
    expected = network.state_dict()
    unknown = [
        name for name in tensors if name not in expected or tensors[name].shape != expected[name].shape
    ]
    if unknown:
        raise CheckpointError(f"{path}: tensor {unknown[0]!r} does not fit the network of {task}")
    network.load_state_dict({**expected, **{name: tensor.float() for name, tensor in tensors.items()}})
