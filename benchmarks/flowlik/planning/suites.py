"""Suites: TOML files that spell out cells.

```toml
description = "what it is for"
[defaults]                      # any field of `flowlik.cells.Options`
n_items = 1000
[[cells]]                       # the product of tasks x models x estimators (x splits x seeds)
tasks = ["gmm-2d"]
models = ["closed-form"]
estimators = ["ode[solver=euler,steps=1|2|4|8]"]
density = true                  # and any option, for these cells only
```
Every task and split of a suite also gets the control rows, unless `controls = false` stands at the top.

Other packages add suites by the entry-point group `flowlik.suites`: name -> the path of a TOML file, or a callable
that returns it.
"""

from __future__ import annotations

import fnmatch
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from flowlik.cells import CONTROLS, DTYPES, Cell, Options
from flowlik.evaluation.batching.batch_size import AUTO
from flowlik.evaluation.samples.extractors import FURTHER
from flowlik.evaluation.uses import USES
from flowlik.tasks.own.task_file import file_of
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import Task
from flowlik_estimators import parse_spec
from flowlik_models.names import unknown
from flowlik_models.plugins import load_plugins

FOLDER = Path(__file__).resolve().parents[1] / "suites"
_OPTIONS = tuple(field.name for field in fields(Options))
MOST_CELLS = 100_000
"""Of a run: so many are planned in seconds and fit into memory."""

_LISTS = ("tasks", "models", "estimators", "splits", "seeds")


@cache
def files() -> dict[str, Path]:
    """The files of all suites by name: those that come with the package, then those of other packages.

    Raises:
        ValueError: two packages give the same name, or one that of a built-in suite.
    """
    builtin = {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    return builtin | load_plugins("flowlik.suites", builtin, _admitted)


def _admitted(name: str, loaded: Any) -> Path:
    """The file whose path an entry point gives. Raises OSError or ValueError where it is not there or no TOML."""
    path = Path(os.fspath(loaded() if callable(loaded) else loaded))
    tomllib.loads(path.read_text(encoding="utf-8"))
    return path


def available() -> tuple[str, ...]:
    """Names of all suites."""
    return tuple(sorted(files()))


def suite_file(name: str) -> Path:
    """The file of a suite: a name from `available`, or a path to a TOML file.

    Raises:
        ValueError: unknown name or no such file; the line names the valid ones.
    """
    if name.endswith(".toml"):
        if Path(name).is_file():
            return Path(name)
        raise ValueError(
            f"{name}: no such file; suites that are installed go by name: {', '.join(available())}"
        )
    if name not in available():
        raise ValueError(unknown("suite", name, available()))
    return files()[name]


def read_suite(name: str) -> dict[str, Any]:
    """A suite's TOML, checked for unknown keys.

    Raises:
        ValueError: unknown suite, broken TOML or an unknown key; the line names the file and the valid keys.
    """
    file = suite_file(name)
    try:
        suite = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected a TOML file ({error})") from error
    except RecursionError:
        raise ValueError(f"{file}: expected a TOML file, nested less deeply") from None
    for key, value in suite.items():
        _known(file, key, tuple(_TOP))
        if not isinstance(value, _TOP[key]):
            raise ValueError(f"{file}: {key} = {value!r}: expected {_TOP[key].__name__}")
    for key in suite.get("defaults", {}):
        _known(file, key, _OPTIONS)
    for entry in suite.get("cells", []):
        _check_entry(file, entry)
    return suite


_TOP: dict[str, type] = {"description": str, "controls": bool, "defaults": dict, "cells": list}


def _check_entry(file: Path, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"{file}: cells = [{entry!r}]: expected tables, [[cells]]")
    for key, value in entry.items():
        _known(file, key, (*_LISTS, *_OPTIONS))
        kind = int if key == "seeds" else str
        if key in _LISTS and not (isinstance(value, list) and all(type(one) is kind for one in value)):
            raise ValueError(f"{file}: {key} = {value!r}: expected a list of {kind.__name__}")
    for key in ("tasks", "estimators"):
        if not entry.get(key):
            raise ValueError(f"{file}: each [[cells]] needs {key!r}")


def _known(file: Path, key: str, valid: tuple[str, ...]) -> None:
    if key not in valid:
        raise ValueError(f"{file}: {unknown('key', key, valid)}")


def options_of(table: dict[str, Any], base: Options) -> Options:
    """`base` with the options that stand in `table`.

    Raises:
        ValueError: a value of the wrong kind or out of range.
    """
    changes = {name: table[name] for name in _OPTIONS if name in table}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    for name, value in changes.items():
        if name == "batch_size":
            if value != AUTO and type(value) is not int:
                raise ValueError(f"batch_size = {value!r}: expected a whole number or {AUTO}")
        elif type(value) is not type(getattr(base, name)):
            raise ValueError(f"{name} = {value!r}: expected {type(getattr(base, name)).__name__}")
    options = replace(base, **changes)
    if options.dtype not in DTYPES:
        raise ValueError(unknown("dtype", options.dtype, DTYPES))
    for name in options.features:
        if not isinstance(name, str) or name not in FURTHER:
            raise ValueError(unknown("feature network", str(name), tuple(FURTHER)))
    for use in options.uses:
        if not isinstance(use, str) or use not in USES:
            raise ValueError(unknown("use", str(use), tuple(USES)))
    for name in ("n_items", "batch_size", "draws", "timing_batch"):
        if getattr(options, name) != AUTO and getattr(options, name) < 1:
            raise ValueError(f"{name} = {getattr(options, name)}: expected at least 1")
    return options


def _check_effect(table: dict[str, Any], options: Options) -> None:
    """Refuse what stands in a table of a suite and is without effect in its cells; raises ValueError in one line."""
    for one, several in (("split", "splits"), ("seed", "seeds")):
        if one in table and table.get(several):
            raise ValueError(f"{one} has no effect beside {several}")
    if not options.likelihood and table.get("rounds"):
        raise ValueError("rounds has no effect with likelihood = false: only likelihoods are timed")
    if "timing_batch" in table and not (options.likelihood and options.rounds):
        why = "rounds = 0" if options.likelihood else "likelihood = false"
        raise ValueError(f"timing_batch has no effect with {why}: nothing is timed")


_OF_CONTROLS = ("n_items", "dtype", "draws", "truncated_normal")


def check_draws(task: Task, split: str, options: Options) -> None:
    """Raise ValueError where something is said of dequantisation and the split's items are not dequantised."""
    for name in ("draws", "truncated_normal"):
        if getattr(options, name) != getattr(Options, name) and not task.dequantises(split):
            raise ValueError(
                f"{name} = {getattr(options, name)} has no effect on task {task.id!r}, split {split!r}: it is not "
                "dequantised"
            )


def expand(
    tasks: Iterable[str],
    models: Sequence[str] | None,
    specs: Iterable[str],
    options: Options,
    *,
    splits: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
) -> list[Cell]:
    """The product of tasks, models, estimators, splits and seeds as cells; `models=None` takes all of each task.

    Raises:
        ValueError: unknown task, model, split or estimator, several draws of what is not dequantised, or more than
            `MOST_CELLS`.

    >>> cells = expand(["gmm-2d"], ["closed-form"], ["f2d2[steps=1|2]"], Options(n_items=50), seeds=[0, 1])
    >>> [(cell.title, cell.options.seed) for cell in cells][:2]
    [('gmm-2d · closed-form · f2d2[steps=1]', 0), ('gmm-2d · closed-form · f2d2[steps=1]', 1)]
    """
    parsed = [estimator for spec in specs for estimator in parse(spec)]
    estimators = [estimator for estimator in parsed if not isinstance(estimator, str)]
    controls = [estimator for estimator in parsed if isinstance(estimator, str)]
    cells = []
    for name in tasks:
        task = get_task(name)
        file = file_of(task.id)
        cells += _controls(task, controls, splits or (options.split,), options)
        for model in _models(task, models):
            for split in splits or (options.split,):
                task.check_split(split)
                check_draws(task, split, options)
                _check_number(len(cells) + len(estimators) * len(seeds or [options.seed]))
                cells += [
                    Cell(
                        task=task.id,
                        task_file=file,
                        model=model,
                        estimator=estimator,
                        device=device,
                        options=replace(options, split=split, seed=seed),
                    )
                    for estimator in estimators
                    for seed in seeds or (options.seed,)
                ]
    return cells


def _check_number(cells: int) -> None:
    if cells > MOST_CELLS:
        raise ValueError(
            f"{cells:,} cells or more, expected at most {MOST_CELLS:,}: name fewer seeds, estimators or models"
        )


def _controls(task: Task, controls: Sequence[str], splits: Sequence[str], options: Options) -> list[Cell]:
    """Control rows, which no model enters, in the options that `control_cells` gives them."""
    cells = []
    for split in splits if controls else ():
        task.check_split(split)
        check_draws(task, split, options)
        shared = {name: getattr(options, name) for name in _OF_CONTROLS}
        own = replace(Options(), split=split, **shared)
        cells += [_control(task.id, control, own) for control in controls]
    return cells


def _models(task: Task, names: Sequence[str] | None) -> list[str]:
    """Models of a task by name or by pattern (`*-f2d2`); all of them where there are no names.

    A pattern leaves out models whose checkpoint is not there, a name never: its cell says how to get it.
    """
    found: dict[str, None] = {}
    for name in task.models if names is None else names:
        if "*" in name:
            found |= dict.fromkeys(m for m in fnmatch.filter(task.models, name) if task.has_model(m))
        elif name in task.models:
            found[name] = None
        else:
            raise ValueError(task.no_such_model(name))
    return list(found)


def parse(spec: str) -> list[Any]:
    """The estimators of one specification; the name of a control stands for itself."""
    if spec in CONTROLS:
        return [spec]

    return list(parse_spec(spec))


def load_suite(name: str, *, device: str = "cpu", overrides: dict[str, Any] | None = None) -> list[Cell]:
    """All cells of a suite, controls included.

    Args:
        name: a suite's name, or the path of a TOML file.
        device: where the cells run.
        overrides: options that beat the file's, such as `{"n_items": 100}`.

    Raises:
        ValueError: anything wrong in the file; the line names it.
    """
    suite = read_suite(name)
    overrides = overrides or {}
    seeds = overrides.pop("seeds", None)
    defaults = options_of(suite.get("defaults", {}), Options())
    _check_effect(suite.get("defaults", {}), defaults)
    cells: list[Cell] = []
    for entry in suite.get("cells", []):
        options = options_of(overrides, options_of(entry, defaults))
        _check_effect(entry, options)
        cells += expand(
            entry["tasks"],
            entry.get("models"),
            entry["estimators"],
            options,
            splits=entry.get("splits"),
            seeds=seeds or entry.get("seeds"),
            device=device,
        )
        _check_number(len(cells))
    if suite.get("controls", True):
        cells += control_cells(cells)
    return unique(cells)


def control_cells(cells: Iterable[Cell]) -> list[Cell]:
    """The control rows of each task and split of these cells, on as many items as the largest of them."""
    rows: dict[tuple[str, str, float], Options] = {}
    for cell in cells:
        options = cell.options
        key = (cell.task, options.split, options.truncated_normal)
        if key not in rows or rows[key].n_items < options.n_items:
            shared = {name: getattr(options, name) for name in _OF_CONTROLS}
            rows[key] = replace(Options(), split=options.split, **shared)
    return [
        _control(name, control, options)
        for (name, *_), options in rows.items()
        for control in (CONTROLS if get_task(name).has_components else _PLAIN)
    ]


def _control(task: str, control: str, options: Options) -> Cell:
    model = get_task(task).reference_model
    return Cell(task=task, model=model, estimator=control, options=options, task_file=file_of(task))


_PLAIN = tuple(name for name in CONTROLS if name != "control-component")


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """The cells in order, each once."""
    return list(dict.fromkeys(cells))
