"""A run folder made of plausible numbers, for tests of what is drawn and printed; nothing in it was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.records.columns import COLUMNS

LN2 = math.log(2.0)
SHAPES = {"gmm-2d": 2, "checkerboard-2d": 2, "thin-2d": 2, "gmm-64d": 64, "digits": 64}
SHAPES |= {"fashion-mnist": 784, "cifar10": 3072}
LEVELS = {"digits": 17, "fashion-mnist": 256, "cifar10": 256}
EXTRACTOR = "digits classifier"


def write_fake_run(
    run_dir: Path,
    tasks: tuple[str, ...] = ("gmm-2d", "checkerboard-2d", "digits"),
    n: int = 200,
    seed: int = 0,
    splits: tuple[str, ...] = ("test", "teacher-samples", "train"),
    steps: tuple[int, ...] = (1, 2, 4, 8),
) -> Path:
    """Write records, items, environments and run.json of a made-up run; the folder. `splits` are those of images."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "items").mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for task in tasks:
        for split in splits if task in LEVELS else ("test",):
            rows += _task_rows(run_dir, task, split, n, rng, steps)
    rows.append(
        _row(tasks[0], "test", "f2d2[steps=4]", "teacher", status="refused", reason="needs a joint map")
    )
    rows.append(
        _row(tasks[0], "test", "ode[rtol=1e-09]", "teacher", status="timeout", reason="more than 60 s")
    )
    rows.append(
        _row(
            "cifar10", "test", "ode", "teacher", status="skipped", reason="no data: flowlik data get cifar10"
        )
    )
    write_rows(run_dir, rows)
    environment = {
        "env_id": "abc123",
        "commit": "0" * 40,
        "dirty": False,
        "torch": "2.13.0+cpu",
        "cpu": "a CPU",
    }
    (run_dir / "environments.jsonl").write_text(json.dumps({**environment, "threads": 1, "gpu": None}) + "\n")
    (run_dir / "run.json").write_text(
        json.dumps(
            {
                "argv": ["flowlik", "run"],
                "suite": "quick",
                "started": "2026-01-01T00:00:00Z",
                "finished": None,
            }
        )
    )
    return run_dir


def write_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as records.jsonl, NaN as null, as a run does."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({name: _plain(row.get(name)) for name in COLUMNS}) for row in rows]
    (run_dir / "records.jsonl").write_text("".join(line + "\n" for line in lines))


def record(**known: Any) -> dict[str, Any]:
    """One row with an identity and a status; everything else null unless given."""
    base: dict[str, Any] = {"schema_version": 1, "run_id": "fake", "repeat": 0, "seed": 0, "status": "ok"}
    base |= {"estimator": "f2d2", "estimator_label": "f2d2[steps=4]", "family": "joint-flow-map", "steps": 4}
    base |= {"task": "gmm-2d", "model": "meanflow-f2d2", "split": "test", "n_items": 100, "dim": 2}
    base |= {
        "batch_size": 100,
        "dtype": "float32",
        "device": "cpu",
        "params": {},
        "extra": {},
        "env_id": "abc123",
    }
    base |= known
    base.setdefault("cell_id", f"{abs(hash(tuple(map(str, base.values()))))}"[:16])
    return base


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(task: str, split: str, label: str, model: str, **known: Any) -> dict[str, Any]:
    name, _, inside = label.partition("[")
    params = dict(part.split("=") for part in inside.rstrip("]").split(",")) if inside else {}
    steps = params.get("steps")
    families = {"f2d2": "joint-flow-map", "meanflow": "flow-map", "ode": "ode"}
    row = record(
        cell_id=f"{task}_{split}_{model}_{label}".replace("[", "-")
        .replace("]", "")
        .replace("=", "")
        .replace(",", "_"),
        estimator=name,
        estimator_label=label,
        family=families.get(name, "control"),
        params=params,
        steps=int(steps) if steps else None,
        solver=params.get("solver", "dopri5") if name == "ode" else None,
        rtol=float(params.get("rtol", "1e-05")) if name == "ode" and not steps else None,
        trace=params.get("trace", "exact") if name in ("ode", "meanflow") else None,
        task=task,
        split=split,
        model=model,
        dim=SHAPES.get(task, 64),
    )
    return row | known


def _cells(task: str, steps: tuple[int, ...]) -> list[tuple[str, str, float, float, float, float]]:
    """(label, model, bias, noise, nfe, work) of the methods of a task."""
    trained = "teacher" if task in LEVELS else "closed-form"
    hard = 1.0 if task in LEVELS or task == "thin-2d" else 0.15
    cells = [
        ("ode[rtol=0.001,atol=0.001]", trained, 2e-3, 3e-3, 44.0, 108.0),
        ("ode", trained, 1e-5, 2e-5, 80.0, 214.0),
        ("ode[trace=hutchinson,probes=4]", trained, 1e-3, 0.08, 80.0, 400.0),
    ]
    for n in steps:
        cells.append((f"ode[solver=euler,steps={n}]", trained, 2.0 * hard / n, 0.4 * hard / n, n, 3 * n))
        cells.append(
            (f"ode[solver=rk4,steps={n}]", trained, 0.3 * hard / n**2, 0.2 * hard / n**2, 4 * n, 12 * n)
        )
        cells.append((f"meanflow[steps={n}]", "meanflow", -110.0 * hard / n, 9.0 * hard / n, n, 3 * n))
        cells.append((f"f2d2[steps={n}]", "meanflow-f2d2", 0.02 / n, 0.05 / math.sqrt(n), n, n))
        cells.append((f"f2d2[steps={n}]", "meanflow-f2d2-plain", 0.04, 0.13 / math.sqrt(n), n, n))
    return cells


def _task_rows(
    run_dir: Path, task: str, split: str, n: int, rng: np.random.Generator, steps: tuple[int, ...]
) -> list[dict[str, Any]]:
    dim = SHAPES[task]
    levels = math.log2(LEVELS[task] / 2) if task in LEVELS else 0.0
    centre = {"digits": 1.9, "gmm-2d": 1.54, "checkerboard-2d": 2.5, "thin-2d": -0.28}.get(task, 0.0)
    spread = 0.0 if task == "checkerboard-2d" else 0.3
    ref = centre + spread * rng.standard_normal(n)
    truth = {
        "ref_id": "teacher, 64 nodes, exact trace" if task in LEVELS else "closed form",
        "ref_se": 1e-4,
    }
    rows = []
    for label, model, bias, noise, nfe, work in _cells(task, steps):
        bpd = ref + bias + noise * rng.standard_normal(n)
        error = bpd - ref
        row = _row(
            task, split, label, model, n_items=n, eps=1e-3 if task == "checkerboard-2d" else 0.0, **truth
        )
        mae = float(np.mean(np.abs(error)))
        half = 2 * float(np.std(np.abs(error))) / math.sqrt(n)
        seconds = 2e-4 * work * (1 + dim / 64)
        row |= {"nfe_mean": nfe, "nfe_max": nfe + 2, "vjp_mean": work - nfe, "jvp_mean": 0.0, "work": work}
        row |= {"wall_s_median": seconds, "wall_s_iqr": seconds / 20, "rounds": 5, "items_per_s": n / seconds}
        row |= {"forward_equivalents": 0.9 * nfe + 1.7 * (work - nfe), "peak_bytes": 3e8}
        row |= {
            "bpd": float(bpd.mean()),
            "bpd_se": float(bpd.std() / math.sqrt(n)),
            "bpd_ref": float(ref.mean()),
        }
        row |= {"bpd_error": float(error.mean()), "bpd_error_lo": float(error.mean()) - half}
        row |= {"bpd_error_hi": float(error.mean()) + half, "bpd_mae": mae, "bpd_mae_lo": mae - half}
        row |= {
            "bpd_mae_hi": mae + half,
            "bpd_rmse": 1.2 * mae,
            "bpd_err_p95": 2.5 * mae,
            "invalid_share": 0.0,
        }
        row["spearman"] = float(np.corrcoef(ref, bpd)[0, 1]) if spread else None
        arrays: dict[str, NDArray[Any]] = {
            "log_prob": -(bpd - levels) * dim * LN2,
            "ref": -(ref - levels) * dim * LN2,
            "valid": np.ones(n, dtype=bool),
        }
        if dim == 2:
            arrays |= _density(task, bias)
            row |= {"mass": math.exp(-min(bias, 3.0) * dim * LN2), "mass_se": None}
        if task in LEVELS and "euler" not in label and split == "test":
            extractor = EXTRACTOR.replace("digits", task)
            row |= {"frechet": 3.0 + 40.0 / nfe, "frechet_se": 0.4, "extractor": extractor, "n_samples": 1000}
            arrays["samples"] = np.clip(rng.standard_normal((64, 1, 8, 8)) * 0.3, -1, 1).astype(np.float32)
        np.savez(run_dir / "items" / f"{row['cell_id']}.npz", **arrays)
        rows.append(row)
    for name, mae in (("control-mean", 0.24), ("control-gaussian", 0.31), ("control-component", 0.24)):
        row = _row(task, split, name, "", n_items=n, nfe_mean=0.0, bpd=centre, bpd_ref=centre, **truth)
        known = {"bpd_mae": mae if spread else 0.0, "bpd_mae_lo": mae, "bpd_mae_hi": mae, "bpd_error": 0.0}
        rows.append(row | known)
    return rows


def _density(task: str, bias: float) -> dict[str, NDArray[Any]]:
    grid = np.linspace(-4, 4, 65)
    centres = (grid[1:] + grid[:-1]) / 2
    x, y = np.meshgrid(centres, centres)
    if task == "checkerboard-2d":
        inside = (np.floor(x / 2) + np.floor(y / 2)) % 2 == 0
        truth = np.where(inside, -math.log(32), -np.inf)
    else:
        angles = np.arange(8) * math.pi / 4
        parts = [-((x - 3 * math.cos(a)) ** 2 + (y - 3 * math.sin(a)) ** 2) / (2 * 0.15) for a in angles]
        truth = np.logaddexp.reduce(parts) - math.log(8 * 2 * math.pi * 0.15)
    return {"density": truth - bias * 2 * LN2, "density_ref": truth, "grid_x": centres, "grid_y": centres}
