"""The runner: cells in, records out, one at a time and each written as soon as it is known.

Whatever happens inside a cell becomes its row's status and reason: ok, skipped (something is not there, and how to get
it), refused (the estimator does not fit the model), timeout, oom (even one item at a time), diverged, error.
"""

from __future__ import annotations

import copy
import signal
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowlik import density, environment, measures, samples, speed, timing, uses
from flowlik.cells import Cell, cell_id, estimator_columns
from flowlik.controls import control_log_prob, why_not
from flowlik.evaluation import (
    DivergedError,
    RefusedError,
    beside,
    evaluate,
    evaluate_plain,
    is_out_of_memory,
    on_device,
    sample,
)
from flowlik.memory import AUTO
from flowlik.records import (
    COLUMNS,
    SCHEMA_VERSION,
    append_line,
    finished_cells,
    to_plain,
    utc_now,
    write_arrays,
)
from flowlik.tasks import Array, Items, Reference, Task, UnavailableError, get_task

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
EXECUTORS = ("serial",)
CYCLE_ITEMS = 256
SHOWN_SAMPLES = 64


class CellTimeoutError(Exception):
    """A cell took longer than it was given."""


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


# --- models -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def load(task: str, model: str, device: str, dtype: str) -> tuple[Any, str]:
    """A model in evaluation mode with its hash; one stays in memory for the cells that follow.

    Raises:
        UnavailableError: its checkpoint is not there. ValueError: it cannot be read.
    """
    from flowlik_models.moments import attach

    found = get_task(task)
    loaded, weights = found.load_model(model, device)
    # Networks hold float32 parameters; closed forms hold float64 ones and compute in x's dtype.
    loaded = speed.laid_out(loaded.double() if dtype == "float64" else loaded, device)
    return attach(loaded, found.data_moments()), weights


@lru_cache(maxsize=1)
def load_compiled(task: str, model: str, device: str, dtype: str) -> tuple[Any, str | None]:
    """The model with its network compiled, once for all its cells; or as it is, and one line why."""
    twin = copy.copy(load(task, model, device, dtype)[0])
    return twin, speed.compiled(twin, device, getattr(torch, dtype))


# --- preparing ----------------------------------------------------------------------------------------------


def prepare(cell: Cell) -> Prepared:
    """Load model, items and reference of a cell; never raises, whatever is missing or broken ends as a status."""
    task = get_task(cell.task)
    known: dict[str, Any] = {}
    try:
        if not cell.is_control:
            if (why := cell.estimator.unavailable()) is not None:
                raise UnavailableError(why)
            which = (cell.task, cell.model, cell.device, cell.options.dtype)
            known["model"], known["model_hash"] = load(*which)
            if cell.options.compile:
                known["model"], known["not_compiled"] = load_compiled(*which)
        known["data_hash"] = task.data_hash(cell.options.split)
        known["items"] = items = _items(task, cell)
        known["reference"] = _reference(task, cell, items, known.get("model"))
        if cell.is_control and known["reference"].note and cell.estimator != "control-gaussian":
            raise UnavailableError(known["reference"].note)
        if cell.is_control and (reason := why_not(cell.estimator, items)):
            raise UnavailableError(reason)
    except Exception as error:
        known["status"], known["reason"] = status_of(error)
    reference = known.get("reference")
    identity = cell_id(
        cell, known.get("model_hash", ""), known.get("data_hash", ""), reference.digest if reference else ""
    )
    return Prepared(cell=cell, cell_id=identity, task=task, **known)


def _items(task: Task, cell: Cell) -> Items:
    items = task.items(cell.options.split, cell.options.n_items, cell.options.draws)
    x = items.x.to(getattr(torch, cell.options.dtype))
    return Items(x=x, ids=items.ids, n=items.n, draws=items.draws, component=items.component)


def _reference(task: Task, cell: Cell, items: Items, model: Any) -> Reference:
    end = 1.0 - task.eps if cell.is_control else float(cell.estimator.data_end(model))
    try:
        if _is_another_field(task, cell, model):
            raise UnavailableError(
                f"the reference is the likelihood of {task.reference_model}, another network"
            )
        return task.reference(cell.options.split, items, end)
    except UnavailableError as error:
        nothing = np.full((items.draws, items.n), np.nan)
        return Reference(log_prob=nothing, ref_id="none", error=float("nan"), digest="none", note=str(error))


def _is_another_field(task: Task, cell: Cell, model: Any) -> bool:
    """A field of its own, which no reference knows; maps and policies are judged against the field they were taught."""
    if cell.is_control or task.reference_model in ("closed-form", cell.model):
        return False
    return not any(hasattr(model, method) for method in ("average_velocity", "joint", "policy"))


def status_of(error: BaseException) -> tuple[str, str]:
    """Status and one-line reason for an exception."""
    message = " ".join(str(error).split()) or type(error).__name__
    for kind, status in (
        (UnavailableError, "skipped"),
        (RefusedError, "refused"),
        (DivergedError, "diverged"),
        (CellTimeoutError, "timeout"),
    ):
        if isinstance(error, kind):
            return status, message
    if is_out_of_memory(error):
        return "oom", message
    return "error", message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"


# --- rows ---------------------------------------------------------------------------------------------------


def blank_row(prepared: Prepared, run_id: str, env_id: str | None) -> Row:
    """A row with identity, estimator and task filled in, everything else None."""
    cell, items = prepared.cell, prepared.items
    row: Row = dict.fromkeys(COLUMNS)
    row |= {"schema_version": SCHEMA_VERSION, "run_id": run_id, "cell_id": prepared.cell_id, "env_id": env_id}
    row |= {"created_utc": utc_now(), "repeat": cell.options.repeat}
    row |= estimator_columns(cell.estimator)
    row |= {
        "task": cell.task,
        "model": cell.model,
        "model_hash": prepared.model_hash or None,
        "data_hash": prepared.data_hash or None,
        "split": cell.options.split,
        "n_items": items.n if items else cell.options.n_items,
        "dim": prepared.task.dim,
        "batch_size": None if cell.options.batch_size == AUTO else cell.options.batch_size,
        "dtype": cell.options.dtype,
        "device": cell.device,
        "seed": cell.options.seed,
        "compiled": cell.options.compile and prepared.model is not None and prepared.not_compiled is None,
        "dequant_draws": cell.options.draws if prepared.task.levels else None,
        "status": prepared.status,
        "reason": prepared.reason,
        "extra": {},
    }
    return row


def run_prepared(prepared: Prepared, *, timeout: float | None = None) -> tuple[Row, Arrays]:
    """The measured columns of one cell and the arrays that lie beside it; never raises for what the cell does."""
    row: Row = {"extra": {}}
    arrays: Arrays = {}
    if prepared.status != "ok":
        return row, arrays
    try:
        with time_limit(timeout):
            if prepared.cell.is_control:
                _fill_control(prepared, row, arrays)
            elif not prepared.cell.options.likelihood:
                _fill_samples_alone(prepared, row, arrays)
            else:
                _fill(prepared, row, arrays)
    except Exception as error:
        row["status"], row["reason"] = status_of(error)
    return row, arrays


def _fill_control(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    cell, items, reference = prepared.cell, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    log_prob = control_log_prob(cell.estimator, prepared.task, items, reference)
    row |= {"eps": prepared.task.eps} | dict.fromkeys(
        ("nfe_mean", "nfe_max", "vjp_mean", "jvp_mean", "work"), 0.0
    )
    valid = np.isfinite(log_prob)
    _fill_accuracy(prepared, row, log_prob, valid, None)
    arrays |= _item_arrays(log_prob, reference.log_prob, valid, None)


def _fill(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    cell, items, reference = prepared.cell, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    out = evaluate(cell, prepared.model, items.x, items.ids)
    row["eps"] = 1.0 - float(cell.estimator.data_end(prepared.model))
    _fill_cost(row, out.cost)
    if cell.options.batch_size == AUTO:
        row["batch_size"], row["extra"]["batch_size_asked"] = out.batch_size, AUTO
    elif out.batch_size != cell.options.batch_size:
        row["extra"]["batch_size_used"] = out.batch_size
    if prepared.not_compiled:
        row["extra"]["not_compiled"] = prepared.not_compiled
    shape = (items.draws, items.n)
    log_prob, valid = out.log_prob.reshape(shape), out.valid.reshape(shape)
    stderr = None if out.stderr is None else out.stderr.reshape(shape)
    degrees = out.extra["dof"].reshape(shape) if "dof" in out.extra else None
    _fill_accuracy(prepared, row, log_prob, valid, stderr, degrees)
    arrays |= _item_arrays(log_prob, reference.log_prob, valid, stderr)
    for name, values in out.extra.items():
        arrays[f"extra_{name}"] = values
        known = values[np.isfinite(values)]
        row["extra"][name] = float(known.mean()) if len(known) else None
    if not (valid & np.isfinite(log_prob)).any():
        raise DivergedError(out.reason or "no item got a finite value")
    if reference.note:
        row["reason"] = reference.note
    elif out.reason:
        row["reason"] = out.reason
    _fill_own(prepared, row, log_prob, valid)
    _fill_whole_density(prepared, row, arrays, log_prob)
    if cell.options.samples:
        _fill_samples(prepared, row, arrays)
    for name in cell.options.uses:
        row["extra"][name], of_use = uses.USES[name](prepared)
        arrays |= {f"{name}_{key}": values for key, values in of_use.items()}
    if cell.options.rounds:
        _fill_timing(prepared, row)


def _fill_whole_density(prepared: Prepared, row: Row, arrays: Arrays, log_prob: Array) -> None:
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
    if (cycle := density.cycle_error(cell.estimator, model, x)) is not None:
        row["cycle_error"] = cycle


def _item_arrays(log_prob: Array, ref: Array, valid: NDArray[np.bool_], stderr: Array | None) -> Arrays:
    """Arrays over items, (n,): the mean over dequantisation draws, and every draw where there are several."""
    arrays: Arrays = {"log_prob": log_prob[0], "ref": ref[0], "valid": np.asarray(valid.all(axis=0))}
    if stderr is not None:
        arrays["stderr"] = stderr[0]
    if len(log_prob) > 1:
        arrays |= {"log_prob": log_prob.mean(axis=0), "log_prob_draws": log_prob, "ref_draws": ref}
    return arrays


def _fill_cost(row: Row, cost: dict[str, Array]) -> None:
    work = sum(cost.values())
    row |= {
        "nfe_mean": float(cost["forwards"].mean()),
        "nfe_max": float(cost["forwards"].max()),
        "vjp_mean": float(cost["vjps"].mean()),
        "jvp_mean": float(cost["jvps"].mean()),
        "work": float(np.mean(work)),
    }


def _fill_accuracy(
    prepared: Prepared,
    row: Row,
    log_prob: Array,
    valid: NDArray[np.bool_],
    stderr: Array | None,
    degrees: Array | None = None,
) -> None:
    task, reference = prepared.task, prepared.reference
    assert reference is not None
    levels = None if prepared.cell.options.split == "teacher-samples" else task.levels
    if stderr is not None and degrees is None:
        probes = prepared.cell.estimator.params().get("probes")
        degrees = np.full(stderr.shape, probes - 1.0 if isinstance(probes, int) else np.inf)
    measured = measures.summarise(
        log_prob, reference.log_prob, valid, dim=task.dim, levels=levels, stderr=stderr, degrees=degrees
    )
    row["extra"] |= measured.pop("extra", {})
    row |= measured
    row |= {"ref_id": None if reference.note else reference.ref_id, "ref_se": reference.error}


def _fill_own(prepared: Prepared, row: Row, log_prob: Array, valid: NDArray[np.bool_]) -> None:
    cell, task, items, reference = prepared.cell, prepared.task, prepared.items, prepared.reference
    assert items is not None
    assert reference is not None
    difference = np.where(valid, log_prob - reference.log_prob, np.nan)[0]
    errors = -difference / (task.dim * np.log(2.0))
    far = beside(cell, row)
    try:
        row["extra"] |= task.own_measures(
            items.x[: items.n], errors, lambda x: evaluate_plain(far, prepared.model, x)
        )
    except DivergedError as error:
        row["extra"]["own_measures"] = f"none: {error}"


def _fill_samples(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    """Draw samples and judge them; why there are none is noted beside."""
    try:
        x, _ = _sampled(prepared, row, arrays)
    except (RefusedError, DivergedError) as error:
        row["extra"]["samples"] = f"none: {error}"
        return
    columns, extra = samples.judge(prepared.task, x, None)
    row |= columns
    row["extra"] |= extra


def _fill_samples_alone(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    """Samples of a cell that is about nothing else: its cost is theirs, their likelihood that of the reference."""
    x, cost = _sampled(prepared, row, arrays)
    _fill_cost(row, cost)
    columns, extra = samples.judge(prepared.task, x, lambda: _reference_model(prepared))
    row |= columns
    row["extra"] |= extra


def _sampled(prepared: Prepared, row: Row, arrays: Arrays) -> tuple[torch.Tensor, dict[str, Array]]:
    x, cost = sample(prepared.cell, prepared.model, prepared.cell.options.samples)
    arrays["samples"] = x[:SHOWN_SAMPLES].float().cpu().numpy()
    row["extra"]["sample_nfe"] = float(cost["forwards"].mean())
    if not bool(torch.isfinite(x).all()):
        raise DivergedError("samples hold NaN or infinity")
    return x, cost


def _reference_model(prepared: Prepared) -> Any:
    cell = prepared.cell
    return load(cell.task, prepared.task.reference_model, cell.device, cell.options.dtype)[0]


def _fill_timing(prepared: Prepared, row: Row) -> None:
    cell, items = prepared.cell, prepared.items
    assert items is not None
    size = min(cell.options.timing_batch, items.n)
    x = on_device(cell, items.x[:size])
    ids = items.ids[:size]
    forward = timing.one_forward(prepared.model, x)
    if forward is None:
        return

    def estimate() -> Any:
        return cell.estimator.log_prob(
            prepared.model, x, generator=torch.Generator().manual_seed(cell.options.seed), items=ids
        )

    row |= asdict(
        timing.measure(
            estimate, forward, items=size, rounds=cell.options.rounds, device=torch.device(cell.device)
        )
    )
    row["extra"]["timing_batch"] = size


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CellTimeoutError in the block after `seconds`; no limit where the system or the thread allows none."""
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise CellTimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


# --- runs ---------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, *, timeout: float | None = None) -> tuple[Row, Arrays]:
    """Run one cell outside of a run (gates, tests): its whole row and its arrays; nothing is written."""
    prepared = prepare(cell)
    measured, arrays = run_prepared(prepared, timeout=timeout)
    return _merged(blank_row(prepared, "-", None), measured), arrays


def _merged(row: Row, measured: Row) -> Row:
    return row | {name: value for name, value in measured.items() if name in row}


def new_run_id() -> str:
    """A run's id: the time it began and four random characters."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one cell; `row` is None where a resumed run had it already."""

    cell: Cell
    row: Row | None
    seconds: float


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    run_id: str | None = None,
    argv: Sequence[str] | None = None,
    resume: bool = False,
    timeout: float | None = None,
) -> Iterator[Outcome]:
    """Run cells one after the other into the folder `out`; each row is on disk before its outcome is yielded.

    Args:
        cells: what to run, in this order.
        out: the run's folder; it gets `records.jsonl`, `environments.jsonl` and `items/`.
        run_id: name of the run, default a new one.
        argv: the command line to note in the environment.
        resume: leave out cells that already have a final row in `out`.
        timeout: seconds a cell may take.
    """
    run_id = run_id or new_run_id()
    environment_row = environment.describe(argv)
    append_line(out / "environments.jsonl", environment_row)
    done = finished_cells(out) if resume else set()
    for cell in cells:
        begun = time.perf_counter()
        prepared = prepare(cell)
        if prepared.cell_id in done:
            yield Outcome(cell=cell, row=None, seconds=time.perf_counter() - begun)
            continue
        measured, arrays = run_prepared(prepared, timeout=timeout)
        row = _merged(blank_row(prepared, run_id, environment_row["env_id"]), measured)
        if arrays:
            write_arrays(out / "items" / f"{prepared.cell_id}.npz", arrays)
        row["extra"]["cell_s"] = round(time.perf_counter() - begun, 3)
        append_line(out / "records.jsonl", row)
        yield Outcome(cell=cell, row=to_plain(row), seconds=time.perf_counter() - begun)
