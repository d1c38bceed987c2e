"""The executor that evaluates cells in this very process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flowlik.cells import Cell
from flowlik.evaluation.row import Row
from flowlik.running.executor import ClaimCell, Result, Setup
from flowlik.running.workers.worker import Worker

_LONGEST = 1e9  # seconds that the system's clock takes


class CellTimeoutError(BaseException):
    """A cell took longer than it was given; no Exception, so that nothing in a cell takes it for its own."""


class Inline:
    """Cells one after the other in this very process: for tests, gates and programs. Only `timeout` is kept."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def start(self) -> None:
        """Nothing to make ready."""

    def run(self, cells: Iterable[Cell], claim_cell: ClaimCell) -> Iterator[Result]:
        """As `Executor.run`, in order."""
        worker = Worker(self._setup)
        for cell in cells:
            begun = time.perf_counter()
            identity, row = worker.prepare(cell)
            asked = time.perf_counter()
            result = Result(
                cell=cell, cell_id=identity, claim=claim_cell(identity), environment=worker.environment
            )
            begun += time.perf_counter() - asked
            if result.claim == "run":
                result = replace(result, **self._within_time(worker, row))
            yield replace(result, seconds=time.perf_counter() - begun)

    def _within_time(self, worker: Worker, row: Row) -> dict[str, Any]:
        try:
            with time_limit(self._setup.timeout):
                row, arrays = worker.run()
        except CellTimeoutError as error:
            return {"row": row | {"status": "timeout", "reason": str(error)}}
        return {"row": row, "arrays": arrays}

    def stop(self) -> None:
        """Nothing to end."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise CellTimeoutError in the block after `seconds`; no limit where the system or the thread allows none."""
    usable = hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()
    if seconds is None or not usable:
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise CellTimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, _LONGEST))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
