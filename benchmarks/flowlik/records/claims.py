"""Claims: which process works on which cell of a folder."""

from __future__ import annotations

import os
from pathlib import Path

from flowlik.records.journal import storage
from flowlik_models.files import fcntl, locks_at

CLAIMS = ".claims"
_NO_CELL = 1 << 48


class Claims:
    """Which cells this process works on, among all that write into one folder.

    A claim is a lock on one byte of `.claims`, at the place that the cell's id spells: nothing is written, and a
    process that ends, however it ends, has no claims left.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / CLAIMS
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                with locks_at(folder):
                    self._lock(_NO_CELL, wait=True, shared=True)
            except OSError:
                os.close(self._descriptor)
                raise

    @property
    def folder_is_there(self) -> bool:
        """Whether the folder is still the one that the claims were made in."""
        try:
            return os.path.samestat(self._file.stat(), os.fstat(self._descriptor))
        except OSError:
            return False

    def take(self, cell_id: str, *, wait: bool = False) -> bool:
        """Claim a cell; False where another process has it (with `wait`, only after that one let go)."""
        try:
            self._lock(_place(cell_id), wait=wait)
        except (BlockingIOError, PermissionError):  # POSIX allows both
            return False
        return True

    def _lock(self, place: int, *, wait: bool, shared: bool = False) -> None:
        if fcntl is not None:
            how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
            fcntl.lockf(self._descriptor, how, 1, place)

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
