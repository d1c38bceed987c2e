"""`flowlik.distill`: a joint flow map of a velocity field of one's own, and a card that judges it against that field.

The teacher's trajectories are solved once and kept, the student is trained on them (`flowlik_models.distillation`), and
its few-step likelihood is compared per item with the teacher's converged one on items that neither has seen in it.
"""

from __future__ import annotations

import copy
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

from flowlik.records.environment import commit
from flowlik.scoring.judgement import judged, lines_of, pool_error
from flowlik.tasks.arrays import ArrayTask
from flowlik.tasks.own.fingerprint import fingerprint
from flowlik.tasks.own.students import NAMES, load_student, with_card
from flowlik.tasks.points import whole
from flowlik_estimators import examine
from flowlik_models.checkpoints import CheckpointError, fill, read_checkpoint
from flowlik_models.distillation.pool import Pool, solved_pool
from flowlik_models.distillation.recipes import recipe_of
from flowlik_models.distillation.source import Rows, TeacherSource
from flowlik_models.distillation.students import moments_of, sized, student_of
from flowlik_models.distillation.teacher import Teacher
from flowlik_models.files import write_atomically
from flowlik_models.images.pixels import continuous
from flowlik_models.interfaces import can
from flowlik_models.names import unknown
from flowlik_models.numerics.float32 import full_float32
from flowlik_models.objectives.calibration import only_the_head
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.training.trainer import Progress, fit, pace

Say = Callable[[str], None]
HELD_OUT, HELD_OUT_SHARE, FEWEST_ROWS = 1000, 0.1, 20
TASK_ROWS = 200_000
POOL_SHARE, FEWEST_PATHS, TRIED_PATHS = 0.3, 1024, 128
"""Of the minutes given, how much the trajectories may take; and how many are solved at least, and to see the pace."""

SPEAK_EVERY = 30.0  # seconds


def distill(
    model: Any,
    train_x: Any,
    objective: str = "direct",
    network: nn.Module | None = None,
    *,
    held_out: Any = None,
    levels: int | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    pool: int | None = None,
    out: str | Path | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    say: Say = print,
) -> Any:
    """A joint flow map of a velocity field: log p and samples in 1 to 8 evaluations, without a derivative.

    Args:
        model: the teacher, a field as `flowlik.wrap` gives it, with ends and a source of its own or without.
        train_x: training rows (n, *event), with ``levels`` whole numbers 0..levels - 1.
        objective: direct (regression on solved trajectories), meanflow, shortcut-distill, lsd; calibration trains the
            divergence head of ``network``, a student, alone.
        network: the student: None for the suite's own, sized by the data; a module with ``joint(x, t, s)``; or one of
            two times, ``average_velocity(x, t, s)`` or ``network(x, t, s)``, which gets a divergence head. It is
            trained in place.
        held_out: rows that the card judges it on; default a tenth of ``train_x``, 1,000 at most, not trained on.
        levels: number of levels of discrete data.
        minutes: time for trajectories and training together, without the judgement; default the recipe's steps.
        steps, pool: number of steps and of trajectories instead of the recipe's.
        out: folder for trajectories, state, checkpoint and card; the same call goes on there where it was interrupted,
            and only reads what is finished. None keeps nothing.
        device: where teacher and student lie.
        seed: of network and batches.
        resume: False begins anew; solved trajectories are used all the same.
        say: called with every line of the card and of the progress.

    Returns:
        The student, with ``joint``, ``average_velocity`` and ``velocity``, the teacher's ends, and ``card``: mean
        |error| and bias in bits/dim at 1, 2, 4 and 8 steps with standard errors, and those of `control-mean`.

    Raises:
        ValueError: rows, model or network that do not fit, an unknown objective; one line.

    >>> from flowlik_models.synthetic import closed_form
    >>> teacher = closed_form("gaussian-2d")
    >>> x = teacher.sample(400, generator=torch.Generator().manual_seed(0))
    >>> student = distill(teacher, x, steps=2, pool=64, say=lambda line: None)
    >>> sorted(student.card["accuracy"]["steps"])
    ['1', '2', '4', '8']
    """
    rows, held = _rows(model, train_x, held_out, levels)
    work = _Work(model, rows, held, objective, network, minutes, steps, pool, device, seed, resume, say)
    if out is not None:
        return work.student(Path(out) / f"{NAMES[objective]}.safetensors", "own")
    with tempfile.TemporaryDirectory() as folder:
        return work.student(Path(folder) / f"{NAMES[objective]}.safetensors", "own")


def distill_task(
    task: ArrayTask,
    model: str,
    *,
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    resume: bool = True,
    say: Say = print,
) -> Path:
    """`flowlik train mine.py direct-f2d2`: the reference model of a task of one's own distilled; the checkpoint's path.

    Raises:
        ValueError: a model that is not made from a task of one's own, or what `distill` raises.
    """
    objectives = {name: objective for objective, name in NAMES.items()}
    if model not in objectives:
        raise ValueError(unknown("student", model, objectives))
    if task.items("test", 1).cond is not None:
        raise ValueError(
            f"{task.name}: conditional models are not distilled: fix the label in the model's call"
        )
    taught = task.taught
    task.check([taught], device)
    teacher, _ = task.load_model(taught, device)
    held = whole(task.items("test", HELD_OUT).x).float()
    train = task.raw("train", TASK_ROWS)
    objective, path = objectives[model], out / task.id / f"{model}.safetensors"
    rows = Rows(train.float() if task.levels is None else train, task.levels)
    start = None
    if objective == "calibration":
        start = load_student(path.with_name("direct-f2d2.safetensors"), teacher)
    work = _Work(teacher, rows, held, objective, start, minutes, steps, None, device, seed, resume, say)
    work.student(path, task.id)
    return path


@dataclass
class _Work:
    """One call of `distill`, step by step."""

    model: Any
    rows: Rows
    held: Tensor
    objective: str
    network: nn.Module | None
    minutes: float | None
    steps: int | None
    paths: int | None
    device: str
    seed: int
    resume: bool
    say: Say

    def __post_init__(self) -> None:
        self.teacher = Teacher.of(_evaluating(self.model, self.device))
        shape = tuple(self.model.event_shape)
        self.recipe = recipe_of(self.objective, shape, steps=self.steps, pool=self.paths)
        if self.objective == "calibration" and not hasattr(self.network, "divergence_head"):
            raise ValueError(
                "objective calibration trains the divergence head of a student: give network=student"
            )
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be positive, got {self.minutes}")

    @full_float32()
    def student(self, path: Path, task: str) -> Any:
        """The student, trained or read from ``path``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            example = self.rows.draw(min(len(self.rows.x), 50_000), torch.Generator().manual_seed(self.seed))
            moments = None
            if self.network is None:
                moments = moments_of(example)
                self.recipe = sized(self.recipe, tuple(example.shape[1:]), moments)
            student = student_of(self.teacher, example, self.recipe, self.network, moments).to(self.device)
            key = self._key(student)
            # removed when both files of the student are written
            unfinished = path.with_suffix(".state.safetensors").is_file()
            if unfinished or not (self.resume and _card(path).get("key") == key):
                self._train(student, path, self._named(task, key))
            tensors, card = read_checkpoint(path)
        fill(student, tensors, path)
        for line in lines_of(card):
            self.say(line)
        return with_card(student, card)

    def _named(self, task: str, key: str) -> dict[str, Any]:
        """What names the student."""
        return {
            "task": task,
            "model": NAMES[self.objective],
            "key": key,
            "teacher": fingerprint(self.model),
        }

    def _key(self, student: nn.Module) -> str:
        """Names everything that determines the result."""
        shapes = [(name, tuple(tensor.shape)) for name, tensor in student.state_dict().items()]
        start = fingerprint(student) if self.objective == "calibration" else ""
        given = (self.minutes, self.steps, self.paths, self.seed, self.objective, self.rows.levels)
        return fingerprint(self.model, self.rows.x, self.held, shapes, start, given)

    def _train(self, student: nn.Module, path: Path, card: dict[str, Any]) -> None:
        for finding in examine(self.teacher.model, self.held[:64].to(self.device)):
            self.say(f"examination of the teacher: {finding}")
        if self.objective == "calibration":
            only_the_head(student)
        plan = _Plan(path.with_suffix(".plan.json"), card["key"])
        pool = self._pool(path.parent, plan)
        source = TeacherSource(self.rows, self.teacher, pool, self.device)
        off = pool_error(self.teacher, pool, self.device)
        self.say(f"{pool.states.shape[1]} trajectories, mean |error| of their log p {off:.2g} bits/dim")
        recipe = self._timed(student, source, plan, pool)
        card |= {"objective": self.objective, "trajectories_error": off, "commit": commit()[0]}

        def validate(network: nn.Module) -> dict[str, Any]:
            return judged(self.teacher.model, network, self.held, self.rows.levels, self.device)

        fit(
            student,
            source,
            recipe,
            path,
            card=card,
            device=self.device,
            seed=self.seed,
            resume=self.resume,
            progress=self._spoken(),
            validate=validate,
        )
        plan.file.unlink(missing_ok=True)

    def _pool(self, folder: Path, plan: _Plan) -> Pool:
        """The teacher's trajectories, as many as the minutes allow, kept in the folder."""
        recipe, spoken = self.recipe, time.monotonic()
        options: dict[str, Any] = {"delta": recipe.times.delta, "nodes": self._nodes(), "device": self.device}
        options["probes"] = recipe.trajectories.pool_probes
        own = 1.0 - recipe.trajectories.pool_data

        def starts(n: int, generator: torch.Generator) -> Tensor:
            return self.rows.starts(recipe.points, n, generator)

        def counted() -> int:
            if self.minutes is None or self.paths is not None:
                return recipe.trajectories.pool
            tried = solved_pool(self.teacher, starts, TRIED_PATHS, own=own, **options)
            affordable = 60 * self.minutes * POOL_SHARE * TRIED_PATHS / max(tried.cpu_seconds, 1e-3)
            return int(min(recipe.trajectories.pool, max(FEWEST_PATHS, affordable // 1024 * 1024)))

        n = int(plan.get("pool", counted))
        law = (n, own, options["delta"], options["nodes"], options["probes"], recipe.points)
        name = fingerprint(self.model, self.rows.x, self.rows.levels, repr(law))

        def progress(done: int) -> None:
            nonlocal spoken
            if time.monotonic() - spoken > SPEAK_EVERY:
                spoken = time.monotonic()
                self.say(f"{done} of {n} trajectories")

        return solved_pool(
            self.teacher, starts, n, own=own, **options, folder=folder / f"paths-{name}", say=progress
        )

    def _spoken(self) -> Callable[[Progress], None]:
        """Says where the training is, now and then."""
        spoken = -SPEAK_EVERY

        def speak(now: Progress) -> None:
            nonlocal spoken
            if now.step == now.steps or now.seconds - spoken >= SPEAK_EVERY:
                spoken = now.seconds
                self.say(f"step {now.step} of {now.steps}, loss {now.loss:.4g}, {now.seconds:.0f} s")

        return speak

    def _nodes(self) -> int:
        return 48 if math.prod(self.model.event_shape) <= 128 else 32

    def _timed(self, student: nn.Module, source: TeacherSource, plan: _Plan, pool: Pool) -> Recipe:
        """The recipe with as many steps as are left of the minutes."""
        if self.minutes is None or self.steps is not None:
            return self.recipe

        def counted() -> int:
            assert self.minutes is not None
            left = max(60 * self.minutes - pool.cpu_seconds, 60 * self.minutes * POOL_SHARE)
            return max(20, int(left / pace(student, source, self.recipe, self.device)))

        return self.recipe.with_options(steps=int(plan.get("steps", counted)))


class _Plan:
    """What the minutes allow, decided once, so that an interrupted call goes on as it began."""

    def __init__(self, file: Path, key: str) -> None:
        self.file, self.key = file, key

    def get(self, name: str, found: Callable[[], int]) -> int:
        """What was decided before, else what is found now."""
        known = _read_json(self.file)
        if known.get("key") != self.key:
            known = {"key": self.key}
        if name not in known:
            known[name] = found()
            write_atomically(self.file, json.dumps(known).encode())
        return int(known[name])


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError, RecursionError):
        return {}


def _card(path: Path) -> dict[str, Any]:
    try:
        return read_checkpoint(path)[1]
    except CheckpointError:
        return {}


def _evaluating(model: Any, device: str) -> Any:
    """The teacher in evaluation mode on the device, a copy where it is a module."""
    return (
        copy.deepcopy(model).to(device).eval().requires_grad_(False)
        if isinstance(model, nn.Module)
        else model
    )


def _check_field(model: Any) -> None:
    if not can(model, "velocity"):
        raise ValueError(
            f"distill: a {type(model).__name__} is no velocity field: wrap the network, "
            "flowlik.wrap(net, event_shape, predicts=...)"
        )
    if getattr(model, "event_shape", None) is None:
        raise ValueError("distill: the model has no event_shape, the shape of one sample")


def _rows(model: Any, train_x: Any, held_out: Any, levels: int | None) -> tuple[Rows, Tensor]:
    """Training rows and held-out ones, these dequantised once. Raises ValueError for what does not fit."""
    _check_field(model)
    shape = tuple(getattr(model, "event_shape", ()))
    train = _tensor("train_x", train_x, shape, levels)
    if held_out is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
        kept = min(HELD_OUT, int(HELD_OUT_SHARE * len(train)))
        train, held = train[order[kept:]], train[order[:kept]]
    else:
        held = _tensor("held_out", held_out, shape, levels)[:HELD_OUT]
    if len(train) < FEWEST_ROWS or len(held) < 2:
        raise ValueError(
            f"distill: {len(train)} rows to train on, {len(held)} to judge: at least {FEWEST_ROWS} and 2"
        )
    return Rows(train, levels), held.float() if levels is None else _dequantised(Rows(held, levels))


def _dequantised(rows: Rows) -> Tensor:
    assert rows.levels is not None
    noise = torch.rand(rows.x.shape, generator=torch.Generator().manual_seed(2))
    return continuous(rows.x, rows.levels, noise)


def _tensor(name: str, rows: Any, shape: tuple[int, ...], levels: int | None) -> Tensor:
    x = torch.as_tensor(rows).detach().cpu()
    if tuple(x.shape[1:]) != shape or x.ndim < 2:
        raise ValueError(
            f"distill: {name} has shape {tuple(x.shape)}, expected (n, {', '.join(map(str, shape))})"
        )
    if levels is None and not bool(torch.isfinite(x.double()).all()):
        raise ValueError(f"distill: {name} holds NaN or infinity; leave such rows out")
    if levels is not None and (x.is_floating_point() or int(x.min()) < 0 or int(x.max()) >= levels):
        raise ValueError(f"distill: {name}: with levels={levels} expected whole numbers 0..{levels - 1}")
    return x
