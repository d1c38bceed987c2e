"""The one trainer: Adam with warm-up and cosine decay, exponential moving average, resumable to the same trajectory.

Every step draws from a generator seeded by (seed, step), so a run killed at any moment and resumed sees the
batches an uninterrupted run would have seen. The state (network, average, optimiser moments) is safetensors, saved
at intervals and moved into place. A loss that is not finite is skipped and counted.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoints import CheckpointError, fill, read_checkpoint, save_checkpoint, save_tensors
from .data import data_hash
from .networks.vector import VectorFlowMap
from .objectives import CONDITIONS, Context, adaptive, evaluation, flow_matching_loss, own_field, residuals
from .objectives.batch import Batch
from .recipes import DATA_TEACHER, Recipe, smallest_step
from .sources import ClosedFormSource, DigitsSource, Field, Source, path_starts
from .synthetic import SYNTHETIC_TASKS, closed_form, constants_hash
from .trajectories import Paths, solve, solve_closed_form, stored_paths
from .zoo import build, checkpoint_path, load_model, model_hash, recipe_for

_WARM_UP = 200
_SAVE_EVERY = 30.0  # seconds
_POOL_SEED = 77
_FITTED = 20_000  # points that clusters are fitted to
_VALIDATE_EVERY = 60.0  # seconds
_BAD_STEPS = 50  # consecutive non-finite losses after which training stops


@dataclass(frozen=True)
class Progress:
    """What the trainer reports now and then: step, steps, mean loss since the last report, seconds trained, steps
    skipped because their loss was not finite, and the latest validation error of the likelihood, mean |error| in
    bits/dim (None: not measured yet, or a model without a fast likelihood).
    """

    step: int
    steps: int
    loss: float
    seconds: float
    skipped: int = 0
    validation: float | None = None


class TrainingError(RuntimeError):
    """Training could not go on; the last good state is kept."""


def _recipe_key(recipe: Recipe, seed: int) -> str:
    text = json.dumps([dataclasses.asdict(recipe), seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _trained(task: str, model: str, out: Path) -> Path:
    """A model this one builds on: from the same output folder, else the shipped one."""
    own = out / task / f"{model}.safetensors"
    return own if own.is_file() else checkpoint_path(task, model)


def _source(task: str, recipe: Recipe, out: Path, device: str) -> Source:
    if task in SYNTHETIC_TASKS:
        return _closed_form_source(task, recipe, out)
    if recipe.teacher == DATA_TEACHER:
        return DigitsSource(None)
    path = _trained(task, recipe.teacher, out)
    teacher = load_model(task, recipe.teacher, path=path, device=device).requires_grad_(False)
    if not recipe.pool:
        return DigitsSource(teacher)
    weights = model_hash(task, recipe.teacher, path=path)
    cache = out / task / f"{recipe.teacher}-paths-{weights}-{recipe.pool}-{recipe.pool_probes}.safetensors"
    paths = stored_paths(cache, lambda: solve(teacher, recipe.pool, probes=recipe.pool_probes))
    return DigitsSource(teacher, paths)


def _closed_form_source(task: str, recipe: Recipe, out: Path) -> Source:
    truth = closed_form(task)
    if not recipe.pool:
        return ClosedFormSource(truth)
    law = (recipe.altered, recipe.altered_scale, recipe.altered_law, recipe.delta, recipe.pool)
    name = hashlib.sha256(f"{constants_hash(task)} {law}".encode()).hexdigest()[:12]

    def solved() -> Paths:
        generator = torch.Generator().manual_seed(_POOL_SEED)
        starts = path_starts(truth, recipe, generator)
        return solve_closed_form(truth, starts, delta=recipe.delta, generator=generator)

    return ClosedFormSource(truth, stored_paths(out / task / f"paths-{name}.safetensors", solved))


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
    expected = network.state_dict()
    unknown = [
        name for name in tensors if name not in expected or tensors[name].shape != expected[name].shape
    ]
    if unknown:
        raise CheckpointError(f"{path}: tensor {unknown[0]!r} does not fit the network of {task}")
    network.load_state_dict({**expected, **{name: tensor.float() for name, tensor in tensors.items()}})


def _loss(run: _Run, source: Source, batch: Batch, generator: torch.Generator, device: str) -> Tensor:
    """The loss of one batch, a scalar."""
    recipe, network = run.recipe, run.network
    if recipe.objective == "flow-matching":
        return flow_matching_loss(network, _to(batch, device))["velocity"].mean()
    if recipe.divergence and batch.divergence is None:
        divergence = recipe.divergence_target(run.average, batch.x.to(device), batch.t.to(device), generator)[
            1
        ]
        batch = dataclasses.replace(batch, divergence=divergence)
    target = evaluation(run.average, recipe.divergence)
    taught = recipe.teacher != DATA_TEACHER
    field = _on(device, source.field(recipe, generator)) if taught else own_field(target)
    context = Context(
        target=target,
        field=field,
        end=run.end,
        delta=recipe.delta,
        derivative=recipe.derivative,
        middle=recipe.middle,
        smallest=run.end * smallest_step(recipe),
        broadcast="broadcast" in recipe.faults,
    )
    errors = residuals(
        network,
        _to(batch, device),
        CONDITIONS[recipe.objective],
        CONDITIONS[recipe.divergence_objective or recipe.objective],
        context,
        divergence_scale=recipe.divergence_scale,
        relative=recipe.relative,
    )
    if recipe.weight_c is None:
        return torch.stack([error.mean() for error in errors.values()]).sum()
    weights = dict(zip(("velocity", "divergence"), recipe.weight_c, strict=True))
    return torch.stack([adaptive(error, weights[name]).mean() for name, error in errors.items()]).sum()


def _on(device: str, field: Field) -> Field:
    return lambda x, t: tuple(part.to(device) for part in field(x.cpu(), t.cpu()))


def _to(batch: Batch, device: str) -> Batch:
    divergence = None if batch.divergence is None else batch.divergence.to(device)
    x, t, s = batch.x.to(device), batch.t.to(device), batch.s.to(device)
    direct = None if batch.direct is None else batch.direct.to(device)
    return Batch(x, t, s, batch.velocity.to(device), divergence, direct)


def _learning_rate(recipe: Recipe, step: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP)
    return recipe.learning_rate * warm * max(0.5 * (1 + math.cos(math.pi * step / recipe.steps)), 1e-3)


class _Run:
    """Network, average and optimiser of one training run, and their state on disk."""

    def __init__(self, network: nn.Module, recipe: Recipe, key: str, path: Path) -> None:
        self.network, self.average = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.end = 1.0 - float(getattr(network, "eps", 0.0))
        self.recipe, self.key, self.path = recipe, key, path
        kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
        self.optimiser = kind(
            network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.99)
        )
        self.step, self.seconds, self.skipped = 0, 0.0, 0

    def save(self) -> None:
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters()):
            for name, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
        counts = {"step": self.step, "seconds": self.seconds, "skipped": self.skipped}
        save_tensors(
            self.path, tensors, {name: str(value) for name, value in counts.items()} | {"key": self.key}
        )

    def resume(self) -> bool:
        """Take up the state on disk; False where there is none of this recipe and seed."""
        if not self.path.is_file():
            return False
        tensors, _ = read_checkpoint(self.path)
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
        if metadata.get("key") != self.key:
            return False
        for prefix, module in (("network.", self.network), ("average.", self.average)):
            part = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            fill(module, part, self.path)
        for index, parameter in enumerate(self.network.parameters()):
            prefix = f"optimiser.{index}."
            state = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
            self.optimiser.state[parameter] = {
                name: value if name == "step" else value.to(parameter) for name, value in state.items()
            }
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.skipped = int(metadata.get("skipped", 0))
        return True

    def update(self, loss: Tensor) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(self.recipe, self.step)
        self.optimiser.step()
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)


def train(
    task: str,
    model: str,
    *,
    out: Path,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    steps: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    validate: Callable[[nn.Module], dict[str, Any]] | None = None,
    quick_validate: Callable[[nn.Module], float | None] | None = None,
    commit: str | None = None,
) -> Path:
    """Train a model by its recipe and write ``out/<task>/<model>.safetensors`` with its card; returns that path.

    ``steps`` shortens (or lengthens) the recipe. ``validate`` turns the averaged network into figures for the card,
    ``quick_validate``, called every minute, into the error of its likelihood. ``progress`` is called about every
    second.

    Raises:
        ValueError: unknown task or model, or a closed form.
        CheckpointError: a model this one builds on is missing or does not fit.
        TrainingError: the loss was not finite in 50 consecutive steps; the last good state is kept.
    """
    recipe = recipe_for(task, model)
    if steps is not None:
        recipe = dataclasses.replace(recipe, steps=steps)
    torch.manual_seed(seed)
    network = build(task, recipe)
    if isinstance(network, VectorFlowMap) and network.clusters is not None:
        generator = torch.Generator().manual_seed(_POOL_SEED)
        network.clusters.fit(closed_form(task).sample(_FITTED, generator=generator))
    _start(network, task, recipe, out)
    source = _source(task, recipe, out, device)
    run = _Run(
        network.to(device), recipe, _recipe_key(recipe, seed), out / task / f"{model}.state.safetensors"
    )
    if resume:
        run.resume()

    begun = last_save = last_report = last_validation = time.monotonic()
    before, total, count, bad, error = run.seconds, 0.0, 0, 0, None
    network.train()
    while run.step < recipe.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
        torch.manual_seed(seed * 1_000_003 + run.step)  # dropout
        batch = source.batch(recipe, generator)
        with torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = _loss(run, source, batch, generator, device)
        value = float(loss.detach())
        if math.isfinite(value):
            run.update(loss)
            bad, total, count = 0, total + value, count + 1
        else:
            bad, run.skipped = bad + 1, run.skipped + 1
            if bad >= _BAD_STEPS:
                raise TrainingError(
                    f"{bad} losses in a row were not finite; the last good state is {run.path}"
                )
        run.step += 1
        now = time.monotonic()
        run.seconds = before + now - begun
        if now - last_save > _SAVE_EVERY and bad == 0:
            run.save()
            last_save = now
        if quick_validate and now - last_validation > _VALIDATE_EVERY:
            error, last_validation = quick_validate(run.average), time.monotonic()
        if progress and (now - last_report > 1 or run.step == recipe.steps):
            mean = total / max(count, 1)
            progress(Progress(run.step, recipe.steps, mean, run.seconds, run.skipped, error))
            last_report, total, count = now, 0.0, 0

    card: dict[str, Any] = {
        "task": task,
        "model": model,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "commit": commit,
        "train_seconds": round(run.seconds, 1),
        "skipped_steps": run.skipped,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "data_hash": constants_hash(task) if task in SYNTHETIC_TASKS else data_hash(task, "train"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": validate(run.average) if validate else {},
    }
    path = out / task / f"{model}.safetensors"
    save_checkpoint(path, run.average, card)
    run.path.unlink(missing_ok=True)
    return path
