"""Partial results of a large cell, stored as soon as they are known: a run that was stopped goes on inside the cell.

Each holds whole batches, and randomness is keyed by item, so the answer is that of the cell in one go. They lie in
the run's folder, below `pieces/<cell_id>`, until the cell's row is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flowlik.cells import Cell
from flowlik.evaluation.batching.batches import COSTS, Evaluation, evaluate, joined
from flowlik.records.writing import read_arrays, write_arrays
from flowlik.tasks.points import Points

ITEMS = 500
"""Items of a partial result, rounded up to whole batches; a cell of no more has none."""

Evaluate = Callable[[Cell, Any, Tensor | Points, Tensor, Tensor | None], Evaluation]


def with_partial_results(folder: Path) -> Evaluate:
    """`batches.evaluate` for one cell, whose partial results are kept in `folder` and used again."""

    def evaluated(
        cell: Cell, model: Any, x: Tensor | Points, ids: Tensor, cond: Tensor | None = None
    ) -> Evaluation:
        batch = cell.options.batch_size
        if isinstance(batch, str) or len(x) <= max(ITEMS, batch):
            return evaluate(cell, model, x, ids, cond)
        size = -(-ITEMS // batch) * batch
        parts = []
        for start in range(0, len(x), size):
            where = slice(start, min(len(x), start + size))
            file = folder / f"{where.start}-{where.stop}-by-{batch}.npz"
            found = _stored(file)
            if found is None:
                found = evaluate(cell, model, x[where], ids[where], None if cond is None else cond[where])
                _store(file, found)
                _print_progress(f"{cell.title}: {where.stop} of {len(x)} items")
            parts.append(found)
            cell = cell.with_options(batch_size=found.batch_size)  # where memory had it halved
        return joined(parts)

    return evaluated


def _print_progress(line: str) -> None:
    if not sys.stderr.isatty():  # on a terminal it would run through the bar
        print(line, file=sys.stderr, flush=True)  # noqa: T201 - minutes of silence would look like a hang


def _store(file: Path, found: Evaluation) -> None:
    """Write a partial result; where the disk does not take it, the run goes on without."""
    words = {"batch_size": found.batch_size, "reason": found.reason}
    arrays = {"log_prob": found.log_prob, "valid": found.valid, "words": np.array(json.dumps(words))}
    if found.stderr is not None:
        arrays["stderr"] = found.stderr
    arrays |= {f"cost {name}": values for name, values in found.cost.items()}
    arrays |= {f"extra {name}": values for name, values in found.extra.items()}
    with suppress(OSError):
        write_arrays(file, arrays)


def _stored(file: Path) -> Evaluation | None:
    """A partial result that an earlier run finished; None where there is none, or a damaged one."""
    if not file.is_file():
        return None
    try:
        return _as_evaluation(read_arrays(file))
    except (ValueError, KeyError):
        return None


def _as_evaluation(arrays: dict[str, Any]) -> Evaluation:
    words = json.loads(str(arrays["words"]))
    return Evaluation(
        log_prob=arrays["log_prob"],
        valid=arrays["valid"],
        stderr=arrays.get("stderr"),
        cost={name: arrays[f"cost {name}"] for name in COSTS},
        batch_size=words["batch_size"],
        reason=words["reason"],
        extra={
            name.removeprefix("extra "): values
            for name, values in arrays.items()
            if name.startswith("extra ")
        },
    )
