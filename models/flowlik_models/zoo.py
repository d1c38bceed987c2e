"""The models of every task by id: closed forms and shipped checkpoints."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowlik_models.checkpoints import (
    SHIPPED,
    CheckpointError,
    check_origin,
    fill,
    read_card,
    read_checkpoint,
)
from flowlik_models.closed_forms.catalogue import CLOSED_FORM_TASKS, closed_form, constants_hash
from flowlik_models.moments.training_images import IMAGE_SHAPES, training_moments
from flowlik_models.names import unknown
from flowlik_models.networks.autoregressive import AutoregressiveFlow
from flowlik_models.networks.dit import DiT, FlowMapDiT, JointFlowMapDiT
from flowlik_models.networks.energy import VectorEnergy
from flowlik_models.networks.images import Moments
from flowlik_models.networks.one_step import OneStepGenerator, PathField
from flowlik_models.networks.policy import PolicyImages, VectorPolicy
from flowlik_models.networks.unet import ClassUNet, FlowMapUNet, JointFlowMapUNet, UNet
from flowlik_models.networks.vector import VectorFlowMap
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.objectives.realuid import RealUID
from flowlik_models.recipes import DATA_TEACHER, RECIPES, Recipe

CLOSED_FORM = "closed-form"
CHECKPOINTS_VARIABLE = "FLOWLIK_CHECKPOINTS"
TASK_MODELS: dict[str, tuple[str, ...]] = {
    task: ((CLOSED_FORM,) if task in CLOSED_FORM_TASKS else ()) + tuple(RECIPES.get(task, {}))
    for task in (*CLOSED_FORM_TASKS, *IMAGE_SHAPES)
}
NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    "unet": (UNet, FlowMapUNet, JointFlowMapUNet),
    "dit": (DiT, FlowMapDiT, JointFlowMapDiT),
}
"""Networks of images: a velocity field, a flow map, a joint flow map."""


def check_names(task: str, model: str) -> None:
    """Raise ValueError, naming the valid ones and the nearest match, for an unknown task or model.

    >>> check_names("gmm2d", "teacher")
    Traceback (most recent call last):
        ...
    ValueError: unknown task 'gmm2d'; did you mean 'gmm-2d'? (valid: gaussian-2d, ...)
    """
    if task not in TASK_MODELS:
        raise ValueError(unknown("task", task, TASK_MODELS))
    if model not in TASK_MODELS[task]:
        raise ValueError(unknown(f"model of task {task}", model, TASK_MODELS[task]))


def recipe_for(task: str, model: str) -> Recipe:
    """The recipe of a trained model. Raises ValueError for unknown names and for the closed form.

    >>> recipe_for("gmm-2d", "teacher").objective
    'flow-matching'
    """
    check_names(task, model)
    if model == CLOSED_FORM:
        raise ValueError(f"{CLOSED_FORM} of {task} is exact and not trained")
    return RECIPES[task][model]


def teacher_of(task: str, model: str) -> str | None:
    """The trained model that a model was taught by; None where data or a closed form taught it, or nobody knows."""
    recipe = RECIPES.get(task, {}).get(model)
    return recipe.teacher if recipe and recipe.teacher in RECIPES[task] else None


def build(task: str, recipe: Recipe, moments: Moments | None = None) -> nn.Module:
    """The untrained network of a recipe with the moments of the task's training data.

    Of images that are read from files the moments are standard normal ones unless they are given: a checkpoint
    brings its own, and nobody needs the files to load one.
    """
    if moments is None and task == "digits":
        moments = training_moments(task)
    if recipe.realuid is not None:
        return _one_step(task, recipe, recipe.realuid, moments)
    if recipe.imitation is not None:
        return _policy_network(task, recipe, recipe.imitation, moments)
    if recipe.objective == "likelihood":
        return _exact_flow(task, recipe, moments)
    if recipe.objective == "energy":
        return VectorEnergy(*_moments(task), eps=closed_form(task).eps, **recipe.network)
    if task in IMAGE_SHAPES:
        options = dict(recipe.network)
        if "classes" in options:
            return ClassUNet(IMAGE_SHAPES[task], moments=moments, **options)
        kinds = NETWORKS[options.pop("kind", "unet")]
        kind = kinds[0 if recipe.objective == "flow-matching" else 2 if recipe.divergence else 1]
        return kind(IMAGE_SHAPES[task], moments=moments, **options)
    if recipe.path is not None:
        return PathField(*_moments(task), path=recipe.path, delta=recipe.times.delta, **recipe.network)
    return VectorFlowMap(
        *_moments(task),
        divergence=recipe.divergence,
        eps=closed_form(task).eps,
        delta=recipe.times.delta,
        **recipe.network,
    )


def _one_step(task: str, recipe: Recipe, options: RealUID, moments: Moments | None) -> nn.Module:
    """The untrained generator and fake model of a recipe, two fields alike."""
    field = recipe.with_options(objective="flow-matching", realuid=None, teacher=DATA_TEACHER, pool=0)
    generator, fake = (build(task, field, moments) for _ in range(2))
    mean, spread = _pixel_moments(task, moments if task in IMAGE_SHAPES else _moments(task))
    assert recipe.path is not None
    return OneStepGenerator(
        generator,
        fake,
        recipe.path,
        mean,
        spread,
        start=options.start,
        fake_is_flow=options.fake_is_flow,
    )


def _pixel_moments(task: str, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of every coordinate; 0 and 1 where a checkpoint will fill them."""
    if moments is None:
        dim = math.prod(IMAGE_SHAPES[task])
        return torch.zeros(dim), torch.ones(dim)
    mean, values, vectors = moments
    return mean, vectors.to(values).square() @ values


def _exact_flow(task: str, recipe: Recipe, moments: Moments | None) -> nn.Module:
    """The untrained exact flow of a recipe: vectors along the axes of their moments, images pixel by pixel."""
    if task not in IMAGE_SHAPES:
        mean, values, axes = _moments(task)
        return AutoregressiveFlow((len(mean),), mean, values.sqrt(), axes, **recipe.network)
    mean, spread = _pixel_moments(task, moments)
    return AutoregressiveFlow(IMAGE_SHAPES[task], mean, spread.sqrt(), **recipe.network)


def _policy_network(task: str, recipe: Recipe, imitation: Imitation, moments: Moments | None) -> nn.Module:
    """The untrained network of a policy flow."""
    options: dict[str, Any] = {"head": imitation.head, "segments": imitation.segments, **recipe.network}
    if task in IMAGE_SHAPES:
        return PolicyImages(IMAGE_SHAPES[task], moments=moments, eps=imitation.eps, **options)
    eps = max(closed_form(task).eps, imitation.eps)
    return VectorPolicy(*_moments(task), eps=eps, delta=recipe.times.delta, **options)


def _moments(task: str) -> Moments:
    """Mean (d,), eigenvalues (d,) ascending and eigenvectors (d, d) of a closed form."""
    mean, covariance = closed_form(task).mean_and_covariance()
    values, vectors = torch.linalg.eigh(covariance)
    return mean, values, vectors


def checkpoint_path(task: str, model: str) -> Path:
    """Where the checkpoint of a model lies: in the folder ``$FLOWLIK_CHECKPOINTS`` where it is there, else shipped."""
    name = Path(task) / f"{model}.safetensors"
    own = os.environ.get(CHECKPOINTS_VARIABLE)
    if own and (Path(own) / name).is_file():
        return Path(own) / name
    return SHIPPED / name


def available_models(task: str) -> tuple[str, ...]:
    """Models of a task that can be loaded: the closed form, and those whose checkpoint is there.

    >>> {"closed-form", "teacher", "direct-f2d2"} <= set(available_models("gmm-2d"))
    True
    """
    models = TASK_MODELS.get(task, ())
    return tuple(m for m in models if m == CLOSED_FORM or checkpoint_path(task, m).is_file())


def missing_models(wanted: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(task, model) of those wanted, and of those they build on, that have no checkpoint, in the order to train
    them."""
    order: dict[tuple[str, str], None] = {}

    def visit(task: str, model: str) -> None:
        if model in available_models(task) or model not in RECIPES.get(task, {}):
            return
        recipe = RECIPES[task][model]
        for other in (recipe.teacher, recipe.start_from):
            if other is not None:
                visit(task, other)
        order[task, model] = None

    for task, model in wanted:
        visit(task, model)
    return list(order)


def _existing(task: str, model: str, path: Path | None) -> Path:
    file = path or checkpoint_path(task, model)
    if not file.is_file():
        cure = f"`flowlik train {task} {model} --ship` makes it"
        raise CheckpointError(f"{file.name}: no checkpoint of {model} on {task}; {cure}")
    return file


def load_model(
    task: str, model: str, *, path: Path | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """A model of the zoo in evaluation mode.

    Raises:
        ValueError: unknown task or model; the line names the valid ones and the nearest match.
        CheckpointError: the file is missing, truncated, of another task or model, or holds other tensors.

    >>> load_model("gmm-2d", "teacher").event_shape
    (2,)
    """
    check_names(task, model)
    if model == CLOSED_FORM:
        return closed_form(task).to(device).eval()
    file = _existing(task, model, path)
    tensors, card = read_checkpoint(file)
    check_origin(file, card, task=task, model=model)
    network = build(task, recipe_for(task, model))
    fill(network, {name: tensor.float() for name, tensor in tensors.items()}, file)
    return network.to(device).eval()


@dataclass(frozen=True)
class Snapshot:
    """A model's average at a step of its training, after ``cpu_seconds`` of it, and the file that holds it."""

    step: int
    cpu_seconds: float
    path: Path


def snapshots(task: str, model: str) -> list[Snapshot]:
    """What was kept along a model's training, by step, and last the finished model; empty without a checkpoint.

    Raises:
        CheckpointError: a snapshot is damaged, of another model, or does not say when it was taken.
    """
    file = checkpoint_path(task, model)
    if not file.is_file():
        return []
    card = read_card(file)
    kept = []
    for path in (file.parent / "snapshots").glob(f"{model}-*.safetensors"):
        if not path.stem.removeprefix(f"{model}-").isdigit():  # of a model whose name begins alike
            continue
        try:
            with safe_open(path, "pt") as content:
                told = content.metadata() or {}
            kept.append(Snapshot(int(told["step"]), float(told["cpu_seconds"]), path))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: expected a snapshot with its step and cpu_seconds ({error})"
            ) from None
        check_origin(path, {}, task=task, model=model)
    last = Snapshot(int(card["recipe"]["steps"]), float(card.get("train_cpu_seconds", math.nan)), file)
    return [*sorted(kept, key=lambda one: one.step), last]


def training_cost(task: str, model: str) -> dict[str, float]:
    """What a model's card tells of its size and of what making it took; empty where there is no card.

    `parameters`: trained numbers; `train_cpu_seconds`: processor time of the training and of the trajectories that it
    learned from, without its teacher's or that of a map it started from.
    """
    file = checkpoint_path(task, model)
    card = read_card(file) if file.is_file() else {}  # every cell asks, whose model was read before
    spent = [card.get(f"{part}_cpu_seconds") for part in ("train", "trajectories")]
    told = {"parameters": card.get("parameters")}
    if spent[0]:
        told["train_cpu_seconds"] = sum(part or 0.0 for part in spent)
    return {name: float(value) for name, value in told.items() if isinstance(value, int | float)}


def model_hash(task: str, model: str, *, path: Path | None = None) -> str:
    """Twelve hexadecimal digits of the checkpoint's bytes, or of a closed form's constants."""
    check_names(task, model)
    if model == CLOSED_FORM:
        return constants_hash(task)
    file = _existing(task, model, path)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
