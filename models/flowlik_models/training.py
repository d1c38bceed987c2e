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

from .checkpoints import fill, read_checkpoint, save_checkpoint, save_tensors
from .data import data_hash
from .losses import loss_of
from .preparation import network_for, source_for
from .recipes import Recipe
from .synthetic import SYNTHETIC_TASKS, constants_hash
from .zoo import recipe_for

_WARM_UP = 200
_SAVE_EVERY = 30.0  # seconds
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


def _learning_rate(recipe: Recipe, step: int) -> float:
    warm = min(1.0, (step + 1) / _WARM_UP)
    return recipe.learning_rate * warm * max(0.5 * (1 + math.cos(math.pi * step / recipe.steps)), 1e-3)


class _Run:
    """Network, average and optimiser of one training run, and their state on disk."""

    def __init__(self, network: nn.Module, recipe: Recipe, key: str, path: Path) -> None:
        self.network, self.average = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.recipe, self.key, self.path = recipe, key, path
        kind = torch.optim.AdamW if recipe.weight_decay else torch.optim.Adam
        self.optimiser = kind(
            network.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=recipe.betas,
        )
        self.step, self.seconds, self.cpu_seconds, self.skipped = 0, 0.0, 0.0, 0
        self.loss, self.bad = math.nan, 0  # of the last step, and how many bad ones in a row

    def save(self) -> None:
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, parameter in enumerate(self.network.parameters()):
            for name, value in self.optimiser.state[parameter].items():
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value)
        counts = {
            "step": self.step,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "skipped": self.skipped,
        }
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
        self.cpu_seconds = float(metadata.get("cpu_seconds", 0))
        self.skipped = int(metadata.get("skipped", 0))
        return True

    def take(self, loss: Tensor) -> None:
        """One step, or none where the loss is not finite; TrainingError after too many of those in a row."""
        self.loss = float(loss.detach())
        if math.isfinite(self.loss):
            self.update(loss)
            self.bad = 0
        else:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
        if self.bad >= _BAD_STEPS:
            raise TrainingError(
                f"{self.bad} losses in a row were not finite; the last good state is {self.path}"
            )
        self.step += 1

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


class _Watch:
    """Time, state on disk, validation and progress while a run goes on."""

    def __init__(
        self,
        run: _Run,
        progress: Callable[[Progress], None] | None,
        validate: Callable[[nn.Module], float | None] | None,
    ) -> None:
        self.run, self.progress, self.validate = run, progress, validate
        self.begun = self.saved = self.reported = self.validated = time.monotonic()
        self.before, self.cpu_before = run.seconds, run.cpu_seconds - time.process_time()
        self.losses: list[float] = []
        self.error: float | None = None

    def look(self) -> None:
        """After every step: save, validate and report where it is time to."""
        run, now = self.run, time.monotonic()
        run.seconds = self.before + now - self.begun
        run.cpu_seconds = self.cpu_before + time.process_time()
        if math.isfinite(run.loss):
            self.losses.append(run.loss)
        if now - self.saved > _SAVE_EVERY and not run.bad:
            run.save()
            self.saved = now
        if self.validate and now - self.validated > _VALIDATE_EVERY:
            self.error, self.validated = self.validate(run.average), time.monotonic()
        if self.progress and (now - self.reported > 1 or run.step == run.recipe.steps):
            mean = sum(self.losses) / max(len(self.losses), 1)
            self.progress(Progress(run.step, run.recipe.steps, mean, run.seconds, run.skipped, self.error))
            self.reported, self.losses = now, []


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
    network = network_for(task, recipe, out).to(device)
    source = source_for(task, recipe, out, device)
    run = _Run(network, recipe, _recipe_key(recipe, seed), out / task / f"{model}.state.safetensors")
    if resume:
        run.resume()

    watch = _Watch(run, progress, quick_validate)
    kind = torch.device(device).type
    network.train()
    while run.step < recipe.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + run.step)
        torch.manual_seed(seed * 1_000_003 + run.step)  # dropout
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = loss_of(recipe, network, run.average, source, generator, device, run.step)
        run.take(loss)
        watch.look()

    card: dict[str, Any] = {
        "task": task,
        "model": model,
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "commit": commit,
        "train_seconds": round(run.seconds, 1),
        "train_cpu_seconds": round(run.cpu_seconds, 1),
        "trajectories_cpu_seconds": round(source.paths.cpu_seconds, 1) if source.paths else 0.0,
        "skipped_steps": run.skipped,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": "cpu" if kind == "cpu" else torch.cuda.get_device_name(),
        "data_hash": constants_hash(task) if task in SYNTHETIC_TASKS else data_hash(task, "train"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": validate(run.average) if validate else {},
    }
    path = out / task / f"{model}.safetensors"
    save_checkpoint(path, run.average, card)
    run.path.unlink(missing_ok=True)
    return path
