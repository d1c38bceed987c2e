"""The worker process: `python -m flowlik.running.workers.main DESCRIPTOR`, a `Worker` at the end of a pipe.

It takes (name, arguments) and answers with what the worker's method of that name returns. It ends with the process
that started it, is the first that the system ends when memory runs out, and has a session of its own, so that Ctrl-C
reaches it only through its parent.
"""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowlik.running.workers.worker import Worker

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve the pipe `descriptor` until it closes."""
    _end_with_the_parent()
    connection = Connection(descriptor)
    try:
        setup = connection.recv()
        _limit_memory(setup.memory)
        from flowlik.running.workers.worker import Worker

        worker = Worker(setup)
        connection.send((True, worker.environment))
        while True:
            connection.send(_served(worker, connection))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nobody is listening; threads that compute must not keep the process


def _served(worker: Worker, connection: Connection) -> tuple[bool, Any]:
    """(True, the answer) to the next message, or (False, one line) where it cannot be understood or done."""
    try:
        name, arguments = connection.recv()
        return True, getattr(worker, name)(*arguments)
    except (EOFError, OSError):
        raise
    except Exception as error:
        return False, " ".join(f"{type(error).__name__}: {error}".split())


def _end_with_the_parent() -> None:
    parent = os.getppid()
    try:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    except (OSError, AttributeError):
        return  # not Linux: the closed pipe ends it after its cell
    if os.getppid() != parent:
        os._exit(1)


def _limit_memory(memory: int | None) -> None:
    """Let allocations fail at the limit, which halves the batch; what gets past it is ended from outside."""
    if memory is None:
        return
    try:
        import resource
    except ImportError:
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or memory < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]))
