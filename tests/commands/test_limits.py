"""Limits are kept from outside a cell: one that hangs, crashes or takes too much ends alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile import Hostile

import flowlik
from flowlik.cells import Cell, Options
from flowlik.commands.units import parse_memory
from flowlik.running import retries
from flowlik.running.executor import Setup
from flowlik.running.registry import make_executor
from flowlik.running.retries import Job, WorkerGoneError, again
from flowlik.running.run import run_cells
from flowlik.running.workers import process

SMALL = Options(n_items=16, batch_size=16, rounds=0)


def cell(act: str, **params: Any) -> Cell:
    return Cell(task="gaussian-2d", model="closed-form", estimator=Hostile(act=act, **params), options=SMALL)


def run(cells: list[Cell], out: Path, **limits: Any) -> list[dict[str, Any]]:
    executor = make_executor("serial", Setup(**limits))
    outcomes = list(run_cells(cells, out, executor=executor))
    assert [outcome.cell for outcome in outcomes] == cells
    rows = [outcome.row for outcome in outcomes]
    assert flowlik.read_records(out)["cell_id"].tolist() == [row["cell_id"] for row in rows if row]
    return [row for row in rows if row]


def test_a_cell_that_hangs_or_crashes_ends_alone(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    rows = run(
        [cell("nothing"), cell("sleep"), cell("crash_once", mark=str(mark)), cell("crash")],
        tmp_path / "run",
        timeout=6.0,
    )
    assert [row["status"] for row in rows] == ["ok", "timeout", "ok", "error"]
    assert rows[1]["reason"] == "took longer than 6 s"
    assert rows[1]["model_hash"] == rows[0]["model_hash"]
    assert rows[2]["extra"]["workers_lost"] == 1
    assert "1 worker lost" in rows[2]["reason"]
    assert "SIGSEGV" in rows[3]["reason"]
    assert "tried again" in rows[3]["reason"]


def test_memory_that_runs_out_halves_the_batch_and_says_so(tmp_path: Path) -> None:
    rows = run(
        [cell("allocate", amount=250), cell("creep", amount=180), cell("nothing")],
        tmp_path,
        memory=2 * 10**9,
    )
    assert [row["status"] for row in rows] == ["ok"] * 3
    for row in rows[:2]:
        assert row["batch_size"] == 16
        assert row["extra"]["batch_size_used"] in (4, 8)
        assert "halved from 16" in row["reason"]
    assert "batch_size_used" not in rows[2]["extra"]


def test_what_follows_when_a_worker_is_gone() -> None:
    job = Job(cell=cell("nothing").with_options(batch_size=100))
    halved = again(job, WorkerGoneError("oom", ""))
    assert halved is not None
    assert halved.batch_size == 8  # 16 items in a batch of 100
    assert again(Job(cell=job.cell, batch_size=1), WorkerGoneError("oom", "")) is None
    assert again(job, WorkerGoneError("timeout", "")) is None
    once = again(job, WorkerGoneError("lost", ""))
    assert once is not None
    assert again(once, WorkerGoneError("lost", "")) is None


def test_a_worker_that_cannot_start_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    with pytest.raises(retries.WorkerStartError, match="cannot start"):
        list(run_cells([cell("nothing")], tmp_path, executor=make_executor("serial", Setup())))


@pytest.mark.parametrize("text", ["", "8", "200M", "-8G", "8X", "1e3G"])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at least 1G"):
        parse_memory(text)
    assert parse_memory("1.5g") == 1_500_000_000
