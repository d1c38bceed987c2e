"""References at image scale: the teacher's converged likelihood by pooled probes, with a standard error an image.

Two errors stand on the card of every split. That of the probes is known of each image and stored with it. That of the
rule, 96 steps against 192 and against an adaptive solver, is measured on the first images with one set of probes for
all: what is left of the difference is then the rules' own, seen through the same probes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.models import load
from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.records.writing import read_arrays, write_arrays
from flowlik.references import card as cards
from flowlik.references.card import SAMPLES_SEED, Say
from flowlik.references.conditions import (
    check_standard_source,
    conditioned,
    first,
    named,
    part_hash,
    points_of,
)
from flowlik.references.fixed_rk4 import NEAR_DATA, log_prob_columns
from flowlik.references.pooled_probes import Plan, Pooled, pilot, pooled_log_prob
from flowlik.tasks.task import Task, seed_of
from flowlik_estimators import get
from flowlik_estimators.divergence.products import hutchinson
from flowlik_models.files import kept_until_done
from flowlik_models.numerics import random
from flowlik_models.numerics.reparametrised_time import NEAR_NOISE
from flowlik_models.numerics.streams import PROBE_STREAM

ITEMS = 500
STEPS, HALVED = 96, 192
"""On the mixture fitted to Fashion-MNIST, whose likelihood is known, 64 steps are 0.0011 bits/dim off on test images
(root mean square, 24 of them), 128 steps 0.00007; the digits, with ten times the noise, need fewer."""

STDERR = 0.005
CHUNK = 50
PILOT_ITEMS = 8
JUDGED_ITEMS = 8
JUDGED_PROBES = 4


@dataclass(frozen=True, kw_only=True)
class _Teacher:
    """The teacher and how its likelihood is taken; `nats` are those of one bit/dim."""

    task: Task
    model: Any
    device: str
    end: float
    target_stderr: float
    parts: Path
    progress: Say

    @property
    def nats(self) -> float:
        return self.task.dim * math.log(2.0)


def converge(
    task: Task, folder: Path, device: str, n: int | None, target_stderr: float | None, progress: Say
) -> Path:
    """Compute the reference of a task and write it to `folder`; the path of its card.

    Args:
        task: a task whose reference is a trained field.
        folder: where to write; partial results of an interrupted call are stored there and used.
        device: where the teacher runs.
        n: items a split, default 500; so many draws of the teacher are kept, too.
        target_stderr: standard error of an item in bits/dim, default 0.005.
        progress: called with lines of text.

    Raises:
        ValueError: an error that is not above 0, or a check that failed. UnavailableError: no teacher, or no data.
    """
    n, target_stderr = ITEMS if n is None else n, STDERR if target_stderr is None else target_stderr
    if not target_stderr > 0:
        raise ValueError(f"--stderr {target_stderr}: expected bits/dim above 0")
    model, model_hash = load(task.id, task.reference_model, device, "float32")
    parts = folder / f"{task.id}-{model_hash}-{target_stderr:g}-parts"
    end = 1.0 - float(getattr(model, "eps", 0.0))
    teacher = _Teacher(
        task=task,
        model=model,
        device=device,
        end=end,
        target_stderr=target_stderr,
        parts=parts,
        progress=progress,
    )
    check_standard_source(task.id, model)
    with kept_until_done(parts):
        samples = cards.teacher_samples(task, model, n, parts, progress)
        few, given = points_of(task, "teacher-samples", PILOT_ITEMS, samples)
        field = conditioned(model, first(given, len(few), device))
        plan = pilot(field, few.to(device), STEPS, end, target_stderr * teacher.nats)
        progress(plan.words())
        card = _how(teacher, model_hash, plan, n) | {"splits": {}, "checks": []}
        arrays: dict[str, Any] = {"teacher_samples": samples.numpy()}
        for split in task.splits:
            x, cond = points_of(task, split, n, samples)
            found = _partial_results(teacher, x, cond, split, plan)
            arrays[f"{split}_log_prob"] = found.log_prob.astype(np.float32)
            arrays[f"{split}_stderr"] = found.stderr.astype(np.float32)
            summary, checks = _judged(teacher, split, x, cond, found)
            card["splits"][split] = summary
            card["checks"] += checks
            progress(
                f"{split}: {summary['bpd_mean']:.4f} bits/dim, standard error {summary['stderr_bpd_mean']:.2g}"
            )
        file = folder / f"{task.id}.npz"
        write_arrays(file, arrays)
        card["arrays_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        return cards.write_card(folder / f"{task.id}.json", card)


def _how(teacher: _Teacher, model_hash: str, plan: Plan, n: int) -> dict[str, Any]:
    """What a card says before anything is computed."""
    task = teacher.task
    return {
        "schema": cards.SCHEMA,
        "task": task.id,
        "model": task.reference_model,
        "model_hash": model_hash,
        "ref_id": f"{task.reference_model}-rk4-{STEPS}-pooled",
        "how": (
            f"RK4, {STEPS} steps in log((t + {NEAR_NOISE})/(1 - t + {NEAR_DATA})), cubic spline through the "
            f"divergence, which fresh probes at every node give, pooled until an item's standard error is at most "
            f"{teacher.target_stderr:g} bits/dim, float32 network; error: of the probes and of the rule, "
            "added as squares"
        ),
        "probes": plan.words(),
        "teacher_samples": f"{n} draws by dopri5 at rtol = atol = 1e-6, seed {SAMPLES_SEED}",
        "t_end": teacher.end,
    }


def _partial_results(teacher: _Teacher, x: Tensor, cond: Tensor | None, split: str, plan: Plan) -> Pooled:
    """The values of all items; each partial result is stored on disk, so that an interrupted call goes on."""
    parts: list[Pooled] = []
    ids = torch.arange(len(x))
    for number, (chunk, items) in enumerate(zip(torch.split(x, CHUNK), torch.split(ids, CHUNK), strict=True)):
        given = first(cond, len(chunk), teacher.device, number * CHUNK)
        file = teacher.parts / f"{split}-{number}-{part_hash(chunk, given)}.npz"
        if not file.exists():
            found = pooled_log_prob(
                conditioned(teacher.model, given),
                chunk.to(teacher.device),
                items,
                plan,
                steps=STEPS,
                end=teacher.end,
                target_stderr=teacher.target_stderr * teacher.nats,
                key=seed_of(teacher.task.id, split, "pooled"),
            )
            write_arrays(file, {"log_prob": found.log_prob, "stderr": found.stderr, "probes": found.probes})
            worst = float(found.stderr.max()) / teacher.nats
            teacher.progress(
                f"{split}: {min(len(x), (number + 1) * CHUNK)} of {len(x)} items, standard error at most "
                f"{worst:.2g} bits/dim, {found.probes.mean():.0f} probes an item"
            )
        parts.append(Pooled(**read_arrays(file)))
    names = ("log_prob", "stderr", "probes")
    return Pooled(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def _judged(
    teacher: _Teacher, split: str, x: Tensor, cond: Tensor | None, found: Pooled
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a card says of a split, and its checks."""
    task, stderr = teacher.task, found.stderr / teacher.nats
    few = x[:JUDGED_ITEMS].to(teacher.device)
    given = first(cond, len(few), teacher.device)
    coarse, fine, adaptive = _with_one_set_of_probes(teacher, few, given)
    rule = float(np.abs((fine - coarse).mean(1)).mean()) / teacher.nats
    gap = float(np.abs(adaptive - coarse.mean(1)).mean()) / teacher.nats
    levels = None if split == "teacher-samples" else task.levels
    summary = {
        "n": len(x),
        **named(x, cond),
        "bpd_mean": float(accuracy.bits_per_dim(found.log_prob, task.dim, levels).mean()),
        "error_bpd": math.hypot(rule, float(np.sqrt(np.square(stderr).mean()))),
        "rule_error_bpd": rule,
        "stderr_bpd_mean": float(stderr.mean()),
        "stderr_bpd_max": float(stderr.max()),
        "probes_mean": float(found.probes.mean()),
    }
    same = f"the same {JUDGED_PROBES} probes"
    halving = f"{split}: mean distance of {STEPS} to {HALVED} steps with {same}, bits/dim"
    solving = f"{split}: mean distance to dopri5 at 1e-5 with {same}, bits/dim"
    largest = f"{split}: largest standard error of an item, bits/dim"
    return summary, [
        cards.check_finite(split, found.log_prob),
        cards.check(largest, float(stderr.max()), teacher.target_stderr),
        cards.check(halving, rule, cards.HALVING_LIMIT),
        cards.check(solving, gap, cards.ADAPTIVE_LIMIT),
    ]


def _with_one_set_of_probes(teacher: _Teacher, x: Tensor, cond: Tensor | None) -> tuple[Array, Array, Array]:
    """log p of x with probes that are kept along the path: by the rule in `STEPS` and `HALVED` steps, (batch, probes)
    each, and by an adaptive solver, (batch,)."""
    generator = torch.Generator().manual_seed(SAMPLES_SEED)
    key, ids = random.draw_key(torch.Generator().manual_seed(SAMPLES_SEED)), torch.arange(len(x))
    shape = (JUDGED_PROBES, *x.shape[1:])
    probes = random.rademacher(key, ids, shape, stream=PROBE_STREAM, dtype=x.dtype, device=x.device)
    kept, field = partial(hutchinson, probes=probes), conditioned(teacher.model, cond)
    coarse, fine = (log_prob_columns(field, x, steps, teacher.end, kept) for steps in (STEPS, HALVED))
    solver = get("ode", rtol=1e-5, atol=1e-5, trace="hutchinson", probes=JUDGED_PROBES)
    out = solver.log_prob(teacher.model, x, cond=cond, generator=generator, items=ids)
    return coarse, fine, np.asarray(out.log_prob.cpu().numpy())
