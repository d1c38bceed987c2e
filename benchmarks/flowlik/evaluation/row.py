"""Rows: what a record says of a cell before and after its evaluation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.cells import estimator_columns
from flowlik.evaluation.batching.batch_size import AUTO
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.arrays import Array
from flowlik.records.columns import COLUMNS, SCHEMA_VERSION
from flowlik.records.writing import utc_now

Row = dict[str, Any]
Arrays = dict[str, NDArray[Any]]


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
        "dequant_draws": cell.options.draws if prepared.task.dequantises(cell.options.split) else None,
        "dequant_noise": f"truncated normal {tau:g}" if (tau := cell.options.truncated_normal) else None,
        "status": prepared.status,
        "reason": prepared.reason,
        "extra": {"options": asdict(cell.options)},
    }
    return row


def merged(row: Row, measured: Row) -> Row:
    """A blank row with what was measured; `extra` holds what both have."""
    known = {name: value for name, value in measured.items() if name in row}
    return row | known | {"extra": row["extra"] | measured.get("extra", {})}


def _item_arrays(log_prob: Array, ref: Array, valid: NDArray[np.bool_], stderr: Array | None) -> Arrays:
    """Arrays over items, (n,), and every draw where there are several dequantisations: the means over the draws that
    have a reference, of an item without one over all."""
    arrays: Arrays = {"log_prob": log_prob[0], "ref": ref[0], "valid": np.asarray(valid.all(axis=0))}
    if stderr is not None:
        arrays["stderr"] = stderr[0]
    if len(log_prob) > 1:
        known = np.isfinite(ref) | ~np.isfinite(ref).any(axis=0)
        arrays |= {"log_prob": _mean(log_prob, known), "ref": _mean(ref, known)}
        arrays |= {"log_prob_draws": log_prob, "ref_draws": ref}
    return arrays


def _mean(values: Array, known: NDArray[np.bool_]) -> Array:
    """Mean over the draws (draws, n) that are known."""
    return np.asarray(np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0))


def _add_cost(row: Row, cost: dict[str, Array]) -> None:
    work = sum(cost.values())
    row |= {
        "nfe_mean": float(cost["forwards"].mean()),
        "nfe_max": float(cost["forwards"].max()),
        "vjp_mean": float(cost["vjps"].mean()),
        "jvp_mean": float(cost["jvps"].mean()),
        "work": float(np.mean(work)),
    }
