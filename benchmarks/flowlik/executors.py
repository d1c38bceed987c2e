"""Executors: where cells are run. Three methods, a table of names, and what all of them do about trouble.

An executor is given cells and yields what became of them, in any order; it neither reads nor writes records. Before a
cell is run, its id is known and the caller is asked whether it is wanted.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flowlik.words import unknown

if TYPE_CHECKING:  # a worker process is started before the libraries that these need are loaded
    from flowlik.cells import Cell
    from flowlik.filling import Arrays, Row

Wish = Literal["run", "done", "busy"]
Wanted = Callable[[str], Wish]
RETRIES = 1  # a worker may vanish once over a cell; the second time the cell is to blame


def new_run_id() -> str:
    """A run's id: the time it began and four random characters."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every worker of a run is told: the run's name and command line, and how much a cell may take.

    `timeout` in seconds, `memory` in bytes of the worker's process, `cores` processor cores a cell (default: as many
    threads as torch takes), `pieces` the folder where a worker on this machine keeps the finished pieces of a large
    cell (`flowlik.pieces`).
    """

    run_id: str = field(default_factory=new_run_id)
    argv: tuple[str, ...] | None = None
    timeout: float | None = None
    memory: int | None = None
    cores: int | None = None
    pieces: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a cell: its row where it ran, else None and why (`done` before, `busy` in another run)."""

    cell: Cell
    cell_id: str
    wish: Wish = "run"
    row: Row | None = None
    arrays: Arrays = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    seconds: float = 0.0


class Executor(Protocol):
    """Runs cells somewhere."""

    def start(self) -> None:
        """Begin to make workers ready; returns at once."""

    def run(self, cells: Iterable[Cell], wanted: Wanted) -> Iterator[Result]:
        """Run the cells whose ids are wanted; results as they come, one for every cell."""

    def stop(self) -> None:
        """End every worker, in the middle of a cell too, within a second; after it, `start` begins anew."""


# --- when a worker is gone ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PreparedCell:
    """What a worker says of a cell before it runs: its id, its row so far, and the worker's environment."""

    cell_id: str
    row: Row
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at a cell: `lost` workers are gone over it, and `batch_size` is where memory told it to begin."""

    cell: Cell
    lost: int = 0
    batch_size: int | None = None
    wish: Wish | None = None
    begun: float = field(default_factory=time.perf_counter)

    def asked(self, cell_id: str, wanted: Wanted) -> Job:
        """The same job with the caller's wish, which is asked for once."""
        return self if self.wish is not None else replace(self, wish=wanted(cell_id))


class WorkerGoneError(Exception):
    """A worker was ended over a cell, ended by itself (`lost`) or could not serve (`error`)."""

    def __init__(self, kind: Literal["timeout", "oom", "lost", "error"], message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


class WorkerStartError(Exception):
    """No worker can be started; the message is one line."""


def again(job: Job, gone: WorkerGoneError) -> Job | None:
    """The next attempt after a worker is gone: half the batch after memory ran out, once more after a loss, or None."""
    asked = job.batch_size or job.cell.options.batch_size
    items = job.cell.options.n_items
    batch = items if isinstance(asked, str) else min(asked, items)
    if gone.kind == "oom" and batch > 1 and not job.cell.is_control:
        return replace(job, batch_size=-(-batch // 2))
    if gone.kind == "lost" and job.lost < RETRIES:
        return replace(job, lost=job.lost + 1)
    return None


def given_up(job: Job, gone: WorkerGoneError, prepared: PreparedCell | None, setup: Setup) -> Result:
    """The result of a cell that is not tried again; where it was not even prepared, its row says no more than it."""
    row = _unprepared(job.cell, setup.run_id) if prepared is None else prepared.row
    row = row | {"status": "error" if gone.kind == "lost" else gone.kind, "reason": gone.message}
    environment = None if prepared is None else prepared.environment
    return _marked(Result(cell=job.cell, cell_id=row["cell_id"], row=row, environment=environment), job)


def _unprepared(cell: Cell, run_id: str) -> Row:
    from flowlik.cells import cell_id
    from flowlik.filling import blank_row
    from flowlik.preparing import Prepared
    from flowlik.tasks import get_task

    unknown = Prepared(cell=cell, cell_id=cell_id(cell, "", "", ""), task=get_task(cell.task))
    return blank_row(unknown, run_id, None)


def finished(job: Job, prepared: PreparedCell, ran: tuple[Row, Arrays] | None) -> Result:
    """The result of a job that came to its end; `ran` is None where it was not wanted."""
    assert job.wish is not None
    row, arrays = ran if ran is not None else (None, {})
    result = Result(cell=job.cell, cell_id=prepared.cell_id, wish=job.wish, row=row, arrays=arrays)
    return _marked(replace(result, environment=prepared.environment), job)


def _marked(result: Result, job: Job) -> Result:
    """The result with the time it took, and with a mark in its row where workers were lost over it."""
    result = replace(result, seconds=time.perf_counter() - job.begun)
    if result.row is None or not job.lost:
        return result
    told = f"{job.lost} worker{'s' * (job.lost > 1)} lost over this cell, which was tried again"
    row = result.row | {
        "reason": "; ".join(filter(None, (result.row["reason"], told))),
        "extra": result.row["extra"] | {"workers_lost": job.lost},
    }
    return replace(result, row=row)


# --- by name ------------------------------------------------------------------------------------------------


def make_executor(name: str, setup: Setup, address: str | None = None) -> Executor:
    """The executor of a name; under torchrun, `serial` is one cell at a time over all its processes.

    Raises:
        ValueError: an unknown name, or something asked for that it does not have.
    """
    if name not in EXECUTORS:
        raise ValueError(unknown("executor", name, tuple(EXECUTORS)))
    if address is not None and name != "ray":
        raise ValueError("--address is that of a Ray cluster: add --executor ray")
    return EXECUTORS[name](setup, address)


def is_follower() -> bool:
    """True in every process of torchrun but the first."""
    return int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _serial(setup: Setup, address: str | None) -> Executor:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from flowlik.sharding import Sharded

        return Sharded(setup)
    from flowlik.serial import Serial

    return Serial(setup)


def _ray(setup: Setup, address: str | None) -> Executor:
    from flowlik.cluster import RayExecutor

    return RayExecutor(setup, address=address)


EXECUTORS: dict[str, Callable[[Setup, str | None], Executor]] = {"serial": _serial, "ray": _ray}
