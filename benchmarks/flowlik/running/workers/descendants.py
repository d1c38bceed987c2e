"""Everything that a process has started, and what that started in turn: how much memory it holds, and its end."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PATIENCE = 2.0  # seconds until what cannot be killed (it waits for a disk, say) is left alone


def descendants(pid: int) -> list[int]:
    """The processes that any thread of `pid` has started, and theirs; none where the system does not say."""
    found: list[int] = []
    with suppress(OSError):
        for thread in list(Path(f"/proc/{pid}/task").iterdir()):
            with suppress(OSError):
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return [*found, *(below for child in found for below in descendants(child))]


def memory(pid: int, limit: int) -> int:
    """Bytes that a process and its descendants hold; beyond `limit`, what they share with each other counts once."""
    tree = [pid, *descendants(pid)]
    held = sum(map(_resident, tree))
    return held if held <= limit else sum(map(_proportional, tree))


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _proportional(pid: int) -> int:
    """Resident bytes, a page that several processes share in equal parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return _resident(pid)
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def end_all(pid: int) -> None:
    """Kill all descendants of a process, those that they start meanwhile too."""
    end = time.monotonic() + PATIENCE
    while (left := [child for child in descendants(pid) if _is_running(child)]) and time.monotonic() < end:
        for child in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.001)


def _is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
