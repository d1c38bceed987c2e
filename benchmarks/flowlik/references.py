"""References: what a likelihood is judged against, how it was made, and the checks it passed.

A closed-form task needs none stored: its truth is evaluated at the items themselves, and `flowlik reference` writes a
summary of it. For images the reference is the teacher's converged likelihood, one fixed dequantised point per image, by
the rule of `flowlik.rule`: 64 steps, exact trace at the nodes (`digits`), with the distance to 128 steps on the first
items as its error. Beyond `EXACT_DIMS` dimensions the trace is taken by pooled probes (`flowlik.pooled_references`).
Stored are `<task>.json` and `<task>.npz`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowlik import measures
from flowlik.places import need_source_root, results_dir
from flowlik.points import whole
from flowlik.records import read_arrays, to_plain, utc_now, write_arrays
from flowlik.rule import NEAR_DATA, NEAR_NOISE, converged_log_prob
from flowlik.tasks import Array, Items, Reference, Task, UnavailableError, get_task, tensor_hash
from flowlik_models.files import write_atomically
from flowlik_models.zoo import CHECKPOINTS_VARIABLE

if TYPE_CHECKING:
    from flowlik.tasks import ClosedFormTask

Say = Callable[[str], None]
FOLDER = "references"
"""In `results/`, and in a user's own folder of checkpoints."""
SCHEMA = 1
ITEMS = 256
EXACT_DIMS = 128  # a node costs d products an item
STEPS, HALVED = 64, 128
HALVED_ITEMS = 32  # an item costs d products a node: the halved step is taken on the first items
CHUNK = 64
HALVING_LIMIT = 0.001  # bits/dim between 64 and 128 steps, mean over items
ADAPTIVE_ITEMS = 8
ADAPTIVE_LIMIT = 0.002  # bits/dim to dopri5 at 1e-5, mean over items
TEACHER_SAMPLES = 1000
SAMPLES_SEED = 0
SAMPLES_BATCH = 250  # an adaptive solver has one step size a batch, so it is part of the draws


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


def stored(task: str) -> Stored:
    """The stored reference of a task: beside the user's own checkpoints where it is there, else shipped.

    Raises:
        UnavailableError: there is none. ValueError: it is damaged; the message names the file.
    """
    name = f"{task}.json"
    own = own_checkpoints()
    for folder in (*([own / FOLDER] if own else []), results_dir() / FOLDER):
        if (folder / name).is_file() and (folder / name).with_suffix(".npz").is_file():
            return read_stored(folder / name)
    raise UnavailableError(f"no stored reference of {task}; make it with: {_cure(task)}")


@cache
def read_stored(file: Path) -> Stored:
    """The reference whose card is ``file``, its arrays verified by their hash; ValueError where it is damaged."""
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        expected = card["arrays_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected the card of a reference ({error})") from error
    arrays_file = file.with_suffix(".npz")
    if hashlib.sha256(arrays_file.read_bytes()).hexdigest() != expected:
        raise ValueError(f"{arrays_file}: expected the arrays with the hash that stands in {file.name}")
    return Stored(card=card, arrays=read_arrays(arrays_file), file=file)


def _of_present_model(task: Task) -> Stored:
    """The stored reference; UnavailableError where it is another model's."""
    from flowlik_models.zoo import model_hash

    found = stored(task.id)
    present = model_hash(task.id, task.reference_model)
    if found.card["model_hash"] != present:
        raise UnavailableError(
            f"the reference of {task.id} is of model {found.card['model_hash']}, not {present}; make it again with: "
            f"{_cure(task.id)}"
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
        UnavailableError: none stored, or of another model or another end time. ValueError: other points than stored.
    """
    found = _of_present_model(task)
    card = found.card
    if abs(t - card["t_end"]) > 1e-9:
        raise UnavailableError(f"the reference of {task.id} is of t = {card['t_end']}, not {t}")
    values = np.asarray(found.arrays[f"{split}_log_prob"], dtype=np.float64)
    part = card["splits"][split]
    if tensor_hash(whole(task.items(split, len(values)).x)) != part["x_hash"]:
        raise ValueError(
            f"{found.file}: expected the points of {split} with hash {part['x_hash']}; "
            f"make it again with: {_cure(task.id)}"
        )
    log_prob = np.full((items.draws, items.n), np.nan)
    known = min(items.n, len(values))
    log_prob[0, :known] = values[:known]
    return Reference(
        log_prob=log_prob,
        ref_id=card["ref_id"],
        error=float(part["error_bpd"]),
        digest=f"{card['arrays_sha256'][:12]}",
    )


# --- making -------------------------------------------------------------------------------------------------


def make_reference(
    task: str,
    folder: Path,
    *,
    device: str = "cpu",
    limit: int | None = None,
    stderr: float | None = None,
    progress: Say = lambda _: None,
) -> Path:
    """Compute a task's reference and write it to `folder`; the path of its card.

    Args:
        task: task id.
        folder: where to write; partial results of an interrupted call are kept there and used.
        device: where the teacher runs.
        limit: items a split, default 256, of pooled probes 500.
        stderr: standard error of an item in bits/dim that pooled probes are to reach; without it the trace is exact up
            to `EXACT_DIMS` dimensions, and the error 0.005 beyond.
        progress: called with lines of text.

    Raises:
        ValueError: unknown task, an error that has no effect, or a check that failed. UnavailableError: the teacher is
            not there.
    """
    from flowlik.pooled_references import converge

    found = get_task(task)
    if found.reference_model == "closed-form":
        if stderr is not None:
            raise ValueError(f"{task} is known in closed form: --stderr has no effect")
        return _summarise_closed_form(found, folder)  # type: ignore[arg-type]
    if stderr is not None or found.dim > EXACT_DIMS:
        return converge(found, folder, device, limit, stderr, progress)
    return _converge(found, folder, device, limit or ITEMS, progress)


def ship_reference(task: str, folder: Path) -> Path:
    """Copy a reference from `folder` into the source tree; the path of its card there."""
    target = need_source_root("--ship") / "results" / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    for suffix in (".npz", ".json"):
        file = folder / f"{task}{suffix}"
        if file.exists():
            shutil.copyfile(file, target / file.name)
    read_stored.cache_clear()
    return target / f"{task}.json"


def check(name: str, value: float, limit: float) -> dict[str, Any]:
    """A check of a card: passed where the value is at most the limit."""
    return {"name": name, "value": value, "limit": limit, "passed": bool(value <= limit)}


def write_card(file: Path, card: dict[str, Any]) -> Path:
    """Write a card and return its path; ValueError where a check of it failed."""
    from flowlik.environment import commit, versions

    card |= {"created_utc": utc_now(), "commit": commit()[0], "versions": versions()}
    write_atomically(file, json.dumps(to_plain(card), indent=2).encode() + b"\n")
    failed = [check["name"] for check in card["checks"] if not check["passed"]]
    if failed:
        raise ValueError(f"{file}: the reference failed its checks: {', '.join(failed)}")
    return file


def _summarise_closed_form(task: ClosedFormTask, folder: Path) -> Path:
    """The truth's own numbers on 20,000 fresh points, and that its density integrates to 1 on the task's grid."""
    n = 20_000
    items = task.items("test", n)
    end = 1.0 - task.eps
    bits = measures.bits_per_dim(task.log_density(items.x, end), task.dim)
    checks = [check("share of points whose density is not finite", float(np.mean(~np.isfinite(bits))), 0.0)]
    grid = task.grid()
    if grid is not None:
        mass = measures.mass(task.log_density(grid.points, end), grid.cell_area)
        checks.append(check("|mass on the task's grid - 1|", abs(mass - 1.0), 1e-4))
    mean, covariance = task.moments()
    x = whole(items.x).flatten(1).numpy()
    spread = np.sqrt(np.diag(covariance) / n)
    checks.append(
        check("largest |sample mean - mean| in standard errors", _largest(x.mean(0) - mean, spread), 5.0)
    )
    card = {
        "schema": SCHEMA,
        "task": task.id,
        "model": "closed-form",
        "ref_id": "closed-form",
        "how": "exact log-density of the closed form at t_end, float64; nothing is stored per item",
        "data_hash": task.data_hash("test"),
        "t_end": end,
        "n": n,
        "bpd_mean": float(bits.mean()),
        "bpd_se": float(bits.std(ddof=1) / math.sqrt(n)),
        "bpd_quantiles": dict(zip(("p05", "p50", "p95"), np.quantile(bits, (0.05, 0.5, 0.95)), strict=True)),
        "checks": checks,
    }
    return write_card(folder / f"{task.id}.json", card)


def _largest(difference: Array, spread: Array) -> float:
    return float(np.max(np.abs(difference) / spread))


def _converge(task: Task, folder: Path, device: str, n: int, progress: Say) -> Path:
    from flowlik.runner import load

    model, model_hash = load(task.id, task.reference_model, device, "float32")
    parts = folder / f"{task.id}-{model_hash}-parts"
    end = 1.0 - float(getattr(model, "eps", 0.0))
    samples = teacher_samples(model, TEACHER_SAMPLES, parts, device, progress)
    arrays: dict[str, Any] = {"teacher_samples": samples.numpy()}
    card = _how(task, model_hash, end) | {"splits": {}, "checks": []}
    for split in task.splits:
        x = samples[:n] if split == "teacher-samples" else whole(task.items(split, n).x)
        values = _in_chunks(model, x, STEPS, end, parts, split, device, progress)
        halved = _in_chunks(model, x[:HALVED_ITEMS], HALVED, end, parts, split, device, progress)
        adaptive = _adaptive(model, x[:ADAPTIVE_ITEMS], device)
        arrays[f"{split}_log_prob"] = values
        told, checks = _judged(task, split, x, values, halved, adaptive)
        card["splits"][split] = told
        card["checks"] += checks
        progress(f"{split}: {told['bpd_mean']:.4f} bits/dim, error {told['error_bpd']:.2g}")
    write_arrays(folder / f"{task.id}.npz", arrays)
    card["arrays_sha256"] = hashlib.sha256((folder / f"{task.id}.npz").read_bytes()).hexdigest()
    path = write_card(folder / f"{task.id}.json", card)
    shutil.rmtree(parts, ignore_errors=True)
    return path


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
    task: Task, split: str, x: Tensor, values: Array, halved: Array, adaptive: Array
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a card says of a split, and its checks: against half the steps and against an adaptive solver."""
    scale = 1.0 / (task.dim * math.log(2.0))
    distance = np.abs(halved - values[: len(halved)]) * scale
    gap = float(np.abs(adaptive - values[: len(adaptive)]).mean()) * scale
    levels = None if split == "teacher-samples" else task.levels
    told = {
        "n": len(x),
        "x_hash": tensor_hash(x),
        "bpd_mean": float(measures.bits_per_dim(values, task.dim, levels).mean()),
        "error_bpd": float(distance.mean()),
        "error_bpd_max": float(distance.max()),
    }
    halving = f"{split}: mean distance of {STEPS} to {HALVED} steps, bits/dim"
    solving = f"{split}: mean distance to dopri5 at 1e-5, bits/dim"
    return told, [check(halving, distance.mean(), HALVING_LIMIT), check(solving, gap, ADAPTIVE_LIMIT)]


def teacher_samples(model: Any, n: int, parts: Path, device: str, progress: Say) -> Tensor:
    """The first n draws of the teacher, (n, *event) float32; each batch is kept on disk.

    Raises:
        ValueError: a draw is not finite.
    """
    from flowlik_estimators import get

    estimator = get("ode", solver="dopri5", rtol=1e-6, atol=1e-6)
    found = []
    for ids in torch.split(torch.arange(n), SAMPLES_BATCH):
        file = parts / f"samples-{int(ids[0])}-{len(ids)}.npz"
        if not file.exists():
            generator = torch.Generator().manual_seed(SAMPLES_SEED)
            out = estimator.sample(model, len(ids), generator=generator, items=ids, log_prob=False)
            if not bool(out.valid.all()):
                raise ValueError(
                    f"the teacher's samples by {estimator.label} are not all finite ({out.reason})"
                )
            write_arrays(file, {"x": out.x.cpu().numpy()})
            progress(f"{int(ids[-1]) + 1} of {n} samples of the teacher")
        found.append(torch.from_numpy(read_arrays(file)["x"]))
    return torch.cat(found)


def _adaptive(model: Any, x: Tensor, device: str) -> Array:
    from flowlik_estimators import get

    out = get("ode", solver="dopri5", rtol=1e-5, atol=1e-5).log_prob(model, x.to(device))
    return np.asarray(out.log_prob.cpu().numpy())


def _in_chunks(
    model: Any, x: Tensor, steps: int, end: float, parts: Path, split: str, device: str, progress: Say
) -> Array:
    """The converged values of all points; each chunk is kept on disk, so that an interrupted call goes on."""
    values = []
    for number, chunk in enumerate(torch.split(x, CHUNK)):
        file = parts / f"{split}-{steps}-{number}-{tensor_hash(chunk)}.npz"
        if not file.exists():
            write_arrays(file, {"log_prob": converged_log_prob(model, chunk.to(device), steps, end)})
            progress(f"{split}: {steps} steps, {min(len(x), (number + 1) * CHUNK)} of {len(x)} items")
        values.append(read_arrays(file)["log_prob"])
    return np.concatenate(values)
