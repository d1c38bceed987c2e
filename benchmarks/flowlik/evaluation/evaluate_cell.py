"""Evaluation of one cell: prepared, it becomes a row and the arrays beside it.

Whatever happens inside a cell becomes its row's status and reason: ok, skipped (something is not there, and how to get
it), refused (the estimator does not fit the model), timeout, oom (even one item at a time), diverged, error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.cells import Cell
from flowlik.evaluation import density, examination, uses
from flowlik.evaluation.batching import timing
from flowlik.evaluation.batching.batches import (
    DivergedError,
    Evaluation,
    RefusedError,
    conditions_on_device,
    evaluate,
    evaluate_plain,
    on_device,
    sample,
    with_bounded_evaluations,
)
from flowlik.evaluation.controls import control_log_prob, largest_error
from flowlik.evaluation.models import load
from flowlik.evaluation.prepare import Prepared, status_of_error
from flowlik.evaluation.row import Arrays, Row, _add_cost, _item_arrays
from flowlik.evaluation.samples import quality
from flowlik.measures import accuracy, registry
from flowlik.measures.arrays import Array
from flowlik.measures.bound_gap import bound_gap
from flowlik.measures.by_class import by_class
from flowlik.measures.importance_weighted import importance_weighted
from flowlik.records.columns import COUNTED
from flowlik.tasks.points import Points
from flowlik.tasks.task import Items, Reference, labels_of
from flowlik_models.numerics.float32 import full_float32
from flowlik_models.zoo import training_cost

CYCLE_ITEMS = 256
SHOWN_SAMPLES = 64


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What computes the log-densities and samples of a cell: this process, or several that share the items."""

    evaluate: Callable[[Cell, Any, Tensor | Points, Tensor, Tensor | None], Evaluation] = evaluate
    sample: Callable[[Cell, Any, int], tuple[Tensor, dict[str, Array]]] = sample


THIS_PROCESS = Backend()


@full_float32()
def run_prepared(
    prepared: Prepared, *, batch_size: int | None = None, backend: Backend = THIS_PROCESS
) -> tuple[Row, Arrays]:
    """The measured columns of one cell and the arrays that lie beside it; never raises for what the cell does.

    `batch_size` is where to begin, when an earlier attempt at the cell's own ran out of memory.
    """
    row: Row = {"extra": {}}
    arrays: Arrays = {}
    if prepared.status != "ok":
        return row, arrays
    try:
        if prepared.cell.is_control:
            _evaluate_control(prepared, row, arrays)
        elif not prepared.cell.options.likelihood:
            _evaluate_samples_alone(_at(prepared, batch_size), row, arrays, backend)
        else:
            _evaluate_estimator(
                _at(prepared, batch_size), row, arrays, backend, asked=prepared.cell.options.batch_size
            )
    except Exception as error:
        row["status"], row["reason"] = status_of_error(error)
    if row.get("status") not in ("refused", "skipped"):
        examination.added(row, examination.findings(prepared))
    return row, arrays


def _at(prepared: Prepared, batch_size: int | None) -> Prepared:
    """The same cell, computed in other batches; its identity and its row keep the batch size that was asked for."""
    if batch_size is None:
        return prepared
    return replace(prepared, cell=prepared.cell.with_options(batch_size=batch_size))


def _evaluate_control(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    cell, items, reference = prepared.cell, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    log_prob = control_log_prob(cell.estimator, prepared.task, items, reference)
    row |= {"eps": prepared.task.eps} | dict.fromkeys(COUNTED, 0.0)
    valid = np.isfinite(log_prob)
    _add_accuracy(prepared, row, log_prob, valid, None)
    arrays |= _item_arrays(*_of_cells(items, log_prob, reference), valid, None) | _labels(items)


def _evaluate_estimator(
    prepared: Prepared, row: Row, arrays: Arrays, backend: Backend, *, asked: int | str
) -> None:
    cell, items, reference = prepared.cell, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    out = backend.evaluate(cell, prepared.model, items.x, items.ids, items.cond)
    halved = None
    if isinstance(asked, str):
        row["batch_size"], row["extra"]["batch_size_asked"] = out.batch_size, asked
    elif out.batch_size < asked:
        row["extra"]["batch_size_used"] = out.batch_size
        halved = f"out of memory: the batch was halved from {asked} to {out.batch_size}"
    if prepared.task.own_model_hash(cell.model) is None:
        row["extra"] |= training_cost(cell.task, cell.model)
    if prepared.not_compiled:
        row["extra"]["not_compiled"] = prepared.not_compiled
    row["eps"] = 1.0 - float(cell.estimator.data_end(prepared.model))
    _add_cost(row, out.cost)
    shape = (items.draws, items.n)
    log_prob, valid = out.log_prob.reshape(shape), out.valid.reshape(shape)
    stderr = None if out.stderr is None else out.stderr.reshape(shape)
    degrees = out.extra["dof"].reshape(shape) if "dof" in out.extra else None
    _add_accuracy(prepared, row, log_prob, valid, stderr, degrees)
    arrays |= _item_arrays(*_of_cells(items, log_prob, reference), valid, stderr) | _labels(items)
    for name, values in out.extra.items():
        arrays[f"extra_{name}"] = values
        known = values[np.isfinite(values)]
        row["extra"][name] = float(known.mean()) if len(known) else None
    if not (valid & np.isfinite(log_prob)).any():
        raise DivergedError(out.reason or "no item got a finite value")
    row["reason"] = "; ".join(filter(None, (reference.note, out.reason, halved))) or None
    if cell.estimator.family == "bound" and cell.model == prepared.task.reference_model:
        row["extra"] |= bound_gap(*_first_draw(prepared, log_prob, valid, stderr))
    _add_own_measures(prepared, row, log_prob, valid)
    _add_density(prepared, row, arrays, log_prob)
    if cell.options.samples:
        _add_samples(prepared, row, arrays, backend)
    for name in cell.options.uses:
        row["extra"][name], of_use = uses.USES[name](prepared)
        arrays |= {f"{name}_{key}": values for key, values in of_use.items()}
    if cell.options.rounds:
        _add_timing(prepared, row)


def _add_density(prepared: Prepared, row: Row, arrays: Arrays, log_prob: Array) -> None:
    cell, task, model = prepared.cell, prepared.task, prepared.model
    items, reference = prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    if cell.options.density:
        if (grid := task.grid()) is not None:
            arrays |= density.grid_density(cell, task, model, grid, row)
        else:
            density.importance_mass(cell, task, model, items, log_prob, reference, row)
        if (agreed := density.agreement(cell, model, task.dim)) is not None:
            row["extra"]["agreement_mae"] = agreed
    x = on_device(cell, items.x[:CYCLE_ITEMS])
    cond = conditions_on_device(cell, items.cond, slice(CYCLE_ITEMS))
    if (errors := density.cycle_errors(cell.estimator, model, x, cond)) is not None:
        row["cycle_error"] = float(errors.mean())
        row["reason"] = "; ".join(filter(None, (row["reason"], density.not_back(errors, x)))) or None


def _labels(items: Items) -> Arrays:
    """The label of each item, where there are labels."""
    labels = labels_of(items)
    return {} if labels is None else {"label": labels}


def _add_accuracy(
    prepared: Prepared,
    row: Row,
    log_prob: Array,
    valid: NDArray[np.bool_],
    stderr: Array | None,
    degrees: Array | None = None,
) -> None:
    task, items, reference = prepared.task, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    levels = None if prepared.cell.options.split == "teacher-samples" else task.levels
    if stderr is not None and degrees is None:
        probes = prepared.cell.estimator.params().get("probes")
        degrees = np.full(stderr.shape, probes - 1.0 if isinstance(probes, int) else np.inf)
    values: tuple[Array, Array, NDArray[np.bool_]] = (*_of_cells(items, log_prob, reference), valid)
    measured = accuracy.summarise(
        *values,
        dim=task.dim,
        levels=levels,
        stderr=stderr,
        degrees=degrees,
        unanswered=lambda: largest_error(task, items, reference),
    )
    row["extra"] |= measured.pop("extra", {})
    if levels is not None:
        row["extra"] |= importance_weighted(values[0], valid, dim=task.dim, levels=levels)
    judged = accuracy.judged(*values, dim=task.dim, levels=levels, stderr=stderr)
    row["extra"] |= registry.computed(judged)
    if (labels := labels_of(items)) is not None and (classes := by_class(judged, labels)):
        row["extra"]["classes"] = classes
    row |= measured
    row |= {"ref_id": None if reference.note else reference.ref_id, "ref_se": reference.error}


def _of_cells(items: Items, log_prob: Array, reference: Reference) -> tuple[Array, Array]:
    """Both with the density of the dequantisation noise taken off, where that is not uniform."""
    return log_prob - items.log_noise, reference.log_prob - items.log_noise


def _first_draw(
    prepared: Prepared, log_prob: Array, valid: NDArray[np.bool_], stderr: Array | None
) -> tuple[Array, Array | None]:
    """Errors and standard errors of the first dequantisation draw, (n,) in bits/dim."""
    assert prepared.reference is not None
    unit = prepared.task.dim * np.log(2.0)
    difference = np.where(valid, prepared.reference.log_prob - log_prob, np.nan)[0]
    return difference / unit, None if stderr is None else stderr[0] / unit


def _add_own_measures(prepared: Prepared, row: Row, log_prob: Array, valid: NDArray[np.bool_]) -> None:
    cell, task, items, reference = prepared.cell, prepared.task, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    errors, _ = _first_draw(prepared, log_prob, valid, None)
    far = with_bounded_evaluations(cell, row)
    try:
        row["extra"] |= task.own_measures(
            items.x[: items.n], errors, lambda x: evaluate_plain(far, prepared.model, x)
        )
    except DivergedError as error:
        row["extra"]["own_measures"] = f"none: {error}"


def _add_samples(prepared: Prepared, row: Row, arrays: Arrays, backend: Backend) -> None:
    """Draw samples and judge them; why there are none is noted beside."""
    try:
        x, _ = _sampled(prepared, row, arrays, backend)
    except (RefusedError, DivergedError) as error:
        row["extra"]["samples"] = f"none: {error}"
        return
    columns, extra = quality.judge(prepared.task, x, None, prepared.cell.options.features)
    row |= columns
    row["extra"] |= extra


def _evaluate_samples_alone(prepared: Prepared, row: Row, arrays: Arrays, backend: Backend) -> None:
    """Samples of a cell that is about nothing else: its cost is theirs, their likelihood that of the reference."""
    x, cost = _sampled(prepared, row, arrays, backend)
    _add_cost(row, cost)
    row["reason"] = density.folds_of_samples(prepared.cell, prepared.model)
    columns, extra = quality.judge(
        prepared.task, x, lambda: _reference_model(prepared), prepared.cell.options.features
    )
    row |= columns
    row["extra"] |= extra


def _sampled(
    prepared: Prepared, row: Row, arrays: Arrays, backend: Backend
) -> tuple[Tensor, dict[str, Array]]:
    x, cost = backend.sample(prepared.cell, prepared.model, prepared.cell.options.samples)
    arrays["samples"] = x[:SHOWN_SAMPLES].float().cpu().numpy()
    row["extra"]["sample_nfe"] = float(cost["forwards"].mean())
    return x, cost


def _reference_model(prepared: Prepared) -> Any:
    cell = prepared.cell
    return load(cell.task, prepared.task.reference_model, cell.device, cell.options.dtype)[0]


def _add_timing(prepared: Prepared, row: Row) -> None:
    cell, items = prepared.cell, prepared.items
    assert items is not None
    size = min(cell.options.timing_batch, items.n)
    x = on_device(cell, items.x[:size])
    ids, cond = items.ids[:size], conditions_on_device(cell, items.cond, slice(size))
    forward = timing.one_forward(prepared.model, x, cond)
    if forward is None:
        return

    def estimate() -> Any:
        generator = torch.Generator().manual_seed(cell.options.seed)
        return cell.estimator.log_prob(prepared.model, x, cond=cond, generator=generator, items=ids)

    row |= asdict(
        timing.measure(
            estimate, forward, items=size, rounds=cell.options.rounds, device=torch.device(cell.device)
        )
    )
    row["extra"]["timing_batch"] = size
