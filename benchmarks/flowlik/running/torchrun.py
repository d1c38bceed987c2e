"""One cell over several processes: `torchrun --nproc-per-node N -m flowlik run ...`, with the same records.

Every process plans and prepares the same cells. Items and samples are shared by whole batches, batch b to process b
modulo their number, so the answers are those of one process bit for bit, batches and draws being the same; the first
process joins them in order, computes what is left of the cell (measures, densities, timing) and alone writes records.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowlik.cells import Cell
from flowlik.evaluation.batching import batches
from flowlik.evaluation.batching.batches import Evaluation
from flowlik.evaluation.evaluate_cell import Backend
from flowlik.evaluation.prepare import Prepared, prepare
from flowlik.measures.arrays import Array
from flowlik.running.executor import ClaimCell, Result, Setup
from flowlik.running.retries import Job, PreparedCell, finished
from flowlik.running.workers.worker import Worker
from flowlik.tasks.points import Points
from flowlik_models.numerics.float32 import use_full_float32

T = TypeVar("T")


class Sharded:
    """The executor of the first process, which the others follow. Limits are torchrun's and the scheduler's to keep."""

    def __init__(self, setup: Setup) -> None:
        if setup.timeout is not None or setup.memory is not None:
            raise ValueError(
                "--timeout and --memory end one process; under torchrun, leave them to the scheduler"
            )
        if setup.cores is not None:
            raise ValueError("--cores is that of a process a run starts; under torchrun, set OMP_NUM_THREADS")
        self._setup = setup

    def start(self) -> None:
        """Meet the other processes; in all but the first, returns when that one is through."""
        if dist.is_initialized():
            return
        dist.init_process_group("gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if dist.get_rank() > 0:
            _follow()

    def run(self, cells: Iterable[Cell], claim_cell: ClaimCell) -> Iterator[Result]:
        """As `Executor.run`, in order."""
        worker = Worker(self._setup, Backend(evaluate=_led_evaluate, sample=_led_sample))
        for cell in cells:
            cell_id, row = worker.prepare(cell)
            job = Job(cell=cell).asked(cell_id, claim_cell)
            prepared = PreparedCell(cell_id=cell_id, row=row, environment=worker.environment)
            yield finished(job, prepared, worker.run() if job.claim == "run" else None)

    def stop(self) -> None:
        """Let the other processes go."""
        if dist.is_initialized():
            with suppress(RuntimeError):  # they may be gone
                _tell(None)
            dist.destroy_process_group()


def _follow() -> None:
    """Compute this process's share of what the first process asks for, until it is through."""
    use_full_float32()
    prepared = None
    while (asked := _tell(None)) is not None:
        what, cell = asked
        if prepared is None or prepared.cell != cell:
            prepared = prepare(cell)
        with suppress(Exception):  # whichever process it is of, the first one makes the row's status of it
            _SHARES[what](prepared)
    dist.destroy_process_group()


def _share_of_points(prepared: Prepared) -> None:
    items = prepared.items
    if prepared.status != "ok" or items is None:
        _gather(RuntimeError(prepared.reason or prepared.status))
    else:
        evaluate(prepared.cell, prepared.model, items.x, items.ids, items.cond)


def _share_of_samples(prepared: Prepared) -> None:
    sample(prepared.cell, prepared.model, prepared.cell.options.samples)


_SHARES: dict[str, Callable[[Prepared], None]] = {"evaluate": _share_of_points, "sample": _share_of_samples}


def _led_evaluate(cell: Cell, model: Any, x: Tensor | Points, ids: Tensor, cond: Tensor | None) -> Evaluation:
    _tell(("evaluate", cell))
    return evaluate(cell, model, x, ids, cond)


def _led_sample(cell: Cell, model: Any, n: int) -> tuple[Tensor, dict[str, Array]]:
    _tell(("sample", cell))
    return sample(cell, model, n)


def _tell(message: Any) -> Any:
    """The first process's message, in every process."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(part: Any) -> list[Any]:
    """Every process's part in order, in every process; the first exception among them is raised."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    for found in parts:
        if isinstance(found, Exception):
            raise found
    return parts


def _shared(call: Callable[[slice], T], n: int, asked: int | str) -> list[T]:
    """`call` on each batch of 0..n, in the process it falls to; all results in order.

    Where the batch size is for memory to find, each process gets one part and finds its own.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    batch_size = -(-n // world) if isinstance(asked, str) else asked
    slices = [slice(start, min(n, start + batch_size)) for start in range(0, n, batch_size)]
    mine: Any
    try:
        mine = [call(part) for part in slices[rank::world]]
    except Exception as error:
        mine = error
    parts = _gather(mine)
    return [parts[number % world][number // world] for number in range(len(slices))]


def evaluate(cell: Cell, model: Any, x: Tensor | Points, ids: Tensor, cond: Tensor | None) -> Evaluation:
    """As `flowlik.evaluation.batching.batches.evaluate`, shared by all processes."""

    def batch(part: slice) -> Evaluation:
        return batches.evaluate(cell, model, x[part], ids[part], None if cond is None else cond[part])

    return batches.joined(_shared(batch, len(x), cell.options.batch_size))


def sample(cell: Cell, model: Any, n: int) -> tuple[Tensor, dict[str, Array]]:
    """As `flowlik.evaluation.batching.batches.sample`, shared by all processes."""

    def batch(part: slice) -> tuple[Tensor, dict[str, Array]]:
        x, cost = batches.sample(cell, model, part.stop - part.start, first=part.start)
        return x.cpu(), cost

    parts = _shared(batch, n, cell.options.batch_size)
    costs = [cost for _, cost in parts]
    return torch.cat([x for x, _ in parts]), {
        name: np.concatenate([cost[name] for cost in costs]) for name in costs[0]
    }
