"""What does more training give? Bits/dim of a model's averages along its training, by the cell's estimator.

The averages are those a recipe keeps (`snapshots`), beside the checkpoint; a model without them has no curve. The
estimator's bias is in every value, so one near its converged value belongs here.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np

from flowlik.evaluation.batching.batches import evaluate_plain
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.accuracy import bits_per_dim
from flowlik.measures.arrays import Array
from flowlik.tasks.points import whole
from flowlik_models.checkpoints import fill, read_checkpoint
from flowlik_models.zoo import snapshots

ITEMS = 128


def training_curve(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """Bits/dim of the first items by every snapshot, the finished model last.

    Measures, lists over snapshots: `step`; `cpu_hours` of training until then; `bpd`, mean over the items, and its
    standard error `bpd_se`; `gain`, by how much the mean fell since the snapshot before (None for the first), and
    its standard error `gain_se` over the same items. Empty where no snapshot lies beside the checkpoint.
    """
    cell, task, items = prepared.cell, prepared.task, prepared.items
    assert items is not None
    kept = snapshots(cell.task, cell.model)
    if len(kept) < 2:
        return {}, {}
    x = whole(items.x[: min(items.n, ITEMS)])
    model = copy.deepcopy(prepared.model)
    found = []
    for snapshot in kept:
        tensors = read_checkpoint(snapshot.path)[0]
        fill(model, {name: tensor.float() for name, tensor in tensors.items()}, snapshot.path)
        found.append(bits_per_dim(evaluate_plain(cell, model, x), task.dim, task.levels))
    bits = np.stack(found)
    gains = bits[:-1] - bits[1:]
    measured = {
        "step": [snapshot.step for snapshot in kept],
        "cpu_hours": [snapshot.cpu_seconds / 3600 for snapshot in kept],
        "bpd": bits.mean(1).tolist(),
        "bpd_se": _standard_error(bits).tolist(),
        "gain": [None, *gains.mean(1).tolist()],
        "gain_se": [None, *_standard_error(gains).tolist()],
    }
    return measured, {"bpd": bits}


def _standard_error(values: Array) -> Array:
    return np.asarray(values.std(1, ddof=1) / math.sqrt(values.shape[1]))
