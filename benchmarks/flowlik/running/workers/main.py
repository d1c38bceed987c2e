"""The worker process: `python -m flowlik.running.workers.main DESCRIPTOR`, a `Worker` at the end of a pipe.

It takes (name, arguments) and answers with what the worker's method of that name returns. It ends with the process
that started it, and everything it has started with it (`flowlik.running.workers.guard`), is the first that the system
ends when memory runs out, and has a session of its own, so that Ctrl-C reaches it only through its parent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from flowlik.running.workers import answers
from flowlik.running.workers.copied import loading
from flowlik.running.workers.guard import go_on_under_guard

if TYPE_CHECKING:
    from flowlik.running.workers.worker import Worker


def main(descriptor: int) -> None:
    """Serve the pipe `descriptor` until it closes."""
    sys.path[:] = dict.fromkeys(sys.path)  # PYTHONPATH names most of it: what stands last there is last
    go_on_under_guard(descriptor)
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    os.register_at_fork(after_in_child=connection.close)  # a cell that forks does not answer twice
    me = os.getpid()
    with _until_nobody_listens():
        setup, token = connection.recv()
    _limit_memory(setup.memory)
    with loading():
        from flowlik.running.workers.worker import Worker

    worker = Worker(setup)
    answer: tuple[bool, Any] = True, worker.environment
    with _until_nobody_listens():
        while True:
            answers.send(descriptor, token, answer)
            answer = _served(worker, connection)
            if os.getpid() != me:
                os._exit(0)  # the copy of a cell that forked


@contextmanager
def _until_nobody_listens() -> Iterator[None]:
    """End the process where the pipe is closed: threads that compute must not keep it."""
    try:
        yield
    except (EOFError, OSError):
        os._exit(0)


def _served(worker: Worker, connection: Connection) -> tuple[bool, Any]:
    """(True, the answer) to the next message, or (False, one line) where it cannot be understood or done."""
    name, arguments = connection.recv()
    try:
        return True, getattr(worker, name)(*arguments)
    except Exception as error:
        return False, " ".join(f"{type(error).__name__}: {error}".split())


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
