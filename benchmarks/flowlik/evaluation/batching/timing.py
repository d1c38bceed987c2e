"""Timing: repeated rounds after a warm-up, interleaved with one forward of the same network on the same batch.

Median and interquartile range are reported, never the minimum. `forward_equivalents` is the CPU time (on a GPU the
synchronised device time) of the estimate over that of one forward: it carries from machine to machine, but is never a
gate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik_models.interfaces import Ability, can, trial_call

TIMED: tuple[Ability, ...] = (
    "velocity",
    "joint flow map",
    "flow map",
    "policy flow",
    "generator",
    "scalar log-density",
    "exact inverse",
)
"""Of several abilities the one whose evaluation stands for a forward of the network."""


FORWARD_SECONDS = 0.01  # forwards are repeated until a round of them takes about this long


BUDGET_SECONDS = 6.0  # no further round is begun after this long, so a slow estimator is timed at least once


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The timing columns of a record; `peak_bytes` is the device's allocation, on a CPU the process's resident peak."""

    wall_s_median: float
    wall_s_iqr: float
    cpu_s_median: float
    rounds: int
    forward_equivalents: float
    items_per_s: float
    peak_bytes: int | None


def measure(
    estimate: Callable[[], Any], forward: Callable[[], Any], *, items: int, rounds: int, device: torch.device
) -> Timing:
    """Time `estimate` against `forward`, both on the same batch of `items`.

    One untimed call of each comes first; then each round times one estimate and a row of forwards.
    """
    forward()
    warm_up = _seconds(forward, device)[0]
    repeats = max(1, min(200, round(FORWARD_SECONDS / max(warm_up, 1e-6))))
    estimate()
    reset_peak(device)
    wall, cpu, unit = [], [], []
    begun = time.perf_counter()
    for _ in range(rounds):
        seconds = _seconds(estimate, device)
        wall.append(seconds[0])
        cpu.append(seconds[1])
        unit.append(
            _compared(_seconds(lambda: [forward() for _ in range(repeats)], device), device) / repeats
        )
        if time.perf_counter() - begun > BUDGET_SECONDS:
            break
    peak = peak_bytes(device)
    low, median, high = (float(value) for value in np.quantile(wall, (0.25, 0.5, 0.75)))
    spent = median if device.type != "cpu" else float(np.median(cpu))
    return Timing(
        wall_s_median=median,
        wall_s_iqr=high - low,
        cpu_s_median=float(np.median(cpu)),
        rounds=len(wall),
        forward_equivalents=spent / max(float(np.median(unit)), 1e-9),
        items_per_s=items / median,
        peak_bytes=peak,
    )


def _seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call, the device synchronised before and after."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def _compared(seconds: tuple[float, float], device: torch.device) -> float:
    return seconds[1] if device.type == "cpu" else seconds[0]


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget earlier memory peaks, where the system lets a process do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory since `reset_peak`: allocated on a GPU, resident of the whole process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


def one_forward(model: Any, x: Tensor, cond: Tensor | None = None) -> Callable[[], Any] | None:
    """One evaluation of the model's network on `x`, halfway between noise and data; None where it has none."""
    for ability in TIMED:
        if can(model, ability):
            return _without_graph(trial_call(model, x, ability, cond=cond))
    return None


def _without_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
