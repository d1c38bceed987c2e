"""Stored references: converged likelihoods as they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowlik.records.paths import results_dir
from flowlik.records.writing import read_arrays
from flowlik.tasks.points import whole
from flowlik.tasks.task import Items, Reference, Task, UnavailableError, tensor_hash
from flowlik_models.zoo import CHECKPOINTS_VARIABLE, model_hash

FOLDER = "references"
"""In `results/`, and in a user's own folder of checkpoints."""


# --- reading ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stored:
    """A stored reference: its card and its arrays."""

    card: dict[str, Any]
    arrays: dict[str, Any]
    file: Path


def own_checkpoints() -> Path | None:
    """The user's own folder of checkpoints, and of the references that belong to them."""
    folder = os.environ.get(CHECKPOINTS_VARIABLE)
    return Path(folder) if folder else None


def stored(task: str, more: Sequence[Path] = (), cure: str | None = None) -> Stored:
    """The stored reference of a task: beside the user's own checkpoints where it is there, else shipped, else in one of
    `more` folders; `cure` is the command that makes it, where it is not that of a built-in task.

    Raises:
        UnavailableError: there is none. ValueError: it is damaged; the message names the file.
    """
    name = f"{task}.json"
    own = own_checkpoints()
    for folder in (*([own / FOLDER] if own else []), results_dir() / FOLDER, *more):
        if (folder / name).is_file() and (folder / name).with_suffix(".npz").is_file():
            return read_stored(folder / name)
    raise UnavailableError(f"no stored reference of {task}; make it with: {cure or _cure(task)}")


@cache
def read_stored(file: Path) -> Stored:
    """The reference whose card is ``file``, its arrays verified by their hash; ValueError where it is damaged."""
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        expected = card["arrays_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: expected the card of a reference ({error})") from error
    arrays_file = file.with_suffix(".npz")
    if hashlib.sha256(arrays_file.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{arrays_file}: expected the arrays with the hash that stands in {file.name}")
    return Stored(card=card, arrays=read_arrays(arrays_file), file=file)


def _of_present_model(task: Task) -> Stored:
    """The stored reference; UnavailableError where it is another model's, or failed a check of its own."""
    found = stored(task.id, task.reference_folders, task.reference_command)
    failed = [check["name"] for check in found.card.get("checks", []) if not check["passed"]]
    if failed:
        raise UnavailableError(
            f"the reference of {task.id} failed its checks ({'; '.join(failed)}), so its error is not known; make it "
            f"again with: {task.reference_command or _cure(task.id)}"
        )
    present = task.own_model_hash(task.reference_model) or model_hash(task.id, task.reference_model)
    if found.card["model_hash"] != present:
        raise UnavailableError(
            f"the reference of {task.id} is of model {found.card['model_hash']}, not {present}; make it again with: "
            f"{task.reference_command or _cure(task.id)}"
        )
    return found


def _cure(task: str) -> str:
    own = own_checkpoints()
    return f"flowlik reference {task} {f'--checkpoints {own}' if own else '--ship'}"


def stored_samples(task: Task, n: int) -> Items:
    """The first n of the teacher's stored samples.

    Raises:
        UnavailableError: none stored, or of another teacher. ValueError: they are damaged.
    """
    x = torch.from_numpy(_of_present_model(task).arrays["teacher_samples"])[:n]
    return Items(x=x, ids=torch.arange(len(x)), n=len(x))


def stored_log_prob(task: Task, split: str, items: Items, t: float) -> Reference:
    """The stored values for these items, (draws, n) nats; NaN for items and draws that have none.

    Raises:
        UnavailableError: none stored; of another model, other conditions or another end time; or one that failed its
            checks.
        ValueError: other points than stored, or a card that does not fit its arrays.
    """
    found = _of_present_model(task)
    card = found.card
    if not abs(t - card["t_end"]) <= 1e-9:
        raise UnavailableError(f"the reference of {task.id} is of t = {card['t_end']}, not {t}")
    values = np.asarray(found.arrays[f"{split}_log_prob"], dtype=np.float64)
    part = card["splits"][split]
    again = f"make it again with: {task.reference_command or _cure(task.id)}"
    error = float(part["error_bpd"])
    if values.ndim != 1 or part.get("n", len(values)) != len(values) or not 0.0 <= error < math.inf:
        raise ValueError(
            f"{found.file}: expected an error of 0 or more and one value each of {part.get('n')} points of {split}, "
            f"got {error} and shape {values.shape}; {again}"
        )
    judged = task.items(split, len(values))
    if tensor_hash(whole(judged.x)) != part["x_hash"]:
        raise ValueError(f"{found.file}: expected the points of {split} with hash {part['x_hash']}; {again}")
    if (None if judged.cond is None else tensor_hash(judged.cond)) != part.get("cond_hash"):
        raise UnavailableError(
            f"the reference of {task.id} is of other conditions of {split}, with hash {part.get('cond_hash')}; {again}"
        )
    log_prob = np.full((items.draws, items.n), np.nan)
    known = min(items.n, len(values))
    log_prob[0, :known] = values[:known]
    return Reference(
        log_prob=log_prob,
        ref_id=card["ref_id"],
        error=error,
        digest=f"{card['arrays_sha256'][:12]}",
    )
