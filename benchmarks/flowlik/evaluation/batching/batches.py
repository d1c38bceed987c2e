"""An estimator on any number of points or samples, in batches that shrink when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.cells import Cell
from flowlik.evaluation.batching import batch_size as sizes
from flowlik.measures.arrays import Array
from flowlik.tasks.points import Points, whole
from flowlik.tasks.registry import get_task

T = TypeVar("T")
FAR_BATCH = 4096
FAR_NFE = 4
COSTS = ("forwards", "vjps", "jvps")


class RefusedError(Exception):
    """The estimator does not fit the model."""


class DivergedError(Exception):
    """No item got a value."""


@dataclass
class Evaluation:
    """What an estimator said of a set of points, joined over batches."""

    log_prob: Array
    valid: NDArray[np.bool_]
    stderr: Array | None
    cost: dict[str, Array]
    batch_size: int
    reason: str | None = None
    extra: dict[str, Array] = field(default_factory=dict)


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


def evaluate(
    cell: Cell,
    model: Any,
    x: Tensor | Points,
    ids: Tensor,
    cond: Tensor | None = None,
    *,
    all_or_nothing: bool = False,
) -> Evaluation:
    """The estimator on all points, each with its condition, in batches; `Points` are made a batch at a time.

    Raises:
        RefusedError: it does not fit the model. DivergedError: `all_or_nothing`, and one batch got no value.
    """

    def batch(where: slice) -> Any:
        # A fresh generator each time: randomness is keyed by item, so batches of any size draw the same.
        generator = torch.Generator().manual_seed(cell.options.seed)
        points = on_device(cell, x[where])
        given = conditions_on_device(cell, cond, where)
        out = cell.estimator.log_prob(model, points, cond=given, generator=generator, items=ids[where])
        if out.status == "refused":
            raise RefusedError(out.reason or f"{cell.label} does not fit this model")
        if all_or_nothing and out.status != "ok":
            raise DivergedError(out.reason or "a batch got no value")
        return out, len(points)

    parts, batch_size = stream(batch, len(x), starting_batch(cell, batch, len(x)))
    outs = [out for out, _ in parts]
    errors = [out.stderr for out in outs]
    return Evaluation(
        log_prob=_joined([out.log_prob for out in outs]),
        valid=_joined([out.valid for out in outs]).astype(bool),
        stderr=_joined(errors) if all(error is not None for error in errors) else None,
        cost={
            name: np.concatenate([_per_item(getattr(out.cost, name), size) for out, size in parts])
            for name in COSTS
        },
        batch_size=batch_size,
        reason=next((out.reason for out in outs if out.reason), None),
        extra={
            name: np.concatenate([_per_item(out.extra[name], size) for out, size in parts])
            for name in outs[0].extra
            if all(name in out.extra and _is_per_item(out.extra[name], size) for out, size in parts)
        }
        | _policy_calls(parts),
    )


def joined(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of consecutive parts of the points."""
    errors = [part.stderr for part in parts if part.stderr is not None]
    return replace(
        parts[0],
        log_prob=np.concatenate([part.log_prob for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        stderr=np.concatenate(errors) if len(errors) == len(parts) else None,
        cost={name: np.concatenate([part.cost[name] for part in parts]) for name in parts[0].cost},
        batch_size=min(part.batch_size for part in parts),
        reason=next((part.reason for part in parts if part.reason), None),
        extra={
            name: np.concatenate([part.extra[name] for part in parts])
            for name in parts[0].extra
            if all(name in part.extra for part in parts)
        },
    )


def _policy_calls(parts: Sequence[tuple[Any, int]]) -> dict[str, Array]:
    """Network-free evaluations of policies by item, where there were any."""
    found = np.concatenate([_per_item(out.cost.policy_calls, size) for out, size in parts])
    return {"policy_calls": found} if found.any() else {}


def _joined(parts: Sequence[Tensor]) -> Array:
    return np.concatenate([part.detach().cpu().double().numpy() for part in parts])


def _is_per_item(value: Tensor, size: int) -> bool:
    return tuple(value.shape) in ((), (size,))


def _per_item(cost: float | Tensor, size: int) -> Array:
    values = cost.detach().cpu().double().numpy() if isinstance(cost, Tensor) else np.float64(cost)
    return np.broadcast_to(values, (size,)).astype(np.float64)


def sample(cell: Cell, model: Any, n: int, *, first: int = 0) -> tuple[Tensor, dict[str, Array]]:
    """Samples `first` .. `first + n` by the cell's estimator, in batches, and what each cost, (n,) by name.

    Raises:
        RefusedError: it does not fit the model, or cannot sample. DivergedError: samples that are not finite.
    """
    parts = _samples(cell, model, n, log_prob=False, first=first)
    if parts[0].status == "refused":
        raise RefusedError(parts[0].reason or f"{cell.label} does not sample from this model")
    if any(not bool(out.valid.all()) for out in parts):
        why = next((out.reason for out in parts if out.reason), None)
        raise DivergedError(f"samples hold NaN or infinity{f': {why}' if why else ''}")
    cost = {
        name: np.concatenate([_per_item(getattr(out.cost, name), len(out.x)) for out in parts])
        for name in COSTS
    }
    return torch.cat([out.x.detach() for out in parts]), cost


def sample_with_log_prob(cell: Cell, model: Any, n: int) -> tuple[Tensor, Array | None]:
    """`n` samples and the log-densities found on the way, None where the family finds none."""
    parts = _samples(cell, model, n, log_prob=True)
    x = torch.cat([out.x.detach() for out in parts])
    found = [out.log_prob for out in parts]
    return x, _joined(found) if all(part is not None for part in found) else None


def sample_reason(cell: Cell, model: Any, n: int) -> str | None:
    """What the family says of `n` samples drawn with their log-densities."""
    return next((out.reason for out in _samples(cell, model, n, log_prob=True) if out.reason), None)


def _samples(cell: Cell, model: Any, n: int, *, log_prob: bool, first: int = 0) -> list[Any]:
    def batch(where: slice) -> Any:
        ids = torch.arange(first + where.start, first + where.stop)
        generator = torch.Generator().manual_seed(cell.options.seed)
        dtype = getattr(torch, cell.options.dtype)
        task = get_task(cell.task).for_model(model)
        cond = conditions_on_device(cell, task.sample_conditions(cell.options.split, ids))
        return cell.estimator.sample(
            model, len(ids), cond=cond, generator=generator, items=ids, dtype=dtype, log_prob=log_prob
        )

    return stream(batch, n, starting_batch(cell, batch, n))[0]


def starting_batch(cell: Cell, batch: Callable[[slice], Any], n: int) -> int:
    """The batch size that the cell asks for; for auto the one that fits into memory by a measured trial."""
    asked = cell.options.batch_size
    return sizes.fitting_batch(batch, n, torch.device(cell.device)) if isinstance(asked, str) else asked


def on_device(cell: Cell, x: Tensor | Points) -> Tensor:
    """x on the cell's device, in its dtype."""
    return whole(x).to(device=cell.device, dtype=getattr(torch, cell.options.dtype))


def conditions_on_device(cell: Cell, cond: Tensor | None, where: slice = slice(None)) -> Tensor | None:
    """Some of the conditions on the cell's device; floats in its dtype, labels as they are."""
    if cond is None:
        return None
    dtype = getattr(torch, cell.options.dtype) if cond.is_floating_point() else cond.dtype
    return cond[where].to(device=cell.device, dtype=dtype)


def with_bounded_evaluations(cell: Cell, row: dict[str, Any]) -> Cell:
    """The cell for points beside the items (grids, points off the support), in large batches.

    A field may be stiff where there is no data; an adaptive solver then gets four times the evaluations that the items
    took, so that such points cannot take the run.
    """
    estimator = cell.estimator
    if estimator.params().get("max_nfe") is not None:
        bound = min(estimator.max_nfe, max(100, int(FAR_NFE * row["nfe_max"])))
        estimator = replace(estimator, max_nfe=bound)
    asked = cell.options.batch_size
    batch_size = asked if isinstance(asked, str) else max(asked, FAR_BATCH)
    return replace(cell, estimator=estimator).with_options(batch_size=batch_size)


def evaluate_plain(cell: Cell, model: Any, x: Tensor | Points) -> Array:
    """Log-densities (batch,) alone; DivergedError where a batch got no value."""
    return evaluate(cell, model, x, torch.arange(len(x)), all_or_nothing=True).log_prob
