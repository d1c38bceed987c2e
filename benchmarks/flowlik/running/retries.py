"""What an executor does when a worker is gone: another attempt, or a row that says why there is none."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from flowlik.running.executor import Claim, ClaimCell, Result, Setup

if TYPE_CHECKING:
    from flowlik.cells import Cell
    from flowlik.evaluation.row import Arrays, Row

RETRIES = 1  # a worker may vanish once over a cell; the second time the cell is to blame


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
    claim: Claim | None = None
    begun: float = field(default_factory=time.perf_counter)

    def asked(self, cell_id: str, claim_cell: ClaimCell) -> Job:
        """The same job with the caller's claim, which is asked for once; waiting for it is no time of the cell's."""
        if self.claim is not None:
            return self
        asked = time.perf_counter()
        claim = claim_cell(cell_id)
        return replace(self, claim=claim, begun=self.begun + time.perf_counter() - asked)


class WorkerGoneError(Exception):
    """A worker was ended over a cell, ended by itself (`lost`), could not serve (`error`), or ran out of memory that
    earlier cells may hold (`used`)."""

    def __init__(self, kind: Literal["timeout", "oom", "used", "lost", "error"], message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message


class WorkerStartError(Exception):
    """No worker can be started; the message is one line."""


def again(job: Job, gone: WorkerGoneError) -> Job | None:
    """The next attempt after a worker is gone: half the batch after memory ran out in a new worker, the same in a new
    one where it was not new, once more after a loss, or None."""
    if gone.kind == "used":
        return replace(job, begun=time.perf_counter())
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
    from flowlik.evaluation.prepare import Prepared
    from flowlik.evaluation.row import blank_row
    from flowlik.tasks.registry import get_task

    unknown = Prepared(cell=cell, cell_id=cell_id(cell, "", "", ""), task=get_task(cell.task))
    return blank_row(unknown, run_id, None)


def finished(job: Job, prepared: PreparedCell, ran: tuple[Row, Arrays] | None) -> Result:
    """The result of a job that came to its end; `ran` is None where the cell was not claimed."""
    assert job.claim is not None
    row, arrays = ran if ran is not None else (None, {})
    result = Result(cell=job.cell, cell_id=prepared.cell_id, claim=job.claim, row=row, arrays=arrays)
    return _marked(replace(result, environment=prepared.environment), job)


def _marked(result: Result, job: Job) -> Result:
    """The result with the time it took, and with a mark in its row where workers were lost over it."""
    result = replace(result, seconds=time.perf_counter() - job.begun)
    if result.row is None or not job.lost:
        return result
    note = f"{job.lost} worker{'s' * (job.lost > 1)} lost over this cell, which was tried again"
    row = result.row | {
        "reason": "; ".join(filter(None, (result.row["reason"], note))),
        "extra": result.row["extra"] | {"workers_lost": job.lost},
    }
    return replace(result, row=row)
