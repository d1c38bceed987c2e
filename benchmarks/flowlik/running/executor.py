"""Executors: where cells are run. Three methods, a table of names, and what all of them do about trouble.

An executor is given cells and yields what became of them, in any order; it neither reads nor writes records. Before a
cell is run, its id is known and the caller claims it, or says that it is done or busy elsewhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from flowlik.cells import Cell
    from flowlik.evaluation.row import Arrays, Row

Claim = Literal["run", "done", "busy"]
ClaimCell = Callable[[str], Claim]


def new_run_id() -> str:
    """A run's id: the time it began and four random characters."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:4]}"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every worker of a run is told: the run's name and command line, and how much a cell may take.

    `timeout` in seconds, `memory` in bytes of the worker's process, `cores` processor cores a cell (default: as many
    threads as torch takes), `partial_results` the folder where a worker on this machine keeps the partial
    results of a large cell (`flowlik.evaluation.batching.partial_results`).
    """

    run_id: str = field(default_factory=new_run_id)
    argv: tuple[str, ...] | None = None
    timeout: float | None = None
    memory: int | None = None
    cores: int | None = None
    partial_results: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a cell: its row where it ran, else None and why (`done` before, `busy` in another run)."""

    cell: Cell
    cell_id: str
    claim: Claim = "run"
    row: Row | None = None
    arrays: Arrays = field(default_factory=dict)
    environment: Mapping[str, Any] | None = None
    seconds: float = 0.0


class Executor(Protocol):
    """Runs cells somewhere."""

    def start(self) -> None:
        """Begin to make workers ready; returns at once."""

    def run(self, cells: Iterable[Cell], claim_cell: ClaimCell) -> Iterator[Result]:
        """Run the cells whose ids can be claimed; results as they come, one for every cell."""

    def stop(self) -> None:
        """End every worker, in the middle of a cell too, within a second; after it, `start` begins anew."""
