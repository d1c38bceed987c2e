"""A worker process of the serial and the Ray executor, watched from outside."""

from __future__ import annotations

import os
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

if TYPE_CHECKING:
    from flowlik.evaluation.row import Arrays, Row

LOOK = 0.05  # seconds between two looks at a worker's memory


class WorkerProcess:
    """A worker process and the pipe to it; `prepared` is the cell it has at hand."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._deadline: float | None = None
        self._out_of_memory = oom_kills()
        self._environment: dict[str, Any] | None = None
        self.prepared: PreparedCell | None = None
        self._connection, theirs = Pipe()
        threads = {} if setup.cores is None else {"OMP_NUM_THREADS": str(setup.cores)}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flowlik.running.workers.main", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | path | threads,
        )
        theirs.close()
        with suppress(OSError):  # one that could not even start is noticed when it is waited for
            self._connection.send(setup)

    def wait(self) -> None:
        """Wait until the process can be asked.

        Raises:
            WorkerStartError: it cannot start.
        """
        if self._environment is None:
            try:
                self._environment = self._answer()
            except WorkerGoneError as gone:
                raise WorkerStartError(f"the process that runs the cells cannot start: {gone}") from None

    def prepare(self, parcel: bytes) -> PreparedCell:
        """Prepare a pickled cell; its time begins.

        Raises:
            WorkerGoneError: the cell overstepped a limit and the worker was ended, or the worker ended by itself.
        """
        assert self._environment is not None
        self.prepared = None
        self._deadline = None if self._setup.timeout is None else time.monotonic() + self._setup.timeout
        cell_id, row = self._ask("prepare_pickled", parcel)
        self.prepared = PreparedCell(cell_id=cell_id, row=row, environment=self._environment)
        return self.prepared

    def run(self, batch_size: int | None) -> tuple[Row, Arrays]:
        """The row and the arrays of the prepared cell. Raises WorkerGoneError as `prepare`."""
        row, arrays = self._ask("run", batch_size)
        self._deadline = None
        return row, arrays

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            self._connection.send((name, arguments))
        except (OSError, EOFError):
            raise self._lost() from None
        return self._answer()

    def _answer(self) -> Any:
        while not self._connection.poll(self._patience()):
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise WorkerGoneError("timeout", f"took longer than {self._setup.timeout:g} s")
            if self._setup.memory is not None and resident(self._process.pid) > self._setup.memory:
                raise WorkerGoneError("oom", f"took more than {in_words(self._setup.memory)} of memory")
        try:
            understood, answer = self._connection.recv()
        except (OSError, EOFError):
            raise self._lost() from None
        if not understood:
            raise WorkerGoneError("error", answer)
        return answer

    def _patience(self) -> float | None:
        waits = [max(0.0, self._deadline - time.monotonic())] if self._deadline is not None else []
        return min([*waits, *([LOOK] if self._setup.memory is not None else [])], default=None)

    def _lost(self) -> WorkerGoneError:
        """Why the worker is gone; what the system ended for its memory is out of memory."""
        code = self._process.wait()
        if code == -signal.SIGKILL and oom_kills() > self._out_of_memory:
            return WorkerGoneError("oom", "the system ran out of memory and ended the cell's process")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return WorkerGoneError("lost", f"the cell's process ended by itself ({how})")

    def end(self) -> None:
        """Kill the process and everything it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()


def oom_kills() -> int:
    """How many processes the system has ended for their memory since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def resident(pid: int) -> int:
    """Bytes of memory that a process and its children hold; 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def in_words(size: int) -> str:
    """A number of bytes for people: 512 MB, 1.5 GB."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
