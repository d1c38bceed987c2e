"""Claims: which process works on which cell of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from flowlik.records.journal import fcntl, storage

CLAIMS = ".claims"


class Claims:
    """Which cells this process works on, among all that write into one folder.

    A claim is a lock on one byte of `.claims`, at the place that the cell's id spells: nothing is written, and a
    process that ends, however it ends, has no claims left.
    """

    def __init__(self, folder: Path) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder / CLAIMS, os.O_RDWR | os.O_CREAT, 0o644)

    def take(self, cell_id: str, *, wait: bool = False) -> bool:
        """Claim a cell; False where another process has it (with `wait`, only after that one let go)."""
        if fcntl is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, _place(cell_id))
        except BlockingIOError:
            return False
        return True

    def drop(self, cell_id: str) -> None:
        """Let a cell go."""
        if fcntl is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _place(cell_id))

    def close(self) -> None:
        """Let everything go."""
        os.close(self._descriptor)


def _place(cell_id: str) -> int:
    """A file position for a cell: 48 bits of its id."""
    return int(cell_id[:12], 16)
