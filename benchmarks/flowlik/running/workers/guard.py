"""The guard of a worker: the process between it and the run, which ends everything that a cell has started.

Linux gives a process whose parent ended to the next ancestor that asks for such (`PR_SET_CHILD_SUBREAPER`). The guard
asks, so that nothing a cell starts gets out of its sight, and is told when the run itself is gone.
"""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any, NoReturn

from flowlik.running.workers.descendants import end_all

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TOLD = (signal.SIGCHLD, signal.SIGTERM)


def go_on_under_guard(pipe: int) -> None:
    """Return in a child process, whose guard this process is from now on, with the pipe; elsewhere than on Linux, in
    this one."""
    libc = _libc()
    if libc is None:
        return
    run = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != run:
        os._exit(1)
    guard = os.getpid()
    if (worker := os.fork()) == 0:
        _become_worker(libc, guard)
    else:
        os.close(pipe)
        _guard(worker)


def _libc() -> Any:
    try:
        import ctypes

        libc = ctypes.CDLL(None)
        libc.prctl  # noqa: B018 - there on Linux alone
    except (OSError, AttributeError, TypeError, ImportError):
        return None
    return libc


def _become_worker(libc: Any, guard: int) -> None:
    """End with the guard, and be the first that the system ends when memory runs out."""
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TOLD)
    try:
        Path("/proc/self/oom_score_adj").write_text("800", encoding="ascii")
    except OSError:
        return  # the system keeps that to itself


def _guard(worker: int) -> NoReturn:
    """Wait until the worker or the run is gone, end what is left of the worker's doing, and end as it did."""
    status = None
    while status is None and signal.sigwait(_TOLD) != signal.SIGTERM:
        status = _reaped(worker)
    end_all(os.getpid())
    if status is not None and os.WIFSIGNALED(status):
        _end_by(os.WTERMSIG(status))
    os._exit(1 if status is None else os.waitstatus_to_exitcode(status))


def _reaped(worker: int) -> int | None:
    """Take note of every child that ended; the worker's status where it is among them."""
    status = None
    while True:
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == worker:
            status = ended


def _end_by(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)
