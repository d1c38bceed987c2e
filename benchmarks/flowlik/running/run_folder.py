"""A run's folder: what is done there, who works on what, and where new rows go."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowlik.cells import Cell
from flowlik.evaluation.row import Row
from flowlik.records import claims, journal
from flowlik.records.columns import FINISHED
from flowlik.records.reading import latest_rows
from flowlik.records.writing import append_line, to_line, to_plain, write_arrays
from flowlik.running.executor import Claim, Result
from flowlik_models.files import remove_leftovers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one cell; `row` is None where a resumed run, or another run beside this one, had it already."""

    cell: Cell
    row: Row | None
    seconds: float


class RunFolder:
    """A folder's records: what is done there, by this run or another one, and where new rows go."""

    def __init__(self, out: Path, *, resume: bool) -> None:
        self._out = out
        self._claims = claims.Claims(out)
        remove_leftovers(out)
        self._done: set[str] = set()
        self._read = 0
        self._end = 0
        self._environments: set[str] = set()
        before = self._new_rows()
        if resume:
            self._done |= before
        with suppress(FileNotFoundError):
            rows, _ = journal.read(out / "environments.jsonl")
            self._environments |= {str(row.get("env_id")) for row in rows}

    def claim(self, cell_id: str) -> Claim:
        """Whether a cell is to be run now; if so it is claimed."""
        return self._claim(cell_id, wait=False)

    def claim_after_waiting(self, cell_id: str) -> Claim:
        """The same, once any other run is through with the cell."""
        return self._claim(cell_id, wait=True)

    def _claim(self, cell_id: str, *, wait: bool) -> Claim:
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
        self.check()
        if row is None:
            return Outcome(cell=result.cell, row=None, seconds=result.seconds)
        if result.environment is not None:
            self._note(result.environment)
        if result.arrays:
            with journal.storage(self._out):
                write_arrays(self._out / "items" / f"{result.cell_id}.npz", result.arrays)
        row = row | {"extra": row["extra"] | {"cell_s": round(result.seconds, 3)}}
        self._end = journal.append(self._out / "records.jsonl", to_line(row))
        self.check()
        if row["status"] in FINISHED:
            shutil.rmtree(self._out / journal.PARTIAL_RESULTS / result.cell_id, ignore_errors=True)
            with suppress(OSError):  # others may be there, or none ever were
                (self._out / journal.PARTIAL_RESULTS).rmdir()
        self._done.add(result.cell_id)
        self._claims.drop(result.cell_id)
        return Outcome(cell=result.cell, row=to_plain(row), seconds=result.seconds)

    def check(self) -> None:
        """Raise StorageError where the folder, or records of this run in it, were removed in the meantime."""
        file = self._out / "records.jsonl"
        size = file.stat().st_size if self._end and file.is_file() else 0
        if not self._claims.folder_is_there or size < self._end:
            raise journal.StorageError(
                f"{self._out} was removed or replaced during the run, and records with it: "
                "the same command with --resume runs what is missing"
            )

    def _note(self, environment: Mapping[str, Any]) -> None:
        if environment["env_id"] not in self._environments:
            append_line(self._out / "environments.jsonl", environment)
            self._environments.add(environment["env_id"])

    def close(self) -> None:
        """Let every cell go."""
        self._claims.close()
