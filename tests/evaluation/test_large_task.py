"""A task of 64 x 64 colours, 12,288 dimensions, through the harness in at most 4 GB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sizes import figure

import flowlik

LIMIT = 4.0  # GB

TASK = '''
"""Pictures of N(0, 0.0625 I) in 256 levels, and the field and the joint map that are exact for it."""
import numpy as np, torch, flowlik

class Net(torch.nn.Module):
    event_shape = (3, 64, 64)

    def __init__(self):
        super().__init__()
        self.variance = torch.nn.Parameter(torch.tensor(0.0625))

    def velocity(self, x, t, *, cond=None):
        t = t[:, None, None, None]
        return (t * self.variance - (1 - t)) / (t**2 * self.variance + (1 - t) ** 2) * x

    def joint(self, x, t, s, *, cond=None):
        start, end = (torch.sqrt(u**2 * self.variance + (1 - u) ** 2) for u in (t, s))
        step = torch.where(s == t, torch.ones_like(s), s - t)
        return ((end / start - 1) / step)[:, None, None, None] * x, 12288 * torch.log(end / start) / step

rng = np.random.default_rng(0)
def pictures(n):
    return np.clip(np.round(128 + 32 * rng.standard_normal((n, 3, 64, 64), np.float32)), 0, 255).astype("uint8")

TASK = flowlik.ArrayTask(id="large", train=pictures(TRAIN), test=pictures(TEST), levels=256, models={"net": Net})
'''

PROGRAM = """
import json, resource, sys
from flowlik.cells import Cell, Options
from flowlik.running.run import run_cell
from flowlik_estimators import parse_spec

found = {}
for spec in ("ode[trace=hutchinson]", "f2d2[steps=1|2]"):
    for estimator in parse_spec(spec):
        options = Options(n_items=int(sys.argv[2]), batch_size=int(sys.argv[2]), rounds=1, samples=8)
        cell = Cell(task="large", task_file=sys.argv[1], model="net", estimator=estimator, options=options)
        row, _ = run_cell(cell)
        found[estimator.label] = [row["status"], row["bpd"], row["reason"]]
control = Cell(task="large", task_file=sys.argv[1], model="net", estimator="control-gaussian", options=options)
found["control-gaussian"] = [run_cell(control)[0][name] for name in ("status", "bpd", "reason")]
found["GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
print(json.dumps(found))
"""
BPD = 7.0470
"""log2(sqrt(2 pi e) 0.25) + log2(256/2), in bits/dim; noise and clipping add less than 0.01."""


def written(folder: Path, train: int, test: int) -> Path:
    file = folder / "large.py"
    file.write_text(TASK.replace("TRAIN", str(train)).replace("TEST", str(test)))
    return file


def test_12288_dimensions_by_ode_and_f2d2_and_the_control_stay_within_4_gb(tmp_path: Path) -> None:
    file = written(tmp_path, train=64, test=16)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(file), "16"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    memory = found.pop("GB")
    figure("memory of 16 items of 12,288 dimensions, ode and f2d2", f"{memory:.2f} GB", f"{LIMIT} GB")
    for label, (status, bpd, reason) in found.items():
        assert status == "ok", (label, reason)
        assert bpd == pytest.approx(BPD, abs=0.02), label
    assert memory < LIMIT


@pytest.mark.slow
def test_a_thousand_items_of_12288_dimensions_run_from_the_command_line_within_4_gb(tmp_path: Path) -> None:
    file = written(tmp_path, train=2048, test=1000)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "flowlik",
        "run",
        "-t",
        str(file),
        "--memory",
        f"{LIMIT:g}G",
        "--no-report",
    ]
    subprocess.run([*command, "--out", str(tmp_path / "run")], env=environment, check=True)
    records = flowlik.read_records(tmp_path / "run" / "records.jsonl")
    mine = records[~records["estimator"].str.startswith("control")]
    assert set(mine["status"]) == {"ok"}, mine["reason"].tolist()
    assert mine["bpd"].to_numpy() == pytest.approx(BPD, abs=0.02)
    peak = float(records["peak_bytes"].max()) / 1e9
    figure("memory of 1,000 items of 12,288 dimensions", f"{peak:.2f} GB", f"{LIMIT} GB")
    assert peak < LIMIT


@pytest.mark.slow
def test_12288_dimensions_are_scored_within_4_gb(tmp_path: Path) -> None:
    file = written(tmp_path, train=64, test=48)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = (
        "import resource; from flowlik.cli import app; app(standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)"
    )
    command = [sys.executable, "-c", program, "score", str(file), "--out", str(tmp_path / "scores")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    *_, line, memory = done.stdout.splitlines()
    figure("memory of a score of 12,288 dimensions", f"{float(memory):.2f} GB", f"{LIMIT} GB")
    assert float(line.split(": ")[1].split()[0]) == pytest.approx(BPD, abs=0.02)
    assert float(memory) < LIMIT
