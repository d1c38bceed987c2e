"""The runner: cells in, records out, each written as soon as it is known, whichever executor runs them.

Several runs may share a folder: a cell is run by the one that has claimed it, and one that another run is busy with is
looked at again when all others are done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlik import journal
from flowlik.cells import Cell
from flowlik.executors import Executor, Result, Setup, Wish, new_run_id
from flowlik.filling import Arrays, Row
from flowlik.preparing import load
from flowlik.records import FINISHED, append_line, latest_rows, to_plain, write_arrays
from flowlik.station import Inline

__all__ = ["Outcome", "load", "new_run_id", "run_cell", "run_cells"]


def run_cell(cell: Cell, *, timeout: float | None = None) -> tuple[Row, Arrays]:
    """Run one cell outside of a run (gates, tests): its whole row and its arrays; nothing is written."""
    setup = Setup(run_id="-", timeout=timeout)
    (result,) = Inline(setup).run([cell], lambda cell_id: "run")
    assert result.row is not None
    return result.row, result.arrays


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one cell; `row` is None where a resumed run, or another run beside this one, had it already."""

    cell: Cell
    row: Row | None
    seconds: float


def run_cells(
    cells: Sequence[Cell],
    out: Path,
    *,
    run_id: str | None = None,
    argv: Sequence[str] | None = None,
    resume: bool = False,
    timeout: float | None = None,
    executor: Executor | None = None,
) -> Iterator[Outcome]:
    """Run cells into the folder `out`; each row is on disk before its outcome is yielded.

    Args:
        cells: what to run.
        out: the run's folder; it gets `records.jsonl`, `environments.jsonl` and `items/`.
        run_id: name of the run, default a new one.
        argv: the command line to note in the environment.
        resume: leave out cells that already have a final row in `out`.
        timeout: seconds a cell may take.
        executor: where the cells run, stopped at the end; default this process, which `run_id`, `argv` and `timeout`
            are for.

    Raises:
        StorageError: the disk is full or cannot be written; all rows that were yielded are safe.
    """
    setup = Setup(run_id=run_id or new_run_id(), argv=None if argv is None else tuple(argv), timeout=timeout)
    executor = executor or Inline(setup)
    book = Book(out, resume=resume)
    try:
        executor.start()
        busy = []
        for result in executor.run(cells, book.wish):
            if result.wish == "busy":
                busy.append(result.cell)
            else:
                yield book.written(result)
        for cell in busy:
            for result in executor.run([cell], book.wish_after_waiting):
                yield book.written(result)
    finally:
        executor.stop()
        book.close()


class Book:
    """A folder's records: what is done there, by this run or another one, and where new rows go."""

    def __init__(self, out: Path, *, resume: bool) -> None:
        self._out = out
        self._claims = journal.Claims(out)
        self._done: set[str] = set()
        self._read = 0
        self._environments: set[str] = set()
        before = self._new_rows()
        if resume:
            self._done |= before
        with suppress(FileNotFoundError):
            rows, _ = journal.read(out / "environments.jsonl")
            self._environments |= {str(row.get("env_id")) for row in rows}

    def wish(self, cell_id: str) -> Wish:
        """Whether a cell is to be run now; if so it is claimed."""
        return self._wish(cell_id, wait=False)

    def wish_after_waiting(self, cell_id: str) -> Wish:
        """The same, once any other run is through with the cell."""
        return self._wish(cell_id, wait=True)

    def _wish(self, cell_id: str, *, wait: bool) -> Wish:
        if cell_id in self._done:
            return "done"
        if not self._claims.take(cell_id, wait=wait):
            return "busy"
        self._done |= self._new_rows()
        if cell_id in self._done:
            self._claims.drop(cell_id)
            return "done"
        return "run"

    def _new_rows(self) -> set[str]:
        """Cells that anybody finished since this was last asked."""
        try:
            rows, self._read = journal.read(self._out / "records.jsonl", self._read)
        except FileNotFoundError:
            return set()
        return {row["cell_id"] for row in latest_rows(rows) if row["status"] in FINISHED}

    def written(self, result: Result) -> Outcome:
        """Write what came of a cell, and let it go."""
        row = result.row
        if row is None:
            return Outcome(cell=result.cell, row=None, seconds=result.seconds)
        if result.environment is not None:
            self._note(result.environment)
        if result.arrays:
            with journal.storage(self._out):
                write_arrays(self._out / "items" / f"{result.cell_id}.npz", result.arrays)
        row = row | {"extra": row["extra"] | {"cell_s": round(result.seconds, 3)}}
        append_line(self._out / "records.jsonl", row)
        if row["status"] in FINISHED:
            shutil.rmtree(self._out / journal.PIECES / result.cell_id, ignore_errors=True)
            with suppress(OSError):  # others may be there, or none ever were
                (self._out / journal.PIECES).rmdir()
        self._done.add(result.cell_id)
        self._claims.drop(result.cell_id)
        return Outcome(cell=result.cell, row=to_plain(row), seconds=result.seconds)

    def _note(self, environment: Mapping[str, Any]) -> None:
        if environment["env_id"] not in self._environments:
            append_line(self._out / "environments.jsonl", environment)
            self._environments.add(environment["env_id"])

    def close(self) -> None:
        """Let every cell go."""
        self._claims.close()
