"""File systems without locks, and folders in which a process was killed, for the tests of what writes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from flowlik_models.files import new_folder, whole_file


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOLCK) -> None:
    """As some network file systems: no file has a lock."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(fcntl, "lockf", refuse)


def killed_while_writing(folder: Path) -> None:
    """A process that is killed in the middle of a file and of a folder."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with whole_file(folder / "file") as file, new_folder(folder / "figures") as made:
            file.write(b"half")
            (made / "a.png").write_bytes(b"half")
            os.write(write, b"x")
            time.sleep(60)
    os.read(read, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
