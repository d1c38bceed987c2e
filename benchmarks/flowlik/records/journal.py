"""Append-only JSON Lines files that several processes may write into, and the claims that share cells among them.

A line goes in by one `write` under an exclusive lock and is synced before anything else happens; a line that the disk
took only in part is taken out again. So after a kill at any moment the file holds whole lines, and at most one torn
last line, which is moved to `<file>.torn` by the next reader or writer. Locks are the kernel's and end with their
process.
"""

from __future__ import annotations

import errno
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from flowlik_models.files import FULL, LockError, locked, locked_for_reading

loads: Callable[[bytes], Any] = json.loads


with suppress(ImportError):  # where there is no build of it for the system, reading takes twice as long
    import orjson

    loads = orjson.loads


PARTIAL_RESULTS = "pieces"
"""Folder of a run that holds the partial results of cells under way (`flowlik.evaluation.batching.partial_results`)."""

CHUNK = 256


class StorageError(OSError):
    """The disk did not take something; the message is one line with the cure, and all earlier records are whole."""


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn what a disk refuses in the block into a `StorageError` that names the folder and the cure."""
    try:
        yield
    except StorageError:
        raise
    except LockError as error:
        raise StorageError(str(error)) from None
    except OSError as error:
        if error.errno is None or _is_elsewhere(error, path):
            raise  # no disk said that: its words are ours already; or it is of another place
        if error.errno in FULL:
            cause = "the disk is full; what is recorded is safe: free some space and go on with --resume"
        else:
            cause = f"cannot be written ({error.strerror or error}); what is recorded is safe"
        raise StorageError(f"{path}: {cause}") from None


def _is_elsewhere(error: OSError, path: Path) -> bool:
    """Whether the file that was refused lies neither below the path nor on the way to it."""
    if not isinstance(error.filename, str):
        return False
    refused = Path(error.filename)
    return not (refused.is_relative_to(path) or path.is_relative_to(refused))


def append(path: Path, line: bytes) -> int:
    """Append a line (newline included) to `path`, whole or not at all, and sync it to disk; where it ends.

    Raises:
        StorageError: the disk is full or cannot be written; the file is as it was before.
    """
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            with locked(descriptor, path.parent):
                _set_torn_line_aside(descriptor, path)
                return _write_whole(descriptor, line)
        finally:
            os.close(descriptor)


def _write_whole(descriptor: int, line: bytes) -> int:
    before = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except BaseException:
        os.ftruncate(descriptor, before)
        raise
    return before + len(line)


def set_torn_line_aside(path: Path) -> bool:
    """Move what follows the last newline of `path` to `<path>.torn`; True where there was something to move."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False  # not there, or not ours to change
    try:
        with locked(descriptor, path):
            return _set_torn_line_aside(descriptor, path)
    except LockError:
        return False
    finally:
        os.close(descriptor)


def _set_torn_line_aside(descriptor: int, path: Path) -> bool:
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return False
    end, torn = size, b""
    while end and b"\n" not in torn:
        start = max(0, end - 65536)
        torn = os.pread(descriptor, end - start, start) + torn
        end = start
    torn = torn[torn.rfind(b"\n") + 1 :]
    with path.with_name(path.name + ".torn").open("ab") as aside:
        aside.write(torn + b"\n")
    os.ftruncate(descriptor, size - len(torn))
    return True


def read(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Every whole row from byte `start` on, and where the next one will begin; torn lines as in `chunks`."""
    lines, end = _lines(path, start)
    return [row for rows in _parsed(path, lines) for row in rows], end


def chunks(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Every whole row, some hundred at a time: what is made of them is made while they are in the processor's cache.

    A torn last line is moved to `<path>.torn`; a line that is no JSON object is left out; both with a warning.
    """
    return _parsed(path, _lines(path, 0)[0])


def _lines(path: Path, start: int) -> tuple[list[bytes], int]:
    with path.open("rb") as file, locked_for_reading(file.fileno()):
        file.seek(start)
        data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        aside = f"set aside in {path.name}.torn" if set_torn_line_aside(path) else "left out"
        warnings.warn(f"{path.name}: the last line is torn and was {aside}", stacklevel=4)
    return data[:whole].split(b"\n"), start + whole


def _parsed(path: Path, lines: list[bytes]) -> Iterator[list[dict[str, Any]]]:
    torn = 0
    for begin in range(0, len(lines), CHUNK):
        part = [line for line in lines[begin : begin + CHUNK] if line.strip()]
        try:
            rows = loads(b"[" + b",".join(part) + b"]")  # in one call: half the time
        except (ValueError, RecursionError):
            rows = []
        if len(rows) != len(part) or not all(isinstance(row, dict) for row in rows):
            rows = [row for row in map(_row, part) if row is not None]
        torn += len(part) - len(rows)
        yield rows
    if torn:
        warnings.warn(f"{path.name}: {torn} lines are torn and were left out", stacklevel=3)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        # halves of characters, which no file of ours can hold, become question marks
        row = json.loads(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
