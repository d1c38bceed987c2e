"""The examination of a cell's model, once for all its cells: what it finds stands in every record of the model.

A sound model's records say nothing of it, and its time is in no timing.
"""

from __future__ import annotations

from typing import Any

import torch

from flowlik.evaluation.batching.batches import conditions_on_device, on_device
from flowlik.evaluation.prepare import Prepared
from flowlik.tasks.points import whole
from flowlik_estimators.examination import ROWS, examine

_KNOWN: dict[tuple[str, ...], list[str]] = {}


def findings(prepared: Prepared) -> list[str]:
    """One line a finding; none for cells without a model, and for what does not let itself be examined."""
    cell, items = prepared.cell, prepared.items
    if cell.is_control or prepared.model is None or items is None or not cell.options.likelihood:
        return []
    key = (cell.task, cell.model, prepared.model_hash, cell.device, cell.options.dtype, cell.options.split)
    if key not in _KNOWN:
        _KNOWN[key] = _examined(prepared)
    return _KNOWN[key]


def _examined(prepared: Prepared) -> list[str]:
    assert prepared.items is not None
    rows = slice(min(ROWS, prepared.items.n))
    x = on_device(prepared.cell, whole(prepared.items.x[rows]))
    cond = conditions_on_device(prepared.cell, prepared.items.cond, rows)
    generator = torch.get_rng_state()
    try:
        return [str(finding) for finding in examine(prepared.model, x, cond)]
    except Exception:  # a model that cannot be examined at all fails in its cells, with its own reason
        return []
    finally:
        torch.set_rng_state(generator)


def added(row: dict[str, Any], found: list[str]) -> None:
    """Put findings into a row: all in ``extra``, and beside its reason."""
    if found:
        row["extra"]["examination"] = found
        line = "examination: " + "; ".join(found)
        row["reason"] = "; ".join(filter(None, (row.get("reason"), line)))
