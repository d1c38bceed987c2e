"""What training needs before its first step: the network as it starts, and the source of its batches."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowlik_models.checkpoints import CheckpointError, check_origin, read_checkpoint
from flowlik_models.closed_forms.catalogue import SYNTHETIC_TASKS, closed_form, constants_hash
from flowlik_models.flow_samples import FLOWS, sampled_images, sampled_moments
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
from flowlik_models.training.batches import ClosedFormSource, Source, trajectory_starts
from flowlik_models.training.generated_flow import GeneratedFlow
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.training.process_group import ALONE, Group
from flowlik_models.training.trajectories import (
    SUBSTEPS,
    WRONG,
    TrajectoryPool,
    solve,
    solve_closed_form,
    stored_pool,
)
from flowlik_models.zoo import build, checkpoint_path, load_model, model_hash

_POOL_SEED = 77
_FITTED = 20_000  # points that clusters are fitted to
_NEIGHBOUR_DISTANCE = 0.02  # of latents whose trajectories give a warm start the slopes of the teacher's flow
_WORDS_IN_NAMES = {"data_share": "data", "neighbour_distance": "beside"}
"""Names of options in the names of files, which stay so that pools solved before are found."""


def _trained(task: str, model: str, out: Path) -> Path:
    """A model this one builds on: from the same output folder, else the shipped one."""
    own = out / task / f"{model}.safetensors"
    return own if own.is_file() else checkpoint_path(task, model)


def prepared(
    task: str, recipe: Recipe, out: Path, device: str, group: Group = ALONE
) -> tuple[nn.Module, Source]:
    """Network and source of a recipe, on the device.

    Moments of the data are worked out once and stored, by the first process; all share in solving trajectories.

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
    return constants_hash(task) if task in SYNTHETIC_TASKS else _training_images(task).identity


def _training_images(task: str) -> TrainingImages:
    return sampled_images(task) if task in FLOWS else training_images(task)


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
    """Moments of the training images; eigenvectors rounded as the checkpoint stores them."""
    mean, values, vectors = (sampled_moments if task in FLOWS else training_moments)(task)
    return mean, values, vectors.half() if recipe.execution.stored == "float16" else vectors


def source_for(task: str, recipe: Recipe, out: Path, device: str, group: Group = ALONE) -> Source:
    """Where the batches of a recipe come from; its pool of trajectories is solved now and stored below ``out``.

    Raises:
        CheckpointError: its teacher is missing or does not fit.
        MissingDataError, DataError: the images are not there, or not as published.
    """
    if task not in SYNTHETIC_TASKS:
        return _image_source(task, recipe, out, device, group)
    if recipe.realuid is not None:
        teacher, pool = _network_and_pool(task, recipe, out, device, group)
        return ClosedFormSource(closed_form(task), pool, teacher)
    return _closed_form_source(task, recipe, out, group)


def _image_source(task: str, recipe: Recipe, out: Path, device: str, group: Group) -> Source:
    images = _training_images(task)
    if recipe.teacher == DATA_TEACHER:
        return ImageSource(images, device=device)
    teacher, pool = _network_and_pool(task, recipe, out, device, group, images)
    return ImageSource(images, teacher, pool, device)


def _network_and_pool(
    task: str,
    recipe: Recipe,
    out: Path,
    device: str,
    group: Group,
    images: TrainingImages | None = None,
) -> tuple[nn.Module, TrajectoryPool | None]:
    """The network that teaches a recipe and, where there is one, the pool of its trajectories."""
    path = _trained(task, recipe.teacher, out)
    teacher = load_model(task, recipe.teacher, path=path, device=device).requires_grad_(False)
    if not recipe.trajectories.pool:
        return teacher, None
    weights = model_hash(task, recipe.teacher, path=path)
    return teacher, _pool_of_network(out / task, recipe, teacher, weights, group, images)


def _pool_of_network(
    folder: Path,
    recipe: Recipe,
    teacher: Any,
    weights: str,
    group: Group,
    images: TrainingImages | None = None,
) -> TrajectoryPool:
    """The recipe's pool of a network's trajectories, stored in ``folder`` under a name that depends on how it is
    made."""
    n, options = recipe.trajectories.pool, _solve_options(recipe)
    law = {_WORDS_IN_NAMES.get(name, name): value for name, value in options.items()}
    name = hashlib.sha256(f"{weights} {n} {law}".encode()).hexdigest()[:12]
    file = folder / f"{recipe.teacher}-paths-{name}.safetensors"
    options |= {"images": images, "folder": file.with_suffix(".parts"), "group": group}
    return stored_pool(file, lambda: solve(teacher, n, **options), group)


def _solve_options(recipe: Recipe) -> dict[str, Any]:
    """Options of `solve` that determine a recipe's pool."""
    if recipe.realuid is not None:
        reach = recipe.realuid.reach
        return {"data_share": 0.0, "neighbour_distance": _NEIGHBOUR_DISTANCE, "reach": reach}
    pool = recipe.trajectories
    return {"probes": pool.pool_probes, "data_share": pool.pool_data, "shift": recipe.points.shift}


def _closed_form_source(task: str, recipe: Recipe, out: Path, group: Group) -> Source:
    """Batches of a closed form, or of the law of a one-step generator that teaches in its place."""
    truth: Any = closed_form(task)
    identity = constants_hash(task)
    if recipe.teacher not in (CLOSED_FORM_TEACHER, DATA_TEACHER):
        path = _trained(task, recipe.teacher, out)
        truth = GeneratedFlow(load_model(task, recipe.teacher, path=path))
        identity += model_hash(task, recipe.teacher, path=path)
    if not recipe.trajectories.pool:
        return ClosedFormSource(truth)
    points, delta = recipe.points, recipe.times.delta
    law = (
        points.altered,
        points.altered_scale,
        points.altered_law,
        delta,
        recipe.trajectories.pool,
        WRONG,
        SUBSTEPS,
    )
    name = hashlib.sha256(f"{identity} {law}".encode()).hexdigest()[:12]

    def solved() -> TrajectoryPool:
        generator = torch.Generator().manual_seed(_POOL_SEED)
        starts = trajectory_starts(truth, recipe, generator, recipe.trajectories.pool)
        return solve_closed_form(truth, starts, delta=delta, generator=generator)

    return ClosedFormSource(truth, stored_pool(out / task / f"paths-{name}.safetensors", solved, group))


def _start(network: nn.Module, task: str, recipe: Recipe, out: Path) -> None:
    """Take the weights of the model the recipe starts from; a head it lacks stays as initialised."""
    if recipe.start_from is None:
        return
    path = _trained(task, recipe.start_from, out)
    tensors, card = read_checkpoint(path)
    check_origin(path, card, task=task, model=recipe.start_from)
    if isinstance(network, PolicyImages | OneStepGenerator):
        tensors = network.adopted(tensors)
    expected = network.state_dict()
    unknown = [
        name for name in tensors if name not in expected or tensors[name].shape != expected[name].shape
    ]
    if unknown:
        raise CheckpointError(f"{path}: tensor {unknown[0]!r} does not fit the network of {task}")
    network.load_state_dict({**expected, **{name: tensor.float() for name, tensor in tensors.items()}})
