"""From the words of a command line to the cells of a run."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

from flowlik.cells import Cell, Options, is_control
from flowlik.evaluation.batching.batch_size import AUTO
from flowlik.evaluation.models import load
from flowlik.planning import suites
from flowlik.tasks.arrays import ArrayTask
from flowlik.tasks.own.task_file import file_of
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError
from flowlik_models.names import unknown


def plan_cells(
    suite: str | None,
    specs: Sequence[str] | None,
    tasks: Sequence[str] | None,
    models: Sequence[str] | None,
    *,
    seeds: tuple[int, ...] | None,
    limit: int | None,
    device: str,
    say: Callable[[str], None] = lambda line: None,
) -> list[Cell]:
    """The cells of a command line.

    Without estimators: those of the suite, of the given tasks and models. With estimators: these, on the given tasks
    (default: the suite's) and models (default: all of a task). Of such a cross the pairs that do not fit are left out,
    and `say` is told how many; one estimator and one model by name are a pair that is run as it is.

    Raises:
        ValueError: an unknown name, or nothing left to run.
    """
    tasks = [get_task(name).id for name in tasks or ()]
    own = [name for name in tasks if file_of(name)]
    for line in refused_students(own, models):
        say(line)
    overrides = {"seeds": seeds} if seeds else {}
    cells = suites.load_suite(suite or "quick", device=device, overrides=dict(overrides))
    if specs:
        base = suites.options_of(suites.read_suite(suite or "quick").get("defaults", {}), Options())
        names = list(tasks or dict.fromkeys(cell.task for cell in cells))
        cells = cross(names, models, specs, base, seeds=seeds, device=device, say=say)
        if not is_pair(specs, models):
            cells = fitting(cells, named=bool(models), say=say)
        cells = suites.unique([*cells, *suites.control_cells(cells)])
    else:
        if tasks:
            cells = [cell for cell in cells if cell.task in tasks]
        if missing := [name for name in own if name not in {cell.task for cell in cells}]:
            cells += own_cells(missing, seeds=seeds, device=device)
        if models:
            check_models(models, sorted({cell.task for cell in cells}))
            cells = [
                cell
                for cell in cells
                if cell.is_control or any(fnmatch.fnmatch(cell.model, m) for m in models)
            ]
    if not [cell for cell in cells if specs or not cell.is_control]:
        raise ValueError(_nothing_left(suite, tasks))
    if limit:
        cells = suites.unique([limited(cell, limit) for cell in cells])
    return cells


def cross(
    tasks: Sequence[str],
    models: Sequence[str] | None,
    specs: Sequence[str],
    options: Options,
    *,
    seeds: tuple[int, ...] | None,
    device: str,
    say: Callable[[str], None],
) -> list[Cell]:
    """As `suites.expand`, but of several tasks each gets the models that it has; a model is of one at least."""
    if not models or len(tasks) == 1:
        return suites.expand(tasks, models, specs, options, seeds=seeds, device=device)
    check_models(models, tasks)
    cells = []
    for name in tasks:
        had = [model for model in models if fnmatch.filter(get_task(name).models, model)]
        if had:
            cells += suites.expand([name], had, specs, options, seeds=seeds, device=device)
        else:
            say(f"{name} has no model {' or '.join(models)} and is left out")
    return cells


def own_cells(tasks: Sequence[str], *, seeds: tuple[int, ...] | None, device: str) -> list[Cell]:
    """What is run on tasks of one's own that no suite knows: every model, by the estimators that fit it.

    Up to `EXACT_DIMS` dimensions the trace is exact, beyond by probes; batches are smaller where items are large.
    """
    cells: list[Cell] = []
    for name in tasks:
        task = get_task(name)
        field = "ode" if task.dim <= EXACT_DIMS else "ode[trace=hutchinson]"
        options = Options(batch_size=max(1, min(1000, BATCH_NUMBERS // task.dim)))
        found = suites.expand([name], task.given_models, [field], options, seeds=seeds, device=device)
        found += suites.expand([name], None, OWN, options, seeds=seeds, device=device)
        cells += [cell for cell in found if _misfit(cell, named=False) is None] or found
    return suites.unique([*cells, *suites.control_cells(cells)])


def refused_students(tasks: Sequence[str], models: Sequence[str] | None) -> list[str]:
    """A line for each student of these tasks of one's own that is there and not taken, as its teacher is another."""
    found = [get_task(name) for name in tasks] if models is None else []
    return [line for task in found if isinstance(task, ArrayTask) for line in task.refused_students()]


OWN = ["f2d2[steps=1|2|4|8]", "pi-flow[segments=1|2|4]", "energy", "exact-flow"]
EXACT_DIMS = 16
BATCH_NUMBERS = 1 << 19
"""Numbers in a batch: 1,000 items in up to 524 dimensions, 42 of 64 x 64 pixels in three colours."""


def check_own(cells: Sequence[Cell]) -> None:
    """Make every model of the tasks of one's own and evaluate it once, before anything is written.

    Raises:
        ValueError: one of them cannot be made or evaluated; the line names the file.
    """
    for cell in cells:
        guidance = getattr(cell.estimator, "guidance", None)
        if guidance is not None and not _has_labels(cell):
            raise ValueError(
                f"{cell.label}: guides to a label of each row, and {cell.model} of {cell.task} is given none"
            )
    for name, device in dict.fromkeys((cell.task, cell.device) for cell in cells if cell.task_file):
        models = [cell.model for cell in cells if cell.task == name and not cell.is_control]
        get_task(name).check(tuple(dict.fromkeys(models)), device)


def _has_labels(cell: Cell) -> bool:
    """Whether the cell's model is given labels; or it, or the data, are not there, which the cell itself says."""
    try:
        model, _ = load(cell.task, cell.model, cell.device, cell.options.dtype)
        return get_task(cell.task).for_model(model).items("test", 1).cond is not None
    except Exception:
        return True


def _nothing_left(suite: str | None, tasks: Sequence[str] | None) -> str:
    if without := [name for name in tasks or () if not get_task(name).models]:
        return f"no model of {', '.join(without)} is there yet; control rows run without: -e control-gaussian"
    return f"suite {suite or 'quick'!r} has no cell for these tasks and models; name estimators with -e"


def check_models(models: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise ValueError where a name or a pattern fits a model of none of these tasks."""
    valid = tuple(dict.fromkeys(model for name in tasks for model in get_task(name).models))
    for model in models:
        if not fnmatch.filter(valid, model):
            one = get_task(tasks[0]) if len(tasks) == 1 else None
            raise ValueError(unknown("model", model, valid) if one is None else one.no_such_model(model))


def limited(cell: Cell, limit: int) -> Cell:
    """The cell on at most `limit` items and samples."""
    options = cell.options
    return cell.with_options(n_items=min(options.n_items, limit), samples=min(options.samples, limit))


def is_pair(specs: Sequence[str], models: Sequence[str] | None) -> bool:
    """Whether a command line names one estimator and one model, not patterns of some."""
    estimators = [spec for spec in specs if not is_control(spec)]
    return len(estimators) <= 1 and len(models or ()) == 1 and "*" not in "".join(models or ())


def fitting(cells: Sequence[Cell], *, named: bool, say: Callable[[str], None]) -> list[Cell]:
    """The cells whose model and estimator fit; what is left out is told in one line.

    A model that is not trained is left out as well, unless models were `named`: its cell says how to get it.

    Raises:
        ValueError: nothing fits.
    """
    pairs = {(cell.task, cell.model, cell.label): cell for cell in cells if not cell.is_control}
    reasons = {pair: _misfit(cell, named) for pair, cell in pairs.items()}
    served = {label for (_, _, label), reason in reasons.items() if reason is None}
    without = {pair: reason for pair, reason in reasons.items() if reason is not None}
    if without and not served:
        (task, model, label), reason = next(iter(without.items()))
        raise ValueError(
            f"none of the {len(without)} pairs of model and estimator fits; {label} on {model} of {task}: {reason}"
        )
    unfit = [pair for pair, reason in without.items() if not isinstance(reason, _NotTrained)]
    if unfit:
        idle = dict.fromkeys(label for _, _, label in unfit if label not in served)
        tail = f"; nothing is left of {', '.join(idle)}" if idle else ""
        loaded = len(unfit) + len(reasons) - len(without)
        say(f"{len(unfit)} of {loaded} pairs of model and estimator do not fit and are left out{tail}")
    return [cell for cell in cells if (cell.task, cell.model, cell.label) not in without]


class _NotTrained(str):
    """A reason that lies in the model alone: one of many that could be there."""


def _misfit(cell: Cell, named: bool) -> str | None:
    """Why model and estimator do not fit; None where they do, or where the run says what is wrong with the model."""
    try:
        model, _ = load(cell.task, cell.model, cell.device, cell.options.dtype)
    except UnavailableError as error:
        return None if named else _NotTrained(error)
    except Exception:
        return None
    reason: str | None = cell.estimator.supports(model)
    return reason


def with_run_options(cells: list[Cell], compile_: bool, batch_size: str | None) -> list[Cell]:
    """The cells with the options that a run may overrule; controls have no network and no batches.

    Raises:
        ValueError: a batch size that is neither a number above 0 nor auto.
    """
    changes: dict[str, Any] = {"compile": True} if compile_ else {}
    if batch_size is not None:
        if batch_size != AUTO and not (batch_size.isdecimal() and int(batch_size) > 0):
            raise ValueError(f"--batch-size {batch_size!r}: expected a number above 0, or {AUTO}")
        changes["batch_size"] = AUTO if batch_size == AUTO else int(batch_size)
    return [cell if cell.is_control else cell.with_options(**changes) for cell in cells]
