"""The Ray executor: cells over the cores and GPUs of one machine or many (`pip install 'flowlik[ray]'`).

A cell gets one GPU, or on processors `cores` cores. Cells that are timed run alone: on a GPU of their own, or on
processors with no other cell on the machine; where only accuracy is measured, several share. Both kinds are hosts: Ray
actors that hold the worker process of the serial executor, so the limits of a cell are kept in the same way.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flowlik.records.environment import usable_cpus
from flowlik.running.executor import ClaimCell, Result, Setup
from flowlik.running.retries import (
    Job,
    PreparedCell,
    WorkerGoneError,
    WorkerStartError,
    again,
    finished,
    given_up,
)
from flowlik.running.workers.module_path import module_path
from flowlik.running.workers.process import WorkerProcess

if TYPE_CHECKING:
    from flowlik.cells import Cell
    from flowlik.evaluation.row import Arrays, Row

GPU_SHARE = 0.5  # of a GPU, for a cell that is not timed


class Host:
    """The actor: a worker process on some machine. Trouble is an answer here, not an exception."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: WorkerProcess | None = None

    def prepare(self, parcel: bytes) -> PreparedCell | WorkerGoneError:
        """As `WorkerProcess.prepare`; the worker is started, or started again, where there is none."""
        if self._worker is not None and self._worker.is_spoilt:
            self._worker.end()
            self._worker = None
        if self._worker is None:
            self._worker = WorkerProcess(self._setup, os.environ.get("PYTHONPATH"))
        try:
            self._worker.wait()
            return self._worker.prepare(parcel)
        except WorkerGoneError as gone:
            return self._gone(gone)
        except WorkerStartError as error:
            return self._gone(WorkerGoneError("error", str(error)))

    def run(self, batch_size: int | None) -> tuple[Row, Arrays] | WorkerGoneError:
        """As `WorkerProcess.run`."""
        assert self._worker is not None
        try:
            return self._worker.run(batch_size)
        except WorkerGoneError as gone:
            return self._gone(gone)

    def _gone(self, gone: WorkerGoneError) -> WorkerGoneError:
        assert self._worker is not None
        self._worker.end()
        self._worker = None
        return gone


@dataclass
class Seat:
    """A host and the job it is busy with; `prepared` once that is known."""

    host: Any
    job: Job
    prepared: PreparedCell | None = None


class RayExecutor:
    """Cells on a Ray cluster: the one at `address`, or one made of this machine's cores and GPUs."""

    def __init__(self, setup: Setup, *, address: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            raise ValueError("--executor ray needs Ray: pip install 'flowlik[ray]'")
        self._setup = Setup(**(vars(setup) | {"cores": setup.cores or 1, "partial_results": None}))
        self._address = address
        self._hosts: list[Any] = []
        self._started = self._ours = False

    def start(self) -> None:
        """Join the cluster, or make one.

        Raises:
            WorkerStartError: there is no cluster at the address.
        """
        if self._started:
            return
        self._started = True
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # a crowded machine takes its time
        import ray

        if ray.is_initialized():  # a program that has a cluster keeps it
            return
        local = {} if self._address else {"num_cpus": usable_cpus(), "include_dashboard": False}
        variables = {name: value for name, value in os.environ.items() if name.startswith("FLOWLIK_")}
        variables["PYTHONPATH"] = module_path()
        try:
            ray.init(
                address=self._address or "local",
                logging_level="ERROR",
                log_to_driver=False,
                runtime_env={"env_vars": variables},
                **local,
            )
        except Exception as error:  # of whatever kind: Ray raises bare ones
            where = self._address or "this machine"
            raise WorkerStartError(f"no Ray cluster at {where}: {_one_line(error)}") from None
        self._ours = True

    def run(self, cells: Iterable[Cell], claim_cell: ClaimCell) -> Iterator[Result]:
        """As `Executor.run`: first, several at a time, the cells that are not timed, then each of the others alone."""
        self.start()
        timed: list[Cell] = []
        untimed: list[Cell] = []
        for cell in cells:
            (timed if cell.options.rounds and not cell.is_control else untimed).append(cell)
        for part, alone in ((untimed, False), (timed, True)):
            gpu = any(cell.device.startswith("cuda") for cell in part)
            for device_cells in (
                [c for c in part if c.device == d] for d in dict.fromkeys(c.device for c in part)
            ):
                yield from self._over(places(self._setup, gpu=gpu, alone=alone), device_cells, claim_cell)

    def _over(
        self, options: list[dict[str, Any]], cells: list[Cell], claim_cell: ClaimCell
    ) -> Iterator[Result]:
        """The cells over as many hosts as there are places, each taking the next when it is through with one."""
        import ray

        if not options:
            raise WorkerStartError("the Ray cluster has no GPU and not as many cores as a cell asks for")
        waiting = deque(Job(cell=cell) for cell in cells)
        free = options[: len(waiting)]
        busy: dict[Any, tuple[Seat, dict[str, Any]]] = {}

        def seat(job: Job, host: Any, place: dict[str, Any]) -> None:
            job = job if job.claim else replace(job, begun=time.perf_counter())
            busy[host.prepare.remote(pickle.dumps(job.cell))] = (Seat(host, job), place)

        try:
            while waiting or busy:
                while waiting and free:
                    place = free.pop()
                    seat(waiting.popleft(), self._new_host(place), place)
                (ready, *_), _ = ray.wait(list(busy), num_returns=1)
                taken, place = busy.pop(ready)
                answer, alive = _answer(ready)
                following = self._next(taken, answer, claim_cell)
                if isinstance(following, Result):
                    yield following
                elif isinstance(following, Job):
                    waiting.append(following)
                else:
                    busy[following] = (taken, place)
                    continue
                if not alive:
                    free.append(place)
                elif waiting:
                    seat(waiting.popleft(), taken.host, place)
                else:
                    self._end(taken.host)
        finally:
            for taken, _ in busy.values():
                self._end(taken.host)

    def _next(self, seat: Seat, answer: Any, claim_cell: ClaimCell) -> Result | Job | Any:
        """A result, the job for another attempt, or what is awaited next of this host."""
        if isinstance(answer, WorkerGoneError):
            result = given_up(seat.job, answer, seat.prepared, self._setup)
            return again(seat.job, answer) or result
        if seat.prepared is None:
            seat.prepared = answer
            seat.job = seat.job.asked(answer.cell_id, claim_cell)
            if seat.job.claim == "run":
                return seat.host.run.remote(seat.job.batch_size)
            return finished(seat.job, answer, None)
        return finished(seat.job, seat.prepared, answer)

    def _new_host(self, place: dict[str, Any]) -> Any:
        import ray

        host = ray.remote(Host).options(max_restarts=0, **place).remote(self._setup)
        self._hosts.append(host)
        return host

    def _end(self, host: Any) -> None:
        import ray

        with suppress(ValueError):
            self._hosts.remove(host)
        with suppress(Exception):  # it may be gone by now
            ray.kill(host)

    def stop(self) -> None:
        """End all hosts and leave the cluster."""
        if not self._started:
            return
        import ray

        for host in list(self._hosts):
            self._end(host)
        if self._ours:
            ray.shutdown()
        self._started = self._ours = False


def _answer(ready: Any) -> tuple[Any, bool]:
    """What a host answered, and whether it is still there; a host that is gone is an answer too."""
    import ray

    try:
        return ray.get(ready), True
    except ray.exceptions.OutOfMemoryError as error:
        return WorkerGoneError("oom", _one_line(error)), False
    except (
        ray.exceptions.RayActorError,
        ray.exceptions.WorkerCrashedError,
        ray.exceptions.NodeDiedError,
    ) as error:
        return WorkerGoneError("lost", f"the cell's worker was lost: {_one_line(error)}"), False
    except ray.exceptions.RayError as error:
        return WorkerGoneError("error", _one_line(error)), True


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " ..."


def places(setup: Setup, *, gpu: bool, alone: bool) -> list[dict[str, Any]]:
    """Where hosts can be: the options of one Ray actor each.

    On processors a host that is to be alone takes all cores of its machine; on GPUs it takes the whole GPU.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found: list[dict[str, Any]] = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        here = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        cores, gpus = int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))
        if gpu:
            share = 1.0 if alone else GPU_SHARE
            options = {"num_gpus": share, "num_cpus": 0}
            found += [here | options] * int(gpus / share)
        elif alone:
            found += [here | {"num_cpus": cores}] * (cores >= (setup.cores or 1))
        else:
            found += [here | {"num_cpus": setup.cores}] * (cores // (setup.cores or 1))
    return found
