"""Every executor gives the same records; what it costs beside the cells."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from finished_runs import assert_same_run, lines, table
from hostile import Hostile
from sizes import figure, size

from flowlik.cells import Cell, Options
from flowlik.records.columns import COLUMNS
from flowlik.records.reading import read_records
from flowlik.records.writing import to_line
from flowlik.running.executor import Executor, Setup
from flowlik.running.registry import make_executor
from flowlik.running.run import run_cells
from flowlik_estimators import parse_spec

NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'flowlik[ray]'"
)
WORKERS = 2
SWEEP = size(60, 10_000)
TINY = Options(n_items=2, batch_size=2, rounds=0)


def sweep(count: int) -> list[Cell]:
    """Cells that cost next to nothing and differ in their seeds."""
    cell = Cell(task="gaussian-2d", model="closed-form", estimator=Hostile(), options=TINY)
    return [cell.with_options(seed=seed) for seed in range(count)]


def several() -> list[Cell]:
    options = Options(n_items=40, batch_size=16, rounds=0)
    specs = ("f2d2[steps=1|2|3]", "ode[solver=heun,steps=2,trace=hutchinson,probes=2]", "ode[max_nfe=3]")
    cells = [
        Cell(task="gaussian-2d", model="closed-form", estimator=estimator, options=options)
        for spec in specs
        for estimator in parse_spec(spec)
    ]
    return [*cells, *(cell.with_options(rounds=1, seed=7) for cell in cells[:2])]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray of two workers, which stays between the tests."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(
        num_cpus=WORKERS,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()


def ray_executor(**limits: Any) -> Executor:
    return make_executor("ray", Setup(**limits))


def seconds_of(cells: list[Cell], out: Path, executor: Executor) -> float:
    """Seconds that the cells take, the start of the workers apart."""
    outcomes = run_cells(cells, out, executor=executor)
    next(outcomes)
    begun = time.monotonic()
    assert len(list(outcomes)) == len(cells) - 1
    return time.monotonic() - begun


def overhead(name: str, executor: Executor, out: Path, goal: str) -> None:
    """All cells of a sweep, that take next to no time themselves, get a record; prints the seconds a cell."""
    cells = sweep(SWEEP)
    seconds = seconds_of(cells, out, executor)
    assert len(lines(out)) == len(cells)
    told = f"{1e3 * seconds / (len(cells) - 1):.1f} ms over {len(cells)} cells"
    figure(f"overhead per cell, {name}", told, goal)


@pytest.fixture(scope="module")
def serial_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serial")
    list(run_cells(several(), out))
    return out


def test_the_worker_process_gives_the_records_of_this_process(serial_run: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    list(run_cells(several(), tmp_path, executor=make_executor("serial", Setup(cores=1))))
    assert_same_run(tmp_path, serial_run)
    figure(
        "seconds of a run of seven small cells, its worker's start included",
        f"{time.monotonic() - begun:.1f}",
    )


def test_harness_overhead_per_cell_serial(tmp_path: Path) -> None:
    executor = make_executor("serial", Setup(cores=1))
    overhead("serial", executor, tmp_path, "10 ms")


# --- Ray ----------------------------------------------------------------------------------------------------


@NEEDS_RAY
@pytest.mark.usefixtures("cluster")
def test_ray_gives_the_same_records_in_whatever_order(serial_run: Path, tmp_path: Path) -> None:
    list(run_cells(several(), tmp_path, executor=ray_executor()))
    assert_same_run(tmp_path, serial_run)


@NEEDS_RAY
@pytest.mark.usefixtures("cluster")
def test_ray_goes_on_where_a_run_stopped(serial_run: Path, tmp_path: Path) -> None:
    list(run_cells(several()[:3], tmp_path))
    outcomes = list(run_cells(several(), tmp_path, resume=True, executor=ray_executor()))
    assert sum(outcome.row is None for outcome in outcomes) == 3
    assert_same_run(tmp_path, serial_run)


@NEEDS_RAY
@pytest.mark.usefixtures("cluster")
def test_lost_workers_and_limits_on_ray(tmp_path: Path) -> None:
    acts = [
        Hostile(act="crash_once", mark=str(tmp_path / "mark")),
        Hostile(act="lose_host_once", mark=str(tmp_path / "host")),
        Hostile(act="sleep"),
        Hostile(),
    ]
    cells = [replace(sweep(1)[0], estimator=act) for act in acts]
    list(run_cells(cells, tmp_path / "out", executor=ray_executor(timeout=15.0)))
    rows = {line["params"]["act"]: line for line in lines(tmp_path / "out")}
    assert {act: row["status"] for act, row in rows.items()} == {
        "crash_once": "ok",
        "lose_host_once": "ok",
        "sleep": "timeout",
        "nothing": "ok",
    }
    for act in ("crash_once", "lose_host_once"):
        assert rows[act]["extra"]["workers_lost"] == 1
        assert "tried again" in rows[act]["reason"]
    assert len(rows) == len(lines(tmp_path / "out"))


@NEEDS_RAY
@pytest.mark.usefixtures("cluster")
def test_harness_overhead_per_cell_on_ray(tmp_path: Path) -> None:
    overhead("Ray", ray_executor(), tmp_path, "50 ms")


@NEEDS_RAY
@pytest.mark.usefixtures("cluster")
def test_two_workers_give_the_records_of_one(tmp_path: Path) -> None:
    """Equal cells that only measure accuracy, with everything that a run takes, its workers' start included."""
    options = Options(n_items=size(50, 4000), batch_size=1000, rounds=0)
    (estimator,) = parse_spec("ode[solver=rk4,steps=200,trace=exact]")
    cell = Cell(task="gmm-2d", model="closed-form", estimator=estimator, options=options)
    cells = [cell.with_options(seed=seed) for seed in range(size(4, 24))]
    seconds = {}
    for name in ("serial", "ray"):
        begun = time.monotonic()
        list(run_cells(cells, tmp_path / name, executor=make_executor(name, Setup(cores=1))))
        seconds[name] = time.monotonic() - begun
    assert_same_run(tmp_path / "ray", tmp_path / "serial")
    ratio = seconds["ray"] / seconds["serial"]
    figure("Ray with two workers over serial", f"{ratio:.2f} ({seconds['serial']:.0f} s serial)", "0.6")


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'flowlik\[ray\]'"):
        make_executor("ray", Setup())
    with pytest.raises(ValueError, match="did you mean 'serial'"):
        make_executor("seriall", Setup())
    with pytest.raises(ValueError, match="add --executor ray"):
        make_executor("serial", Setup(), "auto")


# --- torchrun -----------------------------------------------------------------------------------------------

SHARDED = """
[defaults]
n_items = 50
batch_size = 8
rounds = 1
timing_batch = 8
[[cells]]
tasks = ["gaussian-2d"]
models = ["closed-form"]
estimators = ["ode[solver=heun,steps=2,trace=hutchinson,probes=2]", "f2d2[steps=2]", "meanflow[steps=1]"]
samples = 30
density = true
[[cells]]
tasks = ["gmm-2d"]
models = ["closed-form"]
estimators = ["f2d2", "ode[max_nfe=3]"]
"""


def test_one_cell_over_two_processes_has_the_records_of_one(tmp_path: Path) -> None:
    (tmp_path / "suite.toml").write_text(SHARDED)
    run = ["-m", "flowlik", "run", str(tmp_path / "suite.toml"), "--no-report", "--device", "cpu", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, how in (("one", [sys.executable]), ("two", torchrun)):
        done = subprocess.run(
            [*how, *run, str(tmp_path / name)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "[12/12]" in done.stdout, done.stderr
        assert done.stdout.count("refused") > 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert (table(tmp_path / "two")["status"] == "ok").sum() >= 4


# --- reading ------------------------------------------------------------------------------------------------


def test_many_records_are_all_read(tmp_path: Path) -> None:
    count = size(5000, 100_000)
    list(run_cells(several()[:1], tmp_path))
    row = lines(tmp_path)[0]
    assert list(row) == list(COLUMNS)
    with (tmp_path / "many.jsonl").open("wb") as file:
        file.writelines(
            to_line(row | {"cell_id": f"{number:016x}", "seed": number}) for number in range(count)
        )
    begun, cpu = time.monotonic(), time.process_time()
    frame = read_records(tmp_path / "many.jsonl")
    seconds, cpu = time.monotonic() - begun, time.process_time() - cpu
    figure(f"reading {count:,} records", f"{seconds:.1f} s ({cpu:.1f} s of CPU)", "5 s per 100,000")
    assert len(frame) == count
    assert isinstance(frame, pd.DataFrame)
    assert frame["seed"].tolist() == list(range(count))
