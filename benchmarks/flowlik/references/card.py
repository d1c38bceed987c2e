"""Cards of references: what they say, and the checks they pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.records.environment import commit, versions
from flowlik.records.writing import read_arrays, to_plain, utc_now, write_arrays
from flowlik.tasks.task import Task, tensor_hash
from flowlik_estimators import get
from flowlik_estimators.model_checks import stand_in
from flowlik_estimators.model_checks.guards import device_of
from flowlik_models.files import write_atomically

Say = Callable[[str], None]
SCHEMA = 1
HALVING_LIMIT = 0.001  # bits/dim between 64 and 128 steps, mean over items
ADAPTIVE_LIMIT = 0.002  # bits/dim to dopri5 at 1e-5, mean over items
SAMPLES_SEED = 0
SAMPLES_BATCH = 250  # an adaptive solver has one step size a batch, so it is part of the draws


def check(name: str, value: float, limit: float) -> dict[str, Any]:
    """A check of a card: passed where the value is at most the limit."""
    return {"name": name, "value": value, "limit": limit, "passed": bool(value <= limit)}


def check_finite(split: str, values: Array) -> dict[str, Any]:
    """A check of a card: every item has a value; the mean over the others would be of easier ones."""
    return check(
        f"{split}: share of items without a finite value", 1.0 - float(np.isfinite(values).mean()), 0.0
    )


def write_card(file: Path, card: dict[str, Any]) -> Path:
    """Write a card and return its path; ValueError where a check of it failed."""
    card |= {"created_utc": utc_now(), "commit": commit()[0], "versions": versions()}
    write_atomically(file, json.dumps(to_plain(card), indent=2).encode() + b"\n")
    failed = [check["name"] for check in card["checks"] if not check["passed"]]
    if failed:
        raise ValueError(f"{file}: the reference failed its checks: {', '.join(failed)}")
    return file


def teacher_samples(task: Task, model: Any, n: int, parts: Path, progress: Say) -> Tensor:
    """The first n draws of the teacher, (n, *event) float32; each batch is kept on disk.

    Of a conditional one each draw has the condition that the task says.

    Raises:
        ValueError: a draw is not finite.
    """
    estimator = get("ode", solver="dopri5", rtol=1e-6, atol=1e-6)
    found = []
    for ids in torch.split(torch.arange(n), SAMPLES_BATCH):
        cond = task.sample_conditions("teacher-samples", ids)
        given = "" if cond is None else f"-{tensor_hash(cond)}"
        file = parts / f"samples-{int(ids[0])}-{len(ids)}{given}.npz"
        if not file.exists():
            generator = torch.Generator().manual_seed(SAMPLES_SEED)
            cond = None if cond is None else cond.to(device_of(stand_in.found(model)))
            out = estimator.sample(model, len(ids), cond=cond, generator=generator, items=ids, log_prob=False)
            if not bool(out.valid.all()):
                raise ValueError(
                    f"the teacher's samples by {estimator.label} are not all finite ({out.reason})"
                )
            write_arrays(file, {"x": out.x.cpu().numpy()})
            progress(f"{int(ids[-1]) + 1} of {n} samples of the teacher")
        found.append(torch.from_numpy(read_arrays(file)["x"]))
    return torch.cat(found)
