"""How many items fit into memory at once, by a measured trial on a few of them.

The bytes an item takes come from the peak of a call on `TRIAL` items after one that warms up: on a CPU the resident
size of the process, on a GPU what is allocated. The batch takes at most `SHARE` of what is available, since an
estimator may need more for some items than for others; where it runs out all the same the batch is halved.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from flowlik.evaluation.batching import timing

AUTO = "auto"
TRIAL = 32
SHARE = 0.5
MOST = 4096
"""Beyond so many rows no network here got faster by the row."""


def fitting_batch(call: Callable[[slice], Any], n: int, device: torch.device) -> int:
    """A batch size for `call` on slices of 0..n: between 1 and `MOST`; `TRIAL` where memory cannot be measured."""
    trial = slice(0, min(n, TRIAL))
    if n <= TRIAL:
        return n
    call(trial)
    _give_back(device)
    timing.reset_peak(device)
    before = held(device)
    call(trial)
    peak, available = timing.peak_bytes(device), available_bytes(device)
    if before is None or peak is None or available is None:
        return TRIAL
    return batch_for((peak - before) / TRIAL, available, n)


def batch_for(bytes_per_item: float, available: int, n: int) -> int:
    """The largest batch that takes at most `SHARE` of the available bytes."""
    return max(1, min(n, MOST, int(SHARE * available / max(bytes_per_item, 1.0))))


def held(device: torch.device) -> int | None:
    """Bytes allocated on a GPU, resident in this process on a CPU; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _kilobytes(Path("/proc/self/status"), "VmRSS")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # what torch has cached is free to it
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _give_back(device: torch.device) -> None:
    """Return freed memory that the C library keeps: a call that takes it again would seem to take none."""
    if device.type == "cpu":
        with suppress(OSError, AttributeError, TypeError):  # elsewhere than with glibc
            ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
