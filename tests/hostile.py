"""Estimators that overstep, for the tests of what keeps cells in their limits; importable from a worker process."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowlik_estimators import Estimate, Estimator, Run, register, standard_normal_log_prob


@register("hostile")
@dataclass(frozen=True, kw_only=True)
class Hostile(Estimator):
    """Does `act` and then gives each point its density under N(0, I), of one counted evaluation."""

    family = "ode"
    act: str = "nothing"
    mark: str = ""
    amount: int = 0

    def _log_prob(self, model: Any, x: torch.Tensor, run: Run) -> Estimate:
        model.velocity(x, run.at(0.5))
        ACTS[self.act](self, x)
        return Estimate(log_prob=standard_normal_log_prob(x))


def sleep(estimator: Hostile, x: torch.Tensor) -> None:
    """Sleeps, and takes every exception for its own."""
    end = time.monotonic() + 900
    while time.monotonic() < end:
        try:
            time.sleep(end - time.monotonic())
        except BaseException:
            continue


def pause(estimator: Hostile, x: torch.Tensor) -> None:
    time.sleep(estimator.amount / 1000)


def crash(estimator: Hostile, x: torch.Tensor) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(estimator: Hostile, x: torch.Tensor) -> None:
    os._exit(3)


def crash_once(estimator: Hostile, x: torch.Tensor) -> None:
    mark = Path(estimator.mark)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def lose_host_once(estimator: Hostile, x: torch.Tensor) -> None:
    """Ends the process that keeps this one in its limits: a machine that vanishes."""
    mark = Path(estimator.mark)
    if not mark.exists():
        mark.touch()
        guard = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2]
        os.kill(int(guard.split()[1]), signal.SIGKILL)
        time.sleep(60)


def allocate(estimator: Hostile, x: torch.Tensor) -> None:
    """`amount` megabytes a point, all at once: an allocation that fails."""
    torch.zeros(len(x), estimator.amount * 10**6 // 8, dtype=torch.float64)


def creep(estimator: Hostile, x: torch.Tensor) -> None:
    """`amount` megabytes a point in a process that a thread starts and that lifts the limit on allocations."""
    lift = "resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))"
    take = f"x = b'a' * {len(x) * estimator.amount * 10**6}"
    command = [sys.executable, "-c", f"import resource, time; {lift}; {take}; time.sleep(1.5)"]
    thread = threading.Thread(target=subprocess.run, args=(command,))
    thread.start()
    thread.join()


_LEAKED: list[torch.Tensor] = []


def leak(estimator: Hostile, x: torch.Tensor) -> None:
    """Keeps `amount` megabytes for good."""
    _LEAKED.append(torch.zeros(estimator.amount * 10**6 // 8, dtype=torch.float64))


def fork_twice(estimator: Hostile, x: torch.Tensor) -> None:
    """Goes on in four processes."""
    os.fork()
    os.fork()


def write_into_pipes(estimator: Hostile, x: torch.Tensor) -> None:
    """Writes what looks like the beginning of something long into every socket it finds."""
    for descriptor in range(3, 64):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"hello, I am no answer")


def daemon(estimator: Hostile, x: torch.Tensor) -> None:
    """Leaves a process in a session of its own that nobody waits for, and notes its id in `mark`."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            Path(estimator.mark).write_text(str(os.getpid()))
            time.sleep(900)
        os._exit(0)
    while not (Path(estimator.mark).is_file() and Path(estimator.mark).read_text()):
        time.sleep(0.01)


def daemon_and_crash_once(estimator: Hostile, x: torch.Tensor) -> None:
    if not Path(estimator.mark).exists():
        daemon(estimator, x)
        os.kill(os.getpid(), signal.SIGSEGV)


def daemon_and_sleep(estimator: Hostile, x: torch.Tensor) -> None:
    daemon(estimator, x)
    time.sleep(900)


ACTS = {
    "nothing": lambda estimator, x: None,
    "sleep": sleep,
    "pause": pause,
    "crash": crash,
    "leave": leave,
    "crash_once": crash_once,
    "lose_host_once": lose_host_once,
    "allocate": allocate,
    "creep": creep,
    "leak": leak,
    "fork_twice": fork_twice,
    "write_into_pipes": write_into_pipes,
    "daemon": daemon,
    "daemon_and_crash_once": daemon_and_crash_once,
    "daemon_and_sleep": daemon_and_sleep,
}
