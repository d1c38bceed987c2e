"""The runner: cells in, records out, one at a time and each written as soon as it is known.

Whatever happens inside a cell becomes its row's status and reason: ok, skipped (something is not there, and how to get
it), refused (the estimator does not fit the model), timeout, oom (even one item at a time), diverged, error.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik import environment, measures, timing
from flowlik.cells import Cell, cell_id, estimator_columns
from flowlik.controls import control_log_prob, why_not
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
T = TypeVar("T")
EXECUTORS = ("serial",)
CYCLE_ITEMS = 256
BESIDE_BATCH = 4096
BESIDE_NFE = 4
SHOWN_SAMPLES = 64


class CellTimeoutError(Exception):
    """A cell took longer than it was given."""


class RefusedError(Exception):
    """The estimator does not fit the model."""


class DivergedError(Exception):
    """No item got a value."""


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


@dataclass
class Evaluation:
    """What an estimator said of a set of points, joined over batches."""

    log_prob: Array
    valid: NDArray[np.bool_]
    stderr: Array | None
    cost: dict[str, Array]
    batch_size: int
    statuses: set[str] = field(default_factory=set)
    reason: str | None = None


# --- models -------------------------------------------------------------------------------------------------


def load(task: str, model: str, device: str, dtype: str) -> tuple[Any, str]:
    """A model in evaluation mode with its hash; one stays in memory for the cells that follow.

    Raises:
        UnavailableError: its checkpoint is not there. ValueError: it cannot be read.
    """
    from flowlik_models.zoo import CLOSED_FORM, check_names, checkpoint_path

    check_names(task, model)
    if model != CLOSED_FORM and not checkpoint_path(task, model).is_file():
        cure = f"make it with: flowlik train {task} {model} --ship"
        raise UnavailableError(f"the checkpoint of {model} on {task} is not there; {cure}")
    return _load(task, model, device, dtype)


@lru_cache(maxsize=2)
def _load(task: str, model: str, device: str, dtype: str) -> tuple[Any, str]:
    from flowlik_models.zoo import load_model, model_hash

    loaded = load_model(task, model, device=device)
    # Networks hold float32 parameters; closed forms hold float64 ones and compute in x's dtype.
    return (loaded.double() if dtype == "float64" else loaded), model_hash(task, model)


# --- preparing ----------------------------------------------------------------------------------------------


def prepare(cell: Cell) -> Prepared:
    """Load model, items and reference of a cell; never raises, whatever is missing or broken ends as a status."""
    task = get_task(cell.task)
    known: dict[str, Any] = {}
    try:
        if not cell.is_control:
            known["model"], known["model_hash"] = load(cell.task, cell.model, cell.device, cell.options.dtype)
        known["data_hash"] = task.data_hash(cell.options.split)
        known["items"] = items = _items(task, cell)
        known["reference"] = _reference(task, cell, items, known.get("model"))
        if cell.is_control and known["reference"].note:
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
        return task.reference(cell.options.split, items, end)
    except UnavailableError as error:
        nothing = np.full((items.draws, items.n), np.nan)
        return Reference(log_prob=nothing, ref_id="none", error=float("nan"), digest="none", note=str(error))


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


# --- evaluating ---------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """True for what torch and Python raise when memory runs out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def stream(call: Callable[[slice], T], n: int, batch_size: int) -> tuple[list[T], int]:
    """`call` on consecutive slices of 0..n; where memory runs out the batch is halved and the slice tried again.

    Returns:
        The results in order, and the batch size that was left.
    """
    parts: list[T] = []
    start = 0
    while start < n:
        try:
            parts.append(call(slice(start, min(n, start + batch_size))))
        except Exception as error:
            if batch_size == 1 or not is_out_of_memory(error):
                raise
            batch_size = -(-batch_size // 2)
        else:
            start += batch_size
            continue
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return parts, batch_size


def evaluate(cell: Cell, model: Any, x: Tensor, ids: Tensor, *, all_or_nothing: bool = False) -> Evaluation:
    """The estimator on all points, in batches.

    Raises:
        RefusedError: it does not fit the model. DivergedError: `all_or_nothing`, and one batch got no value.
    """
    device = torch.device(cell.device)

    def batch(where: slice) -> Any:
        # A fresh generator each time: randomness is keyed by item, so batches of any size draw the same.
        generator = torch.Generator().manual_seed(cell.options.seed)
        points = x[where].to(device=device, dtype=getattr(torch, cell.options.dtype))
        out = cell.estimator.log_prob(model, points, generator=generator, items=ids[where])
        if out.status == "refused":
            raise RefusedError(out.reason or f"{cell.label} does not fit this model")
        if all_or_nothing and out.status != "ok":
            raise DivergedError(out.reason or "a batch got no value")
        return out, len(points)

    parts, batch_size = stream(batch, len(x), cell.options.batch_size)
    outs = [out for out, _ in parts]
    errors = [out.stderr for out in outs]
    return Evaluation(
        log_prob=_joined([out.log_prob for out in outs]),
        valid=_joined([out.valid for out in outs]).astype(bool),
        stderr=_joined(errors) if all(error is not None for error in errors) else None,
        cost={
            name: np.concatenate([_per_item(getattr(out.cost, name), size) for out, size in parts])
            for name in ("forwards", "vjps", "jvps")
        },
        batch_size=batch_size,
        statuses={out.status for out in outs},
        reason=next((out.reason for out in outs if out.reason), None),
    )


def _joined(parts: Sequence[Tensor]) -> Array:
    return np.concatenate([part.detach().cpu().double().numpy() for part in parts])


def _per_item(cost: float | Tensor, size: int) -> Array:
    values = cost.detach().cpu().double().numpy() if isinstance(cost, Tensor) else np.float64(cost)
    return np.broadcast_to(values, (size,)).astype(np.float64)


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
        "batch_size": cell.options.batch_size,
        "dtype": cell.options.dtype,
        "device": cell.device,
        "seed": cell.options.seed,
        "compiled": False,
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
    _fill_cost(row, out)
    if out.batch_size != cell.options.batch_size:
        row["extra"]["batch_size_used"] = out.batch_size
    shape = (items.draws, items.n)
    log_prob, valid = out.log_prob.reshape(shape), out.valid.reshape(shape)
    stderr = None if out.stderr is None else out.stderr.reshape(shape)
    _fill_accuracy(prepared, row, log_prob, valid, stderr)
    arrays |= _item_arrays(log_prob, reference.log_prob, valid, stderr)
    if not (valid & np.isfinite(log_prob)).any():
        raise DivergedError(out.reason or "no item got a finite value")
    if reference.note:
        row["reason"] = reference.note
    elif out.reason:
        row["reason"] = out.reason
    _fill_own(prepared, row, log_prob, valid)
    if cell.options.density:
        _fill_density(prepared, row, arrays)
    if (
        cycle := cycle_error(cell.estimator, prepared.model, _on_device(cell, items.x[:CYCLE_ITEMS]))
    ) is not None:
        row["cycle_error"] = cycle
    if cell.options.samples:
        _fill_samples(prepared, row, arrays)
    if cell.options.rounds:
        _fill_timing(prepared, row)


def _on_device(cell: Cell, x: Tensor) -> Tensor:
    return x.to(device=cell.device, dtype=getattr(torch, cell.options.dtype))


def _item_arrays(log_prob: Array, ref: Array, valid: NDArray[np.bool_], stderr: Array | None) -> Arrays:
    """Arrays over items, (n,): the mean over dequantisation draws, and every draw where there are several."""
    arrays: Arrays = {"log_prob": log_prob[0], "ref": ref[0], "valid": np.asarray(valid.all(axis=0))}
    if stderr is not None:
        arrays["stderr"] = stderr[0]
    if len(log_prob) > 1:
        arrays |= {"log_prob": log_prob.mean(axis=0), "log_prob_draws": log_prob, "ref_draws": ref}
    return arrays


def _fill_cost(row: Row, out: Evaluation) -> None:
    work = sum(out.cost.values())
    row |= {
        "nfe_mean": float(out.cost["forwards"].mean()),
        "nfe_max": float(out.cost["forwards"].max()),
        "vjp_mean": float(out.cost["vjps"].mean()),
        "jvp_mean": float(out.cost["jvps"].mean()),
        "work": float(np.mean(work)),
    }


def _fill_accuracy(
    prepared: Prepared, row: Row, log_prob: Array, valid: NDArray[np.bool_], stderr: Array | None
) -> None:
    task, reference = prepared.task, prepared.reference
    assert reference is not None
    levels = None if prepared.cell.options.split == "teacher-samples" else task.levels
    degrees = None
    if stderr is not None:
        params = prepared.cell.estimator.params()
        probes = params.get("replicates", params.get("probes"))
        degrees = probes - 1 if isinstance(probes, int) else None
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
    beside = _beside(cell, row)
    try:
        row["extra"] |= task.own_measures(
            items.x[: items.n], errors, lambda x: _plain(beside, prepared.model, x)
        )
    except DivergedError as error:
        row["extra"]["own_measures"] = f"none: {error}"


def _beside(cell: Cell, row: Row) -> Cell:
    """The cell for points beside the items (grids, points off the support), in large batches.

    A field may be stiff where there is no data; an adaptive solver then gets four times the evaluations that the items
    took, so that such points cannot take the run.
    """
    estimator = cell.estimator
    if estimator.params().get("max_nfe") is not None:
        bound = min(estimator.max_nfe, max(100, int(BESIDE_NFE * row["nfe_max"])))
        estimator = replace(estimator, max_nfe=bound)
    return replace(cell, estimator=estimator).with_options(
        batch_size=max(cell.options.batch_size, BESIDE_BATCH)
    )


def _plain(cell: Cell, model: Any, x: Tensor) -> Array:
    return evaluate(cell, model, x, torch.arange(len(x)), all_or_nothing=True).log_prob


def _fill_density(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    grid = prepared.task.grid()
    if grid is None:
        row["extra"]["density"] = "none: the task has no 2-D grid"
        return
    shape = (len(grid.y), len(grid.x))
    try:
        values = _plain(_beside(prepared.cell, row), prepared.model, grid.points)
    except DivergedError as error:
        row["extra"]["density"] = f"none: {error}"
        return
    row["mass"] = measures.mass(values, grid.cell_area)
    if (missing := float(np.isnan(values).mean())) > 0:
        row["extra"]["density_invalid_share"] = missing
    arrays |= {"density": values.astype(np.float32).reshape(shape), "grid_x": grid.x, "grid_y": grid.y}
    truth = prepared.task.log_density(grid.points, 1.0 - row["eps"])
    if truth is not None:
        arrays["density_ref"] = truth.astype(np.float32).reshape(shape)


def cycle_error(estimator: Any, model: Any, x: Tensor) -> float | None:
    """Mean Euclidean distance between x and its image after data -> noise -> data in the estimator's own steps.

    None where estimator or model is no flow map.
    """
    steps = estimator.params().get("steps")
    step = _map_step(model)
    if estimator.family not in ("flow-map", "joint-flow-map") or not isinstance(steps, int) or step is None:
        return None
    from flowlik_estimators.grids import time_grid

    grid = estimator.params().get("grid", "uniform")
    times = [float(t) for t in time_grid(grid, steps, float(estimator.data_end(model)), 0.0)]
    y = x
    with torch.no_grad():
        for path in (times, times[::-1]):
            for t, s in pairwise(path):
                y = y + (s - t) * step(y, y.new_full((len(y),), t), y.new_full((len(y),), s))
    return float((y - x).flatten(1).norm(dim=1).mean())


def _map_step(model: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    if hasattr(model, "average_velocity"):
        average: Callable[[Tensor, Tensor, Tensor], Tensor] = model.average_velocity
        return average
    if hasattr(model, "joint"):
        return lambda x, t, s: model.joint(x, t, s)[0]
    return None


def _fill_samples(prepared: Prepared, row: Row, arrays: Arrays) -> None:
    from flowlik.frechet import frechet_with_error
    from flowlik_models.features import load_extractor

    cell = prepared.cell
    x, cost = sample(cell, prepared.model, cell.options.samples)
    arrays["samples"] = x[:SHOWN_SAMPLES].float().cpu().numpy()
    row["n_samples"] = len(x)
    row["extra"]["sample_nfe"] = cost
    real = prepared.task.real_samples()
    extractor = load_extractor(cell.task)
    if real is None or extractor is None:
        return
    if not bool(torch.isfinite(x).all()):
        row["extra"]["frechet"] = "samples hold NaN or infinity"
        return
    row |= asdict(frechet_with_error(extractor.to(x.device), real.to(x.device), x))


def sample(cell: Cell, model: Any, n: int) -> tuple[Tensor, float]:
    """`n` samples by the cell's estimator, in batches, and the forwards each cost."""

    def batch(where: slice) -> tuple[Tensor, float]:
        ids = torch.arange(where.start, where.stop)
        generator = torch.Generator().manual_seed(cell.options.seed)
        dtype = getattr(torch, cell.options.dtype)
        out = cell.estimator.sample(model, len(ids), generator=generator, items=ids, dtype=dtype)
        return out.x.detach(), float(_per_item(out.cost.forwards, len(ids)).sum())

    parts, _ = stream(batch, n, cell.options.batch_size)
    return torch.cat([x for x, _ in parts]), sum(cost for _, cost in parts) / n


def _fill_timing(prepared: Prepared, row: Row) -> None:
    cell, items = prepared.cell, prepared.items
    assert items is not None
    size = min(cell.options.timing_batch, items.n)
    x = _on_device(cell, items.x[:size])
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
