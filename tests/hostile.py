"""Estimators that overstep, for the tests of what keeps cells in their limits; importable from a worker process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)


def allocate(estimator: Hostile, x: torch.Tensor) -> None:
    """`amount` megabytes a point, all at once: an allocation that fails."""
    torch.zeros(len(x), estimator.amount * 10**6 // 8, dtype=torch.float64)


def creep(estimator: Hostile, x: torch.Tensor) -> None:
    """`amount` megabytes a point in a process of its own that lifts the limit on allocations."""
    lift = "resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))"
    take = f"x = b'a' * {len(x) * estimator.amount * 10**6}"
    subprocess.run(
        [sys.executable, "-c", f"import resource, time; {lift}; {take}; time.sleep(1.5)"], check=False
    )


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
}
