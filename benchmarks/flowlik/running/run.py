"""The runner: cells in, records out, each written as soon as it is known, whichever executor runs them.

Several runs may share a folder: a cell is run by the one that has claimed it, and one that another run is busy with is
looked at again when all others are done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from flowlik.cells import Cell
from flowlik.evaluation.row import Arrays, Row
from flowlik.running.executor import Executor, Setup, new_run_id
from flowlik.running.inline import Inline
from flowlik.running.run_folder import Outcome, RunFolder


def run_cell(cell: Cell, *, timeout: float | None = None) -> tuple[Row, Arrays]:
    """Run one cell outside of a run (gates, tests): its whole row and its arrays; nothing is written."""
    setup = Setup(run_id="-", timeout=timeout)
    (result,) = Inline(setup).run([cell], lambda cell_id: "run")
    assert result.row is not None
    return result.row, result.arrays


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
        StorageError: the disk is full or cannot be written, and all rows that were yielded are safe; or the folder was
            removed in the meantime.
    """
    setup = Setup(run_id=run_id or new_run_id(), argv=None if argv is None else tuple(argv), timeout=timeout)
    executor = executor or Inline(setup)
    run_folder = RunFolder(out, resume=resume)
    try:
        executor.start()
        busy = []
        for result in executor.run(cells, run_folder.claim):
            if result.claim == "busy":
                busy.append(result.cell)
            else:
                yield run_folder.written(result)
        for cell in busy:
            for result in executor.run([cell], run_folder.claim_after_waiting):
                yield run_folder.written(result)
        run_folder.check()
    finally:
        executor.stop()
        run_folder.close()
