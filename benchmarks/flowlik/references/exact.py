"""References by fixed-step RK4 with an exact trace."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.models import load
from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.records.writing import read_arrays, write_arrays
from flowlik.references.card import (
    ADAPTIVE_LIMIT,
    HALVING_LIMIT,
    SAMPLES_SEED,
    SCHEMA,
    Say,
    check,
    check_finite,
    teacher_samples,
    write_card,
)
from flowlik.references.conditions import (
    check_standard_source,
    conditioned,
    first,
    named,
    part_hash,
    points_of,
)
from flowlik.references.fixed_rk4 import NEAR_DATA, converged_log_prob
from flowlik.tasks.task import Task
from flowlik_estimators import get
from flowlik_models.files import kept_until_done
from flowlik_models.numerics.reparametrised_time import NEAR_NOISE

ITEMS = 256
STEPS, HALVED = 64, 128
HALVED_ITEMS = 32  # an item costs d products a node: the halved step is taken on the first items
CHUNK = 64
ADAPTIVE_ITEMS = 8
TEACHER_SAMPLES = 1000


def _converge(task: Task, folder: Path, device: str, n: int, progress: Say) -> Path:
    model, model_hash = load(task.id, task.reference_model, device, "float32")
    parts = folder / f"{task.id}-{model_hash}-parts"
    end = 1.0 - float(getattr(model, "eps", 0.0))
    check_standard_source(task.id, model)
    with kept_until_done(parts):
        samples = teacher_samples(task, model, TEACHER_SAMPLES, parts, progress)
        arrays: dict[str, Any] = {"teacher_samples": samples.numpy()}
        card = _how(task, model_hash, end) | {"splits": {}, "checks": []}
        for split in task.splits:
            x, cond = points_of(task, split, n, samples)
            options = (end, parts, split, device, progress)
            values = _in_chunks(model, x, cond, STEPS, *options)
            halved = _in_chunks(model, x[:HALVED_ITEMS], cond, HALVED, *options)
            adaptive = _adaptive(model, x[:ADAPTIVE_ITEMS], first(cond, ADAPTIVE_ITEMS, device), device)
            arrays[f"{split}_log_prob"] = values
            summary, checks = _judged(task, split, named(x, cond), values, halved, adaptive)
            card["splits"][split] = summary
            card["checks"] += checks
            progress(f"{split}: {summary['bpd_mean']:.4f} bits/dim, error {summary['error_bpd']:.2g}")
        write_arrays(folder / f"{task.id}.npz", arrays)
        card["arrays_sha256"] = hashlib.sha256((folder / f"{task.id}.npz").read_bytes()).hexdigest()
        return write_card(folder / f"{task.id}.json", card)


def _how(task: Task, model_hash: str, end: float) -> dict[str, Any]:
    """What a card says before anything is computed."""
    return {
        "schema": SCHEMA,
        "task": task.id,
        "model": task.reference_model,
        "model_hash": model_hash,
        "ref_id": f"{task.reference_model}-rk4-{STEPS}",
        "how": (
            f"RK4, {STEPS} steps in log((t + {NEAR_NOISE})/(1 - t + {NEAR_DATA})), exact trace at the nodes, "
            f"cubic spline through the divergence, float32 network; error: mean distance to {HALVED} steps on the "
            f"first {HALVED_ITEMS} items"
        ),
        "teacher_samples": f"{TEACHER_SAMPLES} draws by dopri5 at rtol = atol = 1e-6, seed {SAMPLES_SEED}",
        "t_end": end,
    }


def _judged(
    task: Task, split: str, known: dict[str, str], values: Array, halved: Array, adaptive: Array
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a card says of a split, and its checks: against half the steps and against an adaptive solver."""
    scale = 1.0 / (task.dim * math.log(2.0))
    distance = np.abs(halved - values[: len(halved)]) * scale
    gap = float(np.abs(adaptive - values[: len(adaptive)]).mean()) * scale
    levels = None if split == "teacher-samples" else task.levels
    summary = {
        "n": len(values),
        **known,
        "bpd_mean": float(accuracy.bits_per_dim(values, task.dim, levels).mean()),
        "error_bpd": float(distance.mean()),
        "error_bpd_max": float(distance.max()),
    }
    halving = f"{split}: mean distance of {STEPS} to {HALVED} steps, bits/dim"
    solving = f"{split}: mean distance to dopri5 at 1e-5, bits/dim"
    return summary, [
        check_finite(split, values),
        check(halving, distance.mean(), HALVING_LIMIT),
        check(solving, gap, ADAPTIVE_LIMIT),
    ]


def _adaptive(model: Any, x: Tensor, cond: Tensor | None, device: str) -> Array:
    out = get("ode", solver="dopri5", rtol=1e-5, atol=1e-5).log_prob(model, x.to(device), cond=cond)
    return np.asarray(out.log_prob.cpu().numpy())


def _in_chunks(
    model: Any,
    x: Tensor,
    cond: Tensor | None,
    steps: int,
    end: float,
    parts: Path,
    split: str,
    device: str,
    progress: Say,
) -> Array:
    """The converged values of all points; each chunk is kept on disk, so that an interrupted call goes on."""
    values = []
    for number, chunk in enumerate(torch.split(x, CHUNK)):
        given = first(cond, len(chunk), device, number * CHUNK)
        file = parts / f"{split}-{steps}-{number}-{part_hash(chunk, given)}.npz"
        if not file.exists():
            field = conditioned(model, given)
            write_arrays(file, {"log_prob": converged_log_prob(field, chunk.to(device), steps, end)})
            progress(f"{split}: {steps} steps, {min(len(x), (number + 1) * CHUNK)} of {len(x)} items")
        values.append(read_arrays(file)["log_prob"])
    return np.concatenate(values)
