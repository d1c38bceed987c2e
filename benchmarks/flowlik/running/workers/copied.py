"""A worker that is a copy of this process, which has loaded the libraries and done nothing with them yet.

Loading them is most of what a short run costs, and a copy has them for nothing. Once something was computed, threads
of torch and of OpenMP, and a GPU's context, would be missing in the copy: from then on a worker is a new interpreter.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_LOOK = 0.01  # seconds between two looks at a process that is to end


def nothing_was_computed() -> bool:
    """Whether this process can be copied: torch is not loaded, so that nothing has used it."""
    return hasattr(os, "fork") and "torch" not in sys.modules and threading.active_count() == 1


@contextmanager
def loading() -> Iterator[None]:
    """Load libraries without looking for garbage among what they leave for good, neither now nor at the end.

    The hundreds of thousands of objects of torch hold none, and each look takes as long as loading a library of ours.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        if collecting:
            gc.enable()


class Copy:
    """A copy of this process that runs a function and ends; with what a worker needs of `subprocess.Popen`."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(function)

    def poll(self) -> int | None:
        """Exit status, minus the number of the signal that ended it; None while it runs."""
        return self._waited(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """The same when it has ended; subprocess.TimeoutExpired where it has not after that many seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while (code := self._waited(0 if end is None else os.WNOHANG)) is None:
            if end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            time.sleep(_LOOK)
        return code

    def _waited(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _run(function: Callable[[], None]) -> NoReturn:
    """As a new program would: a session of its own, no input, nobody's signal handlers."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        function()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)
