"""The one trainer: Adam with warm-up and cosine decay, exponential moving average, resumable to the same trajectory.

Every step draws from a generator seeded by (seed, step), so a run killed at any moment and resumed sees the
batches an uninterrupted run would have seen. The state (network, average, optimiser moments) is safetensors, saved
at intervals and moved into place. A loss that is not finite is skipped and counted.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.checkpoints import (
    CheckpointError,
    as_stored,
    fill,
    read_tensors,
    rounded,
    save_checkpoint,
    save_tensors,
)
from flowlik_models.numerics.float32 import full_float32
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.training import acceleration, throughput
from flowlik_models.training.batches import Source
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.training.losses import loss_of
from flowlik_models.training.preparation import prepared, training_hash
from flowlik_models.training.process_group import ALONE, WHOLE, Group, Part, join
from flowlik_models.zoo import recipe_for

_WARM_UP = 200
_SAVE_EVERY = 30.0  # seconds
_VALIDATE_EVERY = 60.0  # seconds
_COUNTED = 8  # samples whose operations are counted
_BAD_STEPS = 50  # consecutive non-finite losses after which training stops


@dataclass(frozen=True)
class Progress:
    """What the trainer reports about every second: step, steps, mean loss since the last report, seconds trained, steps
    skipped because their loss was not finite, and the latest validation error of the likelihood, mean |error| in
    bits/dim (None: not measured yet, or a model without a fast likelihood). ``rate``: samples a second since the last
    report; ``flops``: floating-point operations a second, and ``utilisation`` what share of the device's peak that is
    (None: not counted; no peak known).
    """

    step: int
    steps: int
    loss: float
    seconds: float
    skipped: int = 0
    validation: float | None = None
    rate: float | None = None
    flops: float | None = None
    utilisation: float | None = None


class TrainingError(RuntimeError):
    """Training could not go on; the last good state is on disk."""


class StoppedError(Exception):
    """Raised by a `progress`: the training is saved and ends here; a later call goes on."""


def _recipe_key(recipe: Recipe, seed: int) -> str:
    # how a step is shared out changes nothing but rounding, so that a run may go on on another machine
    recipe = recipe.with_options(accumulate=1, compile=False)
    flat = recipe.flat()
    if not flat["round_trip"]:
        del flat["round_trip"]  # as it was before there was that option
    text = json.dumps([flat, seed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _shortened(recipe: Recipe, steps: int | None, accumulate: int | None) -> Recipe:
    """The recipe with other numbers of steps and of parts, where they are given."""
    given = {"steps": steps, "accumulate": accumulate}
    return recipe.with_options(**{name: value for name, value in given.items() if value})


def _learning_rate(recipe: Recipe, step: int) -> float:
    steps = recipe.optimiser.steps
    first, last, share = 0, steps, 1.0
    if recipe.realuid is not None:  # whose stages train different networks
        first, last, share = recipe.realuid.stage(step, steps)
    warm = min(1.0, (step - first + 1) / _WARM_UP)
    decay = 0.5 * (1 + math.cos(math.pi * (step - first) / (last - first)))
    return recipe.optimiser.learning_rate * share * warm * max(decay, 1e-3)


class _Training:
    """Network, moving average of its weights and optimiser, with their state on disk; a process's share of them."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        key: str,
        path: Path,
        group: Group = ALONE,
        device: str = "cpu",
    ) -> None:
        self.network, self.average = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.recipe, self.key, self.path, self.group = recipe, key, path, group
        self.optimiser = acceleration.optimiser(network, recipe, device)
        # for every loss, but where the fused optimiser of a GPU looks at them itself; those are read about every second
        self.waits = torch.device(device).type != "cuda"
        self.pending: list[Tensor] = []  # losses not read yet
        self.losses: list[float] = []  # finite ones since the last report
        self.earlier = torch.zeros((), device=device)  # loss of the parts already taken
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

    def save_if_finite(self) -> bool:
        """Save, unless the latest losses were not finite; whether it did."""
        self.read_losses()
        if not self.bad:
            self.save()
        return not self.bad

    def resume(self) -> bool:
        """Restore the state on disk; False where there is none of this recipe and seed."""
        try:
            tensors, metadata = read_tensors(self.path)
        except CheckpointError:
            if self.path.exists():
                raise
            return False
        if metadata.get("key") != self.key:
            return False
        for prefix, module in (("network.", self.network), ("average.", self.average)):
            fill(module, _below(prefix, tensors), self.path)
        for index, parameter in enumerate(self.network.parameters()):
            state = _below(f"optimiser.{index}.", tensors)
            self.optimiser.state[parameter] = {
                name: self._restored(name, value, parameter) for name, value in state.items()
            }
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.cpu_seconds = float(metadata.get("cpu_seconds", 0))
        self.skipped = int(metadata.get("skipped", 0))
        return True

    def _restored(self, name: str, value: Tensor, parameter: Tensor) -> Tensor:
        """A tensor of the optimiser as its kernels need it: moments in the parameter's own memory format."""
        if name == "step":
            return value.to(parameter.device) if self.optimiser.defaults["fused"] else value
        return torch.empty_like(parameter, requires_grad=False).copy_(value)

    def take_early(self, loss: Tensor, parts: int) -> None:
        """Gradients of a part of the step, of which ``parts`` are taken in all, other processes' included."""
        torch.autograd.backward(loss / parts)
        self.earlier = self.earlier + loss.detach() / parts

    def take(self, loss: Tensor, parts: int = 1) -> None:
        """One step with the last part of its loss, or none where the loss is not finite; TrainingError after too many
        of those in a row."""
        loss = loss / parts
        value, self.earlier = self.earlier + loss.detach(), torch.zeros_like(self.earlier)
        self.group.sum_([value])
        self.pending.append(value)
        if self.waits:
            finite = math.isfinite(float(value))
        else:  # the fused optimiser leaves the weights alone where this is set
            finite, self.optimiser.found_inf = True, (~value.isfinite()).float()  # type: ignore[attr-defined]
        if finite:
            self.update(loss)
        else:
            self.optimiser.zero_grad(set_to_none=True)
        if self.waits:
            self.read_losses()
        self.step += 1

    def read_losses(self) -> None:
        """Read the losses of the steps since last time; TrainingError after too many in a row that are not finite."""
        losses = torch.stack(self.pending).tolist() if self.pending else []
        self.pending = []
        for self.loss in losses:
            if math.isfinite(self.loss):
                self.losses.append(self.loss)
                self.bad = 0
            else:
                self.bad, self.skipped = self.bad + 1, self.skipped + 1
            if self.bad >= _BAD_STEPS:
                raise TrainingError(
                    f"{self.bad} losses in a row were not finite; the last good state is {self.path}"
                )

    def update(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)
        parameters = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        self.group.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grad_norm_(parameters, self.recipe.optimiser.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = _learning_rate(self.recipe, self.step)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        decay = min(self.recipe.optimiser.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    def snapshot(self) -> None:
        """Save the average as it is now, at the steps of the recipe's ``snapshots``."""
        options = self.recipe.optimiser
        if self.step not in {round(share * options.steps) for share in options.snapshots}:
            return
        name = self.path.name.removesuffix(".state.safetensors")
        file = self.path.parent / "snapshots" / f"{name}-{self.step}.safetensors"
        counts = {"step": self.step, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        tensors = as_stored(self.average.state_dict(), self.recipe.execution.stored)
        origin = {"task": self.path.parent.name, "model": name}
        save_tensors(file, tensors, {key: str(value) for key, value in counts.items()} | origin)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class _Monitor:
    """Time, state on disk, validation and progress while a training goes on."""

    def __init__(
        self,
        run: _Training,
        progress: Callable[[Progress], None] | None,
        validate: Callable[[nn.Module], float | None] | None,
        flops: int | None = None,
        peak: float | None = None,
    ) -> None:
        self.flops, self.peak = flops, peak  # operations of a sample, and what the devices could do a second
        self.reported_step = run.step
        self.run, self.progress, self.validate = run, progress, validate
        self.begun = self.saved = self.reported = self.validated = time.monotonic()
        self.before, self.cpu_before = run.seconds, run.cpu_seconds - time.process_time()
        self.error: float | None = None

    def after_step(self) -> None:
        """Save, validate and report where it is time to."""
        run, now = self.run, time.monotonic()
        run.seconds = self.before + now - self.begun
        run.cpu_seconds = self.cpu_before + time.process_time()
        if not run.group.first:
            if now - self.reported > 1:
                run.read_losses()
                self.reported = now
            return
        run.snapshot()
        if now - self.saved > _SAVE_EVERY and run.save_if_finite():
            self.saved = now
        if self.validate and now - self.validated > _VALIDATE_EVERY:
            self.error, self.validated = self.validate(run.average), time.monotonic()
        if self.progress and (now - self.reported > 1 or run.step == run.recipe.optimiser.steps):
            run.read_losses()
            self.progress(self._report(now))
            self.reported, self.reported_step, run.losses = now, run.step, []

    def _report(self, now: float) -> Progress:
        run = self.run
        mean = sum(run.losses) / max(len(run.losses), 1)
        rate = (run.step - self.reported_step) * run.recipe.optimiser.batch / max(now - self.reported, 1e-9)
        flops = None if self.flops is None else rate * self.flops
        share = None if flops is None or self.peak is None else flops / self.peak
        counts = (run.step, run.recipe.optimiser.steps, mean, run.seconds, run.skipped)
        return Progress(*counts, self.error, rate, flops, share)


@full_float32()
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
    accumulate: int | None = None,
) -> Path:
    """Train a model by its recipe and write ``out/<task>/<model>.safetensors`` with its card; returns that path.

    ``steps`` shortens (or lengthens) the recipe, ``accumulate`` is the number of parts in which a process takes its
    share of a batch. In a process of torchrun the batch is shared with the others; the first one saves, judges and
    reports. ``validate`` turns the averaged network into figures for the card, ``quick_validate``, called every minute,
    into the error of its likelihood. ``progress`` is called about every second.

    Raises:
        ValueError: unknown task or model, a closed form, or a batch that cannot be shared out equally, or at all.
        CheckpointError: a model this one builds on is missing or does not fit.
        TrainingError: the loss was not finite in 50 consecutive steps; the last good state is on disk.
    """
    recipe = _shortened(recipe_for(task, model), steps, accumulate)
    group, device = join(device)
    _parts(group, model, recipe)
    torch.manual_seed(seed)
    network, source = prepared(task, recipe, out, device, group)
    return fit(
        acceleration.laid_out(network, recipe, device),
        source,
        recipe,
        out / task / f"{model}.safetensors",
        card={"task": task, "model": model, "commit": commit, "data_hash": training_hash(task)},
        device=device,
        group=group,
        seed=seed,
        resume=resume,
        progress=progress,
        validate=validate,
        quick_validate=quick_validate,
    )


def fit(
    network: nn.Module,
    source: Source,
    recipe: Recipe,
    path: Path,
    *,
    card: dict[str, Any],
    device: str = "cpu",
    group: Group = ALONE,
    seed: int = 0,
    resume: bool = True,
    progress: Callable[[Progress], None] | None = None,
    validate: Callable[[nn.Module], dict[str, Any]] | None = None,
    quick_validate: Callable[[nn.Module], float | None] | None = None,
) -> Path:
    """Train any network by a recipe on the batches of any source, and write it to ``path`` with its card beside it.

    The network lies on the device. ``card`` says ``task`` and ``model``; what the training took and what ``validate``
    finds is added, and its ``key``, where it has one, names all that determines the result besides recipe and seed: an
    interrupted call goes on where one of the same key stopped. The other arguments are those of `train`.

    Raises:
        ValueError: a batch that cannot be shared out equally, or at all.
        TrainingError: the loss was not finite in 50 consecutive steps; the last good state is on disk.
        StoppedError: ``progress`` raised it; the state is on disk.
    """
    parts = _parts(group, card["model"], recipe)
    state = path.with_suffix(".state.safetensors")
    key = _recipe_key(recipe, seed) + str(card.get("key", ""))
    run = _Training(network, recipe, key, state, group, device)
    if resume:
        run.resume()
    group.wait()  # nobody saves while others still read

    flops = _operations(recipe, run, source, device)
    acceleration.compiled(network, recipe)
    monitor = _Monitor(run, progress, quick_validate, flops, throughput.peak(device, group.size))
    try:
        _take_steps(run, source, parts, monitor, seed, device)
    except StoppedError:
        run.save_if_finite()
        raise
    group.leave()
    if group.first:
        run.save_if_finite()  # judging takes minutes, and may be stopped too
        average = rounded(run.average, recipe.execution.stored)
        first = {"task": card["task"], "model": card["model"], "recipe": recipe.flat(), "seed": seed}
        card = first | card | _costs(run, source, device)
        card["parameters"] = sum(p.numel() for p in network.parameters())
        card["accuracy"] = validate(average) if validate else {}
        save_checkpoint(path, average, card, stored=recipe.execution.stored)
        run.path.unlink(missing_ok=True)
    return path


def pace(network: nn.Module, source: Source, recipe: Recipe, device: str = "cpu", steps: int = 12) -> float:
    """Seconds of a step of such a training, the median of a few that leave the network as it is."""
    with tempfile.TemporaryDirectory() as folder:
        run = _Training(copy.deepcopy(network), recipe, "", Path(folder) / "pace", device=device)
        taken = []
        for seed in range(steps):
            begun = time.monotonic()
            run.take(_loss(recipe, run, source, device, WHOLE, seed))
            run.read_losses()
            taken.append(time.monotonic() - begun)
    return sorted(taken[2:])[len(taken[2:]) // 2]


def _parts(group: Group, model: str, recipe: Recipe) -> list[Part]:
    """The parts of a batch that this process takes. Raises ValueError where the batch cannot be cut into them."""
    batch = recipe.optimiser.batch
    parts = group.parts(accumulate=recipe.optimiser.accumulate)
    count = parts[0].count
    if batch % count:
        raise ValueError(f"a batch of {batch} cannot be taken in {count} equal parts")
    if count > 1 and recipe.realuid is not None and recipe.realuid.whole_batch:
        raise ValueError(
            f"{model} compares the rows of a batch with each other: train {model} in one process, accumulate 1"
        )
    return parts


def _take_steps(
    run: _Training, source: Source, parts: list[Part], monitor: _Monitor, seed: int, device: str
) -> None:
    """Train from the present step to the recipe's last one."""
    run.network.train()
    while run.step < run.recipe.optimiser.steps:
        for part in parts:
            loss = _loss(run.recipe, run, source, device, part, seed * 1_000_003 + run.step)
            if part is not parts[-1]:
                run.take_early(loss, part.count)
        run.take(loss, part.count)
        monitor.after_step()


def _costs(run: _Training, source: Source, device: str) -> dict[str, Any]:
    """What the training took and on what, for the card."""
    pool = source.pool
    return {
        "train_seconds": round(run.seconds, 1),
        "train_cpu_seconds": round(run.cpu_seconds, 1),
        "trajectories_cpu_seconds": round(pool.cpu_seconds, 1) if pool else 0.0,
        "skipped_steps": run.skipped,
        "processes": run.group.size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(),
    }


def _loss(recipe: Recipe, run: _Training, source: Source, device: str, part: Part, seed: int) -> Tensor:
    """The loss of a part of the batch of a step, drawn from the step's seed."""
    generator = torch.Generator(source.device).manual_seed(seed)
    torch.manual_seed(part.seed(seed))  # dropout
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=recipe.execution.precision == "bfloat16"):
        return loss_of(recipe, run.network, run.average, source, generator, device, run.step, part)


def _operations(recipe: Recipe, run: _Training, source: Source, device: str) -> int | None:
    """Floating-point operations of a sample in training, counted on a small batch of images; None elsewhere, and of
    RealUID, whose steps are not alike."""
    if not isinstance(source, ImageSource) or recipe.realuid is not None:
        return None
    few = recipe.with_options(batch=_COUNTED, accumulate=1)
    operations = throughput.operations(lambda: _loss(few, run, source, device, WHOLE, 0)) // _COUNTED
    run.optimiser.zero_grad(set_to_none=True)
    return operations
