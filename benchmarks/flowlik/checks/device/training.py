"""Parts that train: steps of every objective on images, and the full-size network of CIFAR-10 while time is given."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from flowlik.checks.device.setting import Setting, in_a_line
from flowlik_models.moments.training_images import IMAGE_SHAPES, TrainingImages, training_images
from flowlik_models.objectives.calibration import only_the_head
from flowlik_models.recipes import RECIPES, Recipe
from flowlik_models.recipes.recipe import DATA_TEACHER
from flowlik_models.training import acceleration
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.training.trainer import Progress, StoppedError, fit
from flowlik_models.training.trajectories import STEPS as POOL_STEPS
from flowlik_models.training.trajectories import solve
from flowlik_models.zoo import build

Entry = dict[str, Any]
STEPS: Final = 100
POOL: Final = 400
IMAGES: Final = 6400
NARROW: Final[dict[str, Any]] = {"widths": (8, 8, 8), "blocks": 1}
"""Of the networks at a hundredth of the size."""

FULL_NETWORK: Final[dict[str, Any]] = {"widths": (128, 256, 320, 320), "blocks": 2, "embed": 512}
"""34.7 million parameters."""

FULL_STEPS: Final = 400_000


def objectives(setting: Setting) -> Iterator[Entry]:
    """Steps of every image objective on random images: samples a second, operations a second, share of the peak."""
    for task, name in representatives(tuple(IMAGE_SHAPES)[:: -1 if setting.full else 1]):
        recipe = RECIPES[task][name]
        try:
            found = _steps(task, recipe, setting)
        except Exception as error:
            found = {"failed": in_a_line(error)}
        yield {
            "task": task,
            "model": name,
            "objective": recipe.objective,
            "joint": recipe.divergence,
            **found,
        }


def representatives(tasks: Sequence[str]) -> list[tuple[str, str]]:
    """A recipe for each objective on images, with and without a divergence head; of the first task that has one.

    >>> representatives(("fashion-mnist", "digits"))[0]
    ('fashion-mnist', 'teacher')
    """
    kinds: dict[tuple[str, bool], tuple[str, str]] = {}
    for task in tasks:
        for name, recipe in RECIPES.get(task, {}).items():
            kinds.setdefault((recipe.objective, recipe.divergence), (task, name))
    return list(kinds.values())


def sized(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe as this device takes it: few steps, a small pool, and off a GPU a narrow network of a small batch."""
    few: dict[str, Any] = {"steps": setting.of(STEPS), "snapshots": ()}
    if recipe.trajectories.pool:
        few["pool"] = setting.of(POOL)
    if not setting.full:
        network = {**recipe.network, **NARROW}
        few |= {
            "compile": False,
            "batch": 4,
            "network": {k: v for k, v in network.items() if k != "attention"},
        }
    return recipe.with_options(**few)


def _steps(task: str, recipe: Recipe, setting: Setting) -> Entry:
    recipe = sized(recipe, setting)
    network, source = _made(task, recipe, setting)
    with tempfile.TemporaryDirectory() as folder:
        return _fitted(
            network, source, recipe, Path(folder) / "model.safetensors", setting, {"task": task, "model": "-"}
        )


def _made(task: str, recipe: Recipe, setting: Setting) -> tuple[torch.nn.Module, ImageSource]:
    """An untrained network of the recipe, and random images with an untrained teacher where it has one."""
    torch.manual_seed(0)
    network = build(task, recipe).to(setting.device)
    if recipe.objective == "calibration":
        only_the_head(network)
    images = random_images(task, setting.of(IMAGES))
    if recipe.teacher == DATA_TEACHER:
        return network, ImageSource(images, device=setting.device)
    taught = sized(RECIPES[task]["teacher"], setting)
    teacher = build(task, taught).to(setting.device).eval().requires_grad_(False)
    pool = recipe.trajectories
    share = 0.0 if recipe.realuid is not None else pool.pool_data
    steps = POOL_STEPS if setting.full else 2
    solved = solve(teacher, pool.pool, images=images, data_share=share, steps=steps) if pool.pool else None
    return network, ImageSource(images, teacher, solved, setting.device)


def random_images(task: str, n: int) -> TrainingImages:
    """Grey levels drawn at random, (n, *event): how fast training goes does not depend on the picture."""
    levels = 17 if task == "digits" else 256
    drawn = torch.randint(levels, (n, *IMAGE_SHAPES[task]), generator=torch.Generator().manual_seed(0))
    return TrainingImages(drawn.to(torch.uint8), levels, task == "cifar10", "random")


def _fitted(
    network: torch.nn.Module,
    source: ImageSource,
    recipe: Recipe,
    path: Path,
    setting: Setting,
    card: dict[str, Any],
    progress: Callable[[Progress], None] | None = None,
) -> Entry:
    """Train, and what the last report said."""
    seen: list[Progress] = []

    def listen(now: Progress) -> None:
        seen.append(now)
        if progress is not None:
            progress(now)

    stopped = False
    laid_out = acceleration.laid_out(network, recipe, setting.device)
    try:
        fit(laid_out, source, recipe, path, card=card, device=setting.device, progress=listen)
    except StoppedError:
        stopped = True
    now = seen[-1] if seen else None
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "precision": recipe.execution.precision,
        "compiled": recipe.execution.compile,
        "batch": recipe.optimiser.batch,
        "steps": recipe.optimiser.steps if now is None else now.step,
        "of": recipe.optimiser.steps,
        "unfinished": stopped,
        "loss": None if now is None else now.loss,
        "images_per_s": None if now is None else now.rate,
        "flops_per_s": None if now is None else now.flops,
        "utilisation": None if now is None else now.utilisation,
        "train_seconds": None if now is None else now.seconds,
    }


def cifar10(setting: Setting) -> Iterator[Entry]:
    """The full-size teacher of CIFAR-10, bfloat16 and compiled, until its time is up; a later call goes on there.

    At a hundredth of the size random images of 8x8 stand in for the data set.

    Raises:
        MissingDataError, DataError: the images are not there, or not as published.
    """
    until = time.monotonic() + setting.seconds
    task = "cifar10" if setting.full else "digits"
    recipe = RECIPES["cifar10"]["teacher"]
    if setting.full:
        recipe = recipe.with_options(network={**recipe.network, **FULL_NETWORK}, steps=FULL_STEPS)
        images = training_images(task)
    else:
        recipe = sized(recipe, setting).with_options(steps=STEPS)
        images = random_images(task, setting.of(IMAGES))
    torch.manual_seed(0)
    network = build(task, recipe).to(setting.device)
    source = ImageSource(images, device=setting.device)
    path = Path(setting.folder) / "cifar10" / "teacher-full.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)

    def stop(now: Progress) -> None:
        if time.monotonic() > until and now.step < now.steps:
            raise StoppedError

    card = {"task": "cifar10", "model": "teacher-full", "data_hash": images.identity}
    yield _fitted(network, source, recipe, path, setting, card, stop)
