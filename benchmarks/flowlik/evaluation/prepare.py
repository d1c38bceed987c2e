"""Preparation of a cell: with the model, items and reference it needs, or with why it cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from flowlik.cells import Cell, cell_id
from flowlik.evaluation.batching.batches import DivergedError, RefusedError, is_out_of_memory
from flowlik.evaluation.controls import why_not
from flowlik.evaluation.models import load, load_compiled
from flowlik.evaluation.samples.extractors import further_extractors, standard_extractor
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import Items, Reference, Task, UnavailableError, with_normal_noise
from flowlik_models.interfaces import Ability, can
from flowlik_models.zoo import teacher_of

JUDGED_BY_TEACHER: tuple[Ability, ...] = ("flow map", "joint flow map", "policy flow", "generator")
"""Models that are to agree with what taught them; any other field has a likelihood of its own."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A cell with what it needs, or with why it cannot run (`status` and `reason`)."""

    cell: Cell
    cell_id: str
    task: Task
    model: Any = None
    model_hash: str = ""
    data_hash: str = ""
    items: Items | None = None
    reference: Reference | None = None
    status: str = "ok"
    reason: str | None = None
    not_compiled: str | None = None


def prepare(cell: Cell) -> Prepared:
    """Load model, items and reference of a cell; never raises, whatever is missing or broken ends as a status."""
    task = get_task(cell.task_file or cell.task)
    known: dict[str, Any] = {"task": task}
    try:
        if not cell.is_control:
            if (why := cell.estimator.unavailable()) is not None:
                raise UnavailableError(why)
            which = (cell.task, cell.model, cell.device, cell.options.dtype)
            known["model"], known["model_hash"] = load(*which)
            known["task"] = task = task.for_model(known["model"])
            if cell.options.compile:
                known["model"], known["not_compiled"] = load_compiled(*which)
        further_extractors(task, cell.options.features)
        known["data_hash"] = task.data_hash(cell.options.split)
        known["items"] = items = _items(task, cell)
        known["reference"] = _reference(task, cell, items, known.get("model"))
        if cell.is_control and known["reference"].note and cell.estimator != "control-gaussian":
            raise UnavailableError(known["reference"].note)
        if cell.is_control and (reason := why_not(cell.estimator, items)):
            raise UnavailableError(reason)
    except Exception as error:
        known["status"], known["reason"] = status_of_error(error)
    reference = known.get("reference")
    identity = cell_id(
        cell,
        known.get("model_hash", ""),
        known.get("data_hash", ""),
        reference.digest if reference else "",
        standard_extractor(task) if cell.options.samples else "",
    )
    return Prepared(cell=cell, cell_id=identity, **known)


def _items(task: Task, cell: Cell) -> Items:
    items = task.items(cell.options.split, cell.options.n_items, cell.options.draws)
    if items.draws != cell.options.draws:
        raise ValueError(
            f"draws = {cell.options.draws} has no effect: task {task.id!r} gives {items.draws} of each item"
        )
    if cell.options.truncated_normal and task.levels:
        items = with_normal_noise(items, task.levels, cell.options.truncated_normal)
    x = items.x.to(getattr(torch, cell.options.dtype))
    return replace(items, x=x)


def _reference(task: Task, cell: Cell, items: Items, model: Any) -> Reference:
    end = 1.0 - task.eps if cell.is_control else float(cell.estimator.data_end(model))
    try:
        if getattr(cell.estimator, "guidance", None):
            raise UnavailableError("a guided field has a density of its own, which no reference knows")
        if _is_another_field(task, cell, model):
            raise UnavailableError(
                f"the reference is the likelihood of {task.reference_model}, another network"
            )
        if cell.options.truncated_normal and task.reference_model != "closed-form":
            raise UnavailableError("the stored reference is that of uniform dequantisation noise")
        return task.reference(cell.options.split, items, end)
    except UnavailableError as error:
        nothing = np.full((items.draws, items.n), np.nan)
        return Reference(log_prob=nothing, ref_id="none", error=float("nan"), digest="none", note=str(error))


def _is_another_field(task: Task, cell: Cell, model: Any) -> bool:
    """A field of its own, which no reference knows; maps, policies and generators are judged by what taught them, and
    by nothing where that is another teacher."""
    if cell.is_control or task.reference_model in ("closed-form", cell.model):
        return False
    if teacher_of(cell.task, cell.model) not in (None, task.reference_model):
        return True
    return not any(can(model, ability) for ability in JUDGED_BY_TEACHER)


def status_of_error(error: BaseException) -> tuple[str, str]:
    """Status and one-line reason for an exception."""
    message = " ".join(str(error).split()) or type(error).__name__
    for kind, status in (
        (UnavailableError, "skipped"),
        (RefusedError, "refused"),
        (DivergedError, "diverged"),
    ):
        if isinstance(error, kind):
            return status, message
    if is_out_of_memory(error):
        return "oom", message
    return "error", message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
