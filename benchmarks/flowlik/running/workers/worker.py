"""What a worker does with a cell, in whichever process it is."""

from __future__ import annotations

import pickle
from dataclasses import replace

import flowlik_estimators  # noqa: F401 - loaded before the first cell's time begins
from flowlik.cells import Cell
from flowlik.evaluation.batching.partial_results import with_partial_results
from flowlik.evaluation.evaluate_cell import THIS_PROCESS, Backend, run_prepared
from flowlik.evaluation.prepare import Prepared, prepare
from flowlik.evaluation.row import Arrays, Row, blank_row, merged
from flowlik.records import environment
from flowlik.running.executor import Setup


class Worker:
    """Takes a cell in two steps, so that its id is known before any work is done."""

    def __init__(self, setup: Setup, backend: Backend = THIS_PROCESS) -> None:
        self.run_id = setup.run_id
        self.environment = environment.describe(setup.argv)
        self._backend = backend
        self._partial_results = setup.partial_results if backend is THIS_PROCESS else None
        self._prepared: Prepared | None = None
        self._row: Row | None = None

    def prepare(self, cell: Cell) -> tuple[str, Row]:
        """The cell's id and its row before it ran."""
        self._prepared = prepare(cell)
        self._row = blank_row(self._prepared, self.run_id, self.environment["env_id"])
        self._row["extra"]["hardware"] = self.environment["gpu" if cell.device.startswith("cuda") else "cpu"]
        return self._prepared.cell_id, self._row

    def prepare_pickled(self, parcel: bytes) -> tuple[str, Row]:
        """The same with a pickled cell, so that what carries it need not know what is in it.

        Pickled, since an estimator may be any class that the program which runs the cells has at hand, registered or
        not. The bytes are from that program: the pipe has no name, only it and the worker that it started hold an end
        (on Ray the host between them, over the cluster's own connections). Records, configurations and checkpoints
        are JSON, TOML, npz without objects and safetensors: nothing from disk gets here.
        """
        cell: Cell = pickle.loads(parcel)
        return self.prepare(cell)

    def run(self, batch_size: int | None = None) -> tuple[Row, Arrays]:
        """The prepared cell's row and arrays, computed in batches of `batch_size` where that is given."""
        assert self._prepared is not None
        assert self._row is not None
        backend = self._backend
        if self._partial_results is not None:
            backend = replace(
                backend, evaluate=with_partial_results(self._partial_results / self._prepared.cell_id)
            )
        measured, arrays = run_prepared(self._prepared, batch_size=batch_size, backend=backend)
        return merged(self._row, measured), arrays
