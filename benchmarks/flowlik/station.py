"""Where cells are computed: the station that every worker holds, and the executor that has its station right here."""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import scipy.stats  # noqa: F401

import flowlik_estimators  # noqa: F401 - loaded, like the next, before the first cell's time begins
from flowlik import environment
from flowlik.cells import Cell
from flowlik.executors import Result, Setup, Wanted
from flowlik.filling import HERE, Arrays, Engine, Row, blank_row, merged, run_prepared
from flowlik.pieces import in_pieces
from flowlik.preparing import Prepared, prepare


class Station:
    """What a worker does: takes a cell in two steps, so that its id is known before any work is done."""

    def __init__(self, setup: Setup, engine: Engine = HERE) -> None:
        settle_numerics()
        self.run_id = setup.run_id
        self.environment = environment.describe(setup.argv)
        self._engine = engine
        self._pieces = setup.pieces if engine is HERE else None
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
        engine = self._engine
        if self._pieces is not None:
            engine = replace(engine, evaluate=in_pieces(self._pieces / self._prepared.cell_id))
        measured, arrays = run_prepared(self._prepared, batch_size=batch_size, engine=engine)
        return merged(self._row, measured), arrays


def settle_numerics() -> None:
    """float32 means float32, on every device."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


class CellTimeoutError(BaseException):
    """A cell took longer than it was given; no Exception, so that nothing in a cell takes it for its own."""


class Inline:
    """Cells one after the other in this very process: for tests, gates and programs. Only `timeout` is kept."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup

    def start(self) -> None:
        """Nothing to make ready."""

    def run(self, cells: Iterable[Cell], wanted: Wanted) -> Iterator[Result]:
        """As `Executor.run`, in order."""
        station = Station(self._setup)
        for cell in cells:
            begun = time.perf_counter()
            identity, row = station.prepare(cell)
            result = Result(
                cell=cell, cell_id=identity, wish=wanted(identity), environment=station.environment
            )
            if result.wish == "run":
                result = replace(result, **self._within_time(station, row))
            yield replace(result, seconds=time.perf_counter() - begun)

    def _within_time(self, station: Station, row: Row) -> dict[str, Any]:
        try:
            with time_limit(self._setup.timeout):
                row, arrays = station.run()
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
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
