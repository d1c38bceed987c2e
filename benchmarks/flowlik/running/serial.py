"""The serial executor: one cell at a time, in a worker process that is kept over cells and ended when one oversteps.

The limits hold whatever a cell does, since they are kept from outside. A worker that was ended is replaced; what it
costs is written in docs/scale.md.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from flowlik.running.executor import ClaimCell, Result, Setup
from flowlik.running.retries import Job, WorkerGoneError, again, finished, given_up
from flowlik.running.workers.process import WorkerProcess

if TYPE_CHECKING:
    from flowlik.cells import Cell


class Serial:
    """One worker process; see the module."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: WorkerProcess | None = None

    def start(self) -> None:
        """Start the worker process, which then loads its libraries while the caller goes on."""
        if self._worker is None:
            self._worker = WorkerProcess(self._setup)

    def run(self, cells: Iterable[Cell], claim_cell: ClaimCell) -> Iterator[Result]:
        """As `Executor.run`, in order."""
        for cell in cells:
            self._ready()  # that takes no cell's time
            job: Job | None = Job(cell=cell)
            while job is not None:
                job, result = self._attempt(job, claim_cell)
            yield result

    def _ready(self) -> WorkerProcess:
        if self._worker is not None and self._worker.is_spoilt:
            self.stop()  # the doing of an earlier cell
        self.start()
        assert self._worker is not None
        self._worker.wait()
        return self._worker

    def _attempt(self, job: Job, claim_cell: ClaimCell) -> tuple[Job | None, Result]:
        """The next job, None where there is none, and what is known of this one."""
        worker = self._ready()
        try:
            prepared = worker.prepare(pickle.dumps(job.cell))
            job = job.asked(prepared.cell_id, claim_cell)
            ran = worker.run(job.batch_size) if job.claim == "run" else None
            return None, finished(job, prepared, ran)
        except WorkerGoneError as gone:
            self.stop()
            return again(job, gone), given_up(job, gone, worker.prepared, self._setup)

    def stop(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None
