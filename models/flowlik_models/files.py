"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def no_room(path: Path, error: OSError, size: int | None = None) -> str:
    """One line for a file that could not be written: what is full or closed, and how much room it needs."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path}: cannot be written ({error.strerror or error})"
    needs = "" if size is None else f", needs {size / 1e6:,.0f} MB"
    return f"{path}: no space left on the device{needs}; free some room and try again"
