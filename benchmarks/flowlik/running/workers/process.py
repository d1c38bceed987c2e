"""A worker process of the serial and the Ray executor, watched from outside."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowlik.running.executor import Setup
from flowlik.running.retries import PreparedCell, WorkerGoneError, WorkerStartError
from flowlik.running.workers.answers import TOKEN, Answers, ForeignBytesError
from flowlik.running.workers.copied import Copy, loading, nothing_was_computed
from flowlik.running.workers.descendants import end_all, memory
from flowlik.running.workers.module_path import module_path

if TYPE_CHECKING:
    from flowlik.evaluation.row import Arrays, Row

LOOK = 0.05  # seconds between two looks at a worker's memory
PULSE = 0.5  # seconds between two looks at whether it is there
PARTING = 5.0  # seconds that a worker has to be gone after it closed its pipe


class WorkerProcess:
    """A worker process and the pipe to it; `prepared` is the cell it has at hand.

    Args:
        setup: what the worker is told.
        path: its PYTHONPATH, default what this process finds modules by.
    """

    def __init__(self, setup: Setup, path: str | None = None) -> None:
        self._setup = setup
        self._left: float | None = None
        self._cells = 0
        self._begun = 0.0
        self._out_of_memory = oom_kills()
        self._environment: dict[str, Any] | None = None
        self.prepared: PreparedCell | None = None
        self._connection, theirs = Pipe()
        token = secrets.token_bytes(TOKEN)
        self._answers = Answers(token)
        variables = {"PYTHONPATH": module_path() if path is None else path}
        variables |= {} if setup.cores is None else {"OMP_NUM_THREADS": str(setup.cores)}
        copied = path is None and setup.cores is None and nothing_was_computed()
        start = self._copied if copied else _interpreter
        self._process = start(theirs.fileno(), variables)
        theirs.close()
        with suppress(OSError):  # one that could not even start is noticed when it is waited for
            self._connection.send((setup, token))

    def _copied(self, pipe: int, variables: dict[str, str]) -> Copy:
        """A worker that has what this process loads now, for both."""
        with loading():
            import flowlik.running.workers.worker  # noqa: F401
            from flowlik.running.workers.main import main

        def serve() -> None:
            self._connection.close()  # the parent's end: the worker is to notice when that is gone
            os.environ.update(variables)
            sys.path[:] = variables["PYTHONPATH"].split(os.pathsep)
            main(pipe)

        return Copy(serve)

    @property
    def is_spoilt(self) -> bool:
        """Whether an earlier cell left something in the pipe or, belatedly, ended the process."""
        if self._environment is None:
            return False  # it has yet to start
        return self._process.poll() is not None or self._connection.poll(0.0)

    def wait(self) -> None:
        """Wait until the process can be asked.

        Raises:
            WorkerStartError: it cannot start.
        """
        if self._environment is None:
            try:
                self._environment = self._answer(None)
            except WorkerGoneError as gone:
                raise WorkerStartError(f"the process that runs the cells cannot start: {gone}") from None

    def prepare(self, parcel: bytes) -> PreparedCell:
        """Prepare a pickled cell, which from now on has its time; what passes before `run` does not count.

        Raises:
            WorkerGoneError: the cell overstepped a limit and the worker was ended, or the worker ended by itself.
        """
        assert self._environment is not None
        self.prepared = None
        self._cells += 1
        self._left, self._begun = self._setup.timeout, time.time()
        cell_id, row = self._ask("prepare_pickled", parcel)
        self.prepared = PreparedCell(cell_id=cell_id, row=row, environment=self._environment)
        return self.prepared

    def run(self, batch_size: int | None) -> tuple[Row, Arrays]:
        """The row and the arrays of the prepared cell. Raises WorkerGoneError as `prepare`."""
        row, arrays = self._ask("run", batch_size)
        if self._cells > 1 and (row["status"] == "oom" or "batch_size_used" in row["extra"]):
            raise self._out("out of memory")
        return row, arrays

    def _ask(self, name: str, *arguments: Any) -> Any:
        begun = time.monotonic()
        try:
            self._connection.send((name, arguments))
        except (OSError, EOFError):
            raise self._lost() from None
        answer = self._answer(None if self._left is None else begun + self._left)
        if self._left is not None:
            self._left -= time.monotonic() - begun
        return answer

    def _answer(self, deadline: float | None) -> Any:
        try:
            while (answer := self._answers.take()) is None:
                if self._connection.poll(self._patience(deadline)):
                    self._answers.read_from(self._connection.fileno())
                elif self._process.poll() is not None and not self._connection.poll(0.0):
                    raise EOFError
                self._check_limits(deadline)
        except (OSError, EOFError):
            raise self._lost() from None
        except ForeignBytesError:
            raise WorkerGoneError("error", "the cell wrote into the pipe of its process") from None
        except ValueError as error:
            raise WorkerGoneError("error", str(error)) from None
        understood, content = answer
        if not understood:
            raise WorkerGoneError("error", content)
        return content

    def _check_limits(self, deadline: float | None) -> None:
        limit = self._setup.memory
        if deadline is not None and time.monotonic() >= deadline:
            raise WorkerGoneError("timeout", f"took longer than {self._setup.timeout:g} s")
        if limit is not None and memory(self._process.pid, limit) > limit:
            raise self._out(f"took more than {in_words(limit)} of memory")

    def _patience(self, deadline: float | None) -> float:
        look = PULSE if self._setup.memory is None else LOOK
        return look if deadline is None else max(0.0, min(look, deadline - time.monotonic()))

    def _lost(self) -> WorkerGoneError:
        """Why the worker is gone; what the system ended for its memory is out of memory."""
        try:
            code = self._process.wait(PARTING)
        except subprocess.TimeoutExpired:
            return WorkerGoneError("lost", "the cell's process closed its pipe")
        if code == -signal.SIGKILL and oom_kills() > self._out_of_memory:
            return self._out("the system ran out of memory and ended the cell's process")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return WorkerGoneError("lost", f"the cell's process ended by itself ({how})")

    def _out(self, message: str) -> WorkerGoneError:
        """Out of memory: the cell's own doing in a worker's first cell, later perhaps what earlier cells left."""
        if self._cells <= 1:
            return WorkerGoneError("oom", message)
        if self._setup.partial_results is not None and self.prepared is not None:
            for file in (self._setup.partial_results / self.prepared.cell_id).glob("*.npz"):
                if file.stat().st_mtime >= self._begun:  # its batch may have been halved
                    file.unlink()
        return WorkerGoneError("used", message)

    def end(self) -> None:
        """Kill the process and everything it started."""
        end_all(self._process.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


def _interpreter(pipe: int, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker that loads its libraries itself."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "flowlik.running.workers.main", str(pipe)],
        pass_fds=[pipe],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | variables,
    )


def oom_kills() -> int:
    """How many processes the system has ended for their memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def in_words(size: int) -> str:
    """A number of bytes for people: 512 MB, 1.5 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
