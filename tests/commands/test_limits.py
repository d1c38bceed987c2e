"""Limits are kept from outside a cell: one that hangs, crashes or takes too much ends alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hostile import Hostile

import flowlik
from flowlik.cells import Cell, Options
from flowlik.commands.units import parse_duration, parse_memory, parse_seeds
from flowlik.running import retries
from flowlik.running.executor import Claim, Setup
from flowlik.running.registry import make_executor
from flowlik.running.retries import Job, WorkerGoneError, again
from flowlik.running.run import run_cells
from flowlik.running.workers import descendants, process

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


def gone(mark: Path) -> bool:
    """Whether the process whose id is noted there is gone."""
    end = time.monotonic() + 120
    while descendants._is_running(int(mark.read_text())) and time.monotonic() < end:
        time.sleep(0.02)
    return not descendants._is_running(int(mark.read_text()))


def test_cells_that_fork_or_write_into_the_pipe_end_only_themselves(tmp_path: Path) -> None:
    mark, other = tmp_path / "daemon", tmp_path / "other"
    cells = [
        cell("fork_twice"),
        cell("write_into_pipes"),
        cell("daemon_and_crash_once", mark=str(mark)),
        cell("daemon", mark=str(other)),
        cell("nothing"),
    ]
    rows = run(cells, tmp_path / "run", timeout=parse_duration("600h"))
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok", "ok"]
    assert "wrote into the pipe" in rows[1]["reason"]
    assert "SIGSEGV" not in rows[2]["reason"]
    assert rows[2]["extra"]["workers_lost"] == 1  # though its child lived on
    assert gone(mark)
    assert gone(other)


def test_what_a_cell_started_dies_with_a_killed_run(tmp_path: Path) -> None:
    mark = tmp_path / "daemon"
    cells = [cell("daemon_and_sleep", mark=str(mark))]
    process = multiprocessing.get_context("fork").Process(target=run, args=(cells, tmp_path / "run"))
    process.start()
    end = time.monotonic() + 120
    while not (mark.is_file() and mark.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    process.kill()
    process.join()
    assert gone(mark)


def test_a_leak_is_not_charged_to_the_next_cell(tmp_path: Path) -> None:
    rows = run([cell("leak", amount=1300), cell("allocate", amount=60)], tmp_path, memory=2 * 10**9)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert "batch_size_used" not in rows[1]["extra"]
    assert rows[1]["reason"] is None


def test_waiting_for_a_cell_takes_none_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = [0.0]

    def wait(cell_id: str) -> Claim:
        waited[0] = 1e6
        return "run"

    for name in ("monotonic", "perf_counter"):
        clock = getattr(time, name)
        monkeypatch.setattr(time, name, lambda clock=clock: clock() + waited[0])
    executor = make_executor("serial", Setup(timeout=1e5))
    (result,) = executor.run([cell("nothing")], wait)
    executor.stop()
    assert result.row is not None
    assert result.row["status"] == "ok"
    assert result.seconds < 1e5


def test_memory_is_that_of_all_descendants_and_shared_pages_count_once() -> None:
    held = bytearray(os.urandom(1 << 20) * 200)
    before = descendants.memory(os.getpid(), 0)
    children: list[int] = []

    def fork_and_wait() -> None:
        if (child := os.fork()) == 0:
            time.sleep(900)
        children.append(child)
        os.waitpid(child, 0)

    thread = threading.Thread(target=fork_and_wait)
    thread.start()
    while not children:
        time.sleep(0.01)
    assert children[0] in descendants.descendants(os.getpid())
    assert descendants.memory(os.getpid(), 1 << 62) > before + len(held) // 2
    assert descendants.memory(os.getpid(), 0) < before + len(held) // 2
    os.kill(children[0], signal.SIGKILL)
    thread.join()


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


@pytest.mark.parametrize("text", ["", "8", "200M", "-8G", "8X", "1e3G", "9" * 400 + "G", "99999999T"])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="at least 1G"):
        parse_memory(text)
    assert parse_memory("1.5g") == 1_500_000_000


def test_any_duration_is_taken_or_refused_in_one_line() -> None:
    assert parse_duration("600h") == 2_160_000.0
    assert parse_duration("80000h") == 288_000_000.0
    for text in ("0", "-1s", "90000h", "9" * 400, "1e3", ""):
        with pytest.raises(
            ValueError, match=r"--timeout .*: expected a duration such as 90s, .* at most 87600h"
        ):
            parse_duration(text)


def test_seeds_are_bounded() -> None:
    assert parse_seeds("0-9999,7") == tuple(range(10_000))
    for text in ("0-1000000000", "0-" + "9" * 400, "9223372036854775808", "0-60000,100000-150000", "3-1"):
        with pytest.raises(ValueError, match="--seeds"):
            parse_seeds(text)
