"""`flowlik.score`: a model's bits/dim with an error that is stated, by an estimator that a pilot chooses."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flowlik
from flowlik.cells import check_truncation
from flowlik.evaluation.models import load
from flowlik.measures.accuracy import bits_per_dim
from flowlik.measures.arrays import Array
from flowlik.measures.importance_weighted import FEW_WEIGHTS, cell_masses
from flowlik.scoring.evaluating import Subject
from flowlik.scoring.kept import BPD, Kept
from flowlik.scoring.pilot import Wish, plan
from flowlik.scoring.result import EstimatorError, Score
from flowlik.scoring.rounds import Rounds, Table
from flowlik.tasks.arrays import ArrayTask
from flowlik.tasks.own.reading import as_array
from flowlik.tasks.points import whole
from flowlik.tasks.task import Items, Task, with_normal_noise
from flowlik_estimators import examine
from flowlik_estimators.model_checks import stand_in
from flowlik_estimators.model_checks.guards import device_of
from flowlik_models.interfaces import can
from flowlik_models.moments.moments import attach

ACCURACY = 0.01
EXAMINED = 64
ALL = 10**12
CHECKED = 256
"""Rows whose values are counted."""

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a score may be asked for; `score` says what each is."""

    accuracy: float | None = None
    budget: float | None = None
    weights: int = 1
    truncated_normal: float = 0.0
    seed: int = 0

    def wish(self, *, discrete: bool) -> Wish:
        """The same, checked.

        Raises:
            ValueError: a value that is none, or several dequantisations of data that are not discrete.
        """
        for name, value, least in (("accuracy", self.accuracy, 0.0), ("budget", self.budget, 1.0)):
            if value is not None and not (_is_number(value, Real) and value > 0.0 and value >= least):
                raise ValueError(f"{name}={value}: expected a number above 0, of a budget at least 1")
        for name, whole_number, least_whole in (("weights", self.weights, 1), ("seed", self.seed, 0)):
            if not (_is_number(whole_number, Integral) and whole_number >= least_whole):
                raise ValueError(f"{name}={whole_number}: expected a whole number of at least {least_whole}")
        if self.weights > 1 and not discrete:
            raise ValueError(
                f"weights={self.weights}: only discrete data have several dequantisations: give whole numbers and "
                "their levels"
            )
        check_truncation(self.truncated_normal)
        if self.truncated_normal and not discrete:
            raise ValueError(
                f"truncated_normal={self.truncated_normal}: only discrete data have dequantisation noise: give whole "
                "numbers and their levels"
            )
        default = ACCURACY if self.budget is None else None
        accuracy = default if self.accuracy is None else self.accuracy
        return Wish(accuracy=accuracy, budget=self.budget, noiseless=self.weights > 1)


def score(
    model: Any,
    x: Any,
    *,
    levels: int | None = None,
    cond: Any = None,
    accuracy: float | None = None,
    budget: float | None = None,
    weights: int = 1,
    truncated_normal: float = 0.0,
    seed: int = 0,
    out: Path | str | None = None,
    progress: Say = lambda _: None,
) -> Score:
    """Bits/dim of a model on data, with what the estimator itself may be off by.

    Args:
        model: what `flowlik.wrap` gives, or any model with ``event_shape`` and a method of
            `flowlik_models.interfaces`: a velocity field, a joint flow map, a policy flow, an exact flow.
        x: (n, *event) as `flowlik.ArrayTask` takes them. With ``levels`` whole numbers 0..levels-1, which get their
            noise here, or floats in [-1, 1] that have it already; else floats.
        levels: of discrete data; the answer is then that of the discrete data.
        cond: (n, ...) what the model is conditioned on.
        accuracy: bits/dim that the stated error, half its 95 % width, is to stay within; 0.01 without a budget.
        budget: evaluations and derivative products an item at most.
        weights: dequantisations an item; above 1 importance-weighted, by an exact trace (docs/math.md section 13).
        truncated_normal: 0 for uniform dequantisation noise; else that of a normal, cut at so many standard deviations
            where the cell ends (docs/math.md section 13).
        seed: of the probes and of the pilot's items.
        out: a file for the values (.npz), with which a later call of the same kind goes on; beside it the answer.
        progress: called with lines of text.

    Raises:
        ValueError: misuse, or a model that no estimator here converges on; one line.

    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gmm-2d")
    >>> x = model.sample(64, generator=torch.Generator().manual_seed(0))
    >>> result = score(model, x)
    >>> truth = float(-model.log_prob(x).mean() / (2 * math.log(2)))
    >>> abs(result.bpd - truth) <= result.error.stated <= 0.01
    True
    """
    asked = Options(
        accuracy=accuracy, budget=budget, weights=weights, truncated_normal=truncated_normal, seed=seed
    )
    own = None if levels is None or _has_noise(x, levels) else levels
    wish = asked.wish(discrete=own is not None)
    labels = None if cond is None else {"train": cond, "test": cond}
    task = ArrayTask(id="score", train=x, test=x, levels=own, labels=labels, models={"model": lambda: model})
    if can(model, "velocity") and getattr(model, "moments", None) is None and task.rows_in("test") > 1:
        model = attach(copy.copy(model), task.data_moments())
    items = _with_noise(task.items("test", task.rows_in("test"), max(weights, 1)), own, asked)
    found = stand_in.found(model)
    subject = Subject(
        name=type(model).__name__,
        model=model,
        items=items,
        dim=task.dim,
        levels=levels,
        device=device_of(found),
        dtype=torch.float64 if _only_float64(found.parameters) else torch.float32,
        seed=seed,
    )
    key = {"model": task.own_model_hash("model"), "data": task.data_hash("test"), "levels": levels}
    kept = Kept(None if out is None else Path(out), key, progress)
    return _scored(subject, asked, wish, kept, progress, given=None if own else levels)


def score_task(
    task: Task,
    model: str,
    options: Options,
    *,
    split: str = "test",
    limit: int | None = None,
    levels: int | None = None,
    device: str = "cpu",
    out: Path | None = None,
    progress: Say = lambda _: None,
) -> Score:
    """The same of a task's model on the first ``limit`` items of a split; ``out`` is the folder of the values.

    Raises:
        ValueError: as in `score`; levels that are not those of the task. UnavailableError: the model is not there.
    """
    task.check_split(split)
    own = task.levels if task.dequantises(split) else None
    if levels is not None and own is not None and levels != own:
        raise ValueError(f"levels={levels}: the task {task.id} says {own}; change it there")
    wish = options.wish(discrete=own is not None)
    items = _with_noise(task.items(split, ALL if limit is None else limit, options.weights), own, options)
    if levels is not None and own is None and not _has_noise(whole(items.x[:CHECKED]), levels):
        raise ValueError(f"levels={levels}: say levels= in the task, whose data are whole numbers")
    loaded, weights = load(task.id, model, device, "float32")
    subject = Subject(
        name=f"{model} on {task.id}",
        model=loaded,
        items=items,
        dim=task.dim,
        levels=own or levels,
        device=torch.device(device),
        dtype=torch.float32,
        seed=options.seed,
    )
    key = {"model": weights, "data": task.data_hash(split), "split": split, "levels": own or levels}
    file = None if out is None else out / f"{model}.npz"
    kept = Kept(file, key, progress)
    return _scored(subject, options, wish, kept, progress, given=None if own else levels)


def _with_noise(items: Items, levels: int | None, options: Options) -> Items:
    """Items with the dequantisation noise that was asked for; ``levels`` of data that get theirs here."""
    if levels is None or not options.truncated_normal:
        return items
    return with_normal_noise(items, levels, options.truncated_normal)


def _scored(
    subject: Subject, options: Options, wish: Wish, kept: Kept, say: Say, *, given: int | None
) -> Score:
    """``given``: levels of data that were scaled before they came."""
    start = time.monotonic()
    findings = _findings(subject, given)
    for finding in findings:
        say(f"examination: {finding}")
    n = subject.items.n
    kept.look({**vars(options), "items": n, "flowlik": flowlik.__version__})
    chosen = kept.plan or plan(subject, wish, say)
    say(chosen.why)
    table = Table(len(subject.items.x), kept.held)
    rounds = Rounds(subject, chosen, wish, table, lambda arrays: kept.store(arrays, chosen), say)
    rounds.run()
    found = _result(rounds, findings, options.weights, time.monotonic() - start)
    card = {name: value for name, value in vars(found).items() if name != "per_item"}
    kept.finish(
        {**table.stored(), BPD: found.per_item},
        chosen,
        card | {"error": vars(found.error), "line": str(found)},
    )
    return found


def _only_float64(parameters: list[nn.Parameter]) -> bool:
    """Whether the network takes float64 only; closed forms hold buffers and take either."""
    return {each.dtype for each in parameters if each.is_floating_point()} == {torch.float64}


def _is_number(value: Any, kind: type[Any]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _has_noise(x: Any, levels: int) -> bool:
    """Whether these are floats of discrete data that are scaled to [-1, 1] and have their noise already.

    Raises:
        ValueError: floats beyond, or with so few values that their noise is missing.
    """
    if not isinstance(x, Tensor | np.ndarray | list | tuple):
        return False
    values = torch.from_numpy(np.array(as_array(x, "x")))
    if not values.is_floating_point() or bool((values == values.round()).all()):
        return False
    if bool((values.abs() > 1.0).any()):
        raise ValueError(
            f"x holds floats from {float(values.min()):g} to {float(values.max()):g}: with levels={levels} expected "
            f"whole numbers 0..{levels - 1}, or 2 (k + noise)/{levels} - 1 in [-1, 1]"
        )
    values = values[:CHECKED]
    different = len(np.unique(values.numpy()))
    if different <= levels < values.numel():
        raise ValueError(
            f"x holds {different} different numbers, so its noise is missing: with levels={levels} give "
            f"the whole numbers 0..{levels - 1}"
        )
    return True


def _findings(subject: Subject, levels: int | None) -> list[str]:
    x, cond, _ = subject.rows(np.arange(min(EXAMINED, subject.items.n)))
    state = torch.get_rng_state()
    try:
        return [str(finding) for finding in examine(subject.model, x, cond, levels=levels)]
    finally:
        torch.set_rng_state(state)


def _result(rounds: Rounds, findings: list[str], weights: int, seconds: float) -> Score:
    subject, chosen, wish, table = rounds.subject, rounds.plan, rounds.wish, rounds.table
    n = subject.items.n
    log_prob, flagged = _weighted(table.log_prob.reshape(weights, n) - subject.items.log_noise)
    bits = bits_per_dim(log_prob, subject.dim, subject.levels)
    known = bits[np.isfinite(bits)]
    if len(known) == 0:
        raise ValueError(
            f"{subject.name}: no item has a value by {chosen.estimator.label}; flowlik check says more"
        )
    error = rounds.error
    missed = wish.accuracy is not None and not error.stated <= wish.accuracy
    forwards, products = table.per_item("forwards"), table.per_item("products")
    return Score(
        name=subject.name,
        bpd=float(known.mean()),
        se=float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan,
        error=error,
        per_item=bits,
        nfe=forwards * weights,
        work=(forwards + products) * weights,
        pilot_work=chosen.work / n,
        seconds=seconds,
        estimator=chosen.estimator.label,
        why=chosen.why,
        reached=not missed,
        shortfall=_shortfall(rounds, error) if missed else None,
        findings=findings,
        flagged=flagged,
        missing=n - len(known),
        draws=None if subject.levels is None else weights,
    )


def _weighted(draws: Array) -> tuple[Array, int]:
    """Log of the mean over draws (draws, n), and how many items rest on fewer than two of them."""
    if len(draws) == 1:
        return draws[0], 0
    cells = cell_masses(draws, volume=0.0)
    return cells.log_mass, int((cells.draws < FEW_WEIGHTS).sum())


def _shortfall(rounds: Rounds, error: EstimatorError) -> str:
    """What was asked for, what is left, and what would reach it."""
    chosen, wish = rounds.plan, rounds.wish
    of_solver = abs(chosen.bias) + chosen.bar + chosen.rest
    assert wish.accuracy is not None
    if of_solver < wish.accuracy:
        budget = rounds.noise.variance * rounds.noise.quantile**2 / rounds.subject.items.n
        more = max(1, math.ceil(budget / (wish.accuracy - of_solver) ** 2))
        cure = f"about {more} probes an item would reach it: a larger budget, or none"
    elif wish.budget is not None:
        cure = "the solver needs more steps: a larger budget, or none"
    else:
        cure = "more steps do not help; does the network round its time? `flowlik check` says more"
    return f"accuracy {wish.accuracy:g} not reached ({error.stated:.2g}): {cure}"
