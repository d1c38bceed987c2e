"""Files and folders that are there whole or not at all, and the locks of those who write them.

What is under way has a name of its own (`.flowlik-*.tmp`) beside its target and is locked by its writer. Whoever writes
into the folder next removes what a killed process left: what nobody has locked or, where there are no locks, what is
older than a day.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl as fcntl
except ImportError:  # Windows has no such locks: there, one process writes into one folder
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk says that takes no more."""

_PREFIX, _SUFFIX = ".flowlik-", ".tmp"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_ABANDONED = 86400.0  # seconds after which a temporary file belongs to nobody, where there are no locks
_LEVELS = 2  # below a run's folder lie `items`, `figures` and folders of partial results
_swept: set[Path] = set()


class LockError(OSError):
    """The file system has no locks; the message is one line with the cure."""


# --- whole or not at all ------------------------------------------------------------------------------------


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that the file is there whole or not at all."""
    with whole_file(path) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that stands at `path` once the block is through; nothing is left of it where that raises."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(path.parent)
    descriptor, temporary = _new_file(path.parent)
    try:
        with open(temporary, "wb", opener=lambda *_: descriptor) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)  # while it is locked
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # which is what whoever reads its line looks for
        raise


@contextmanager
def new_folder(beside: Path) -> Iterator[Path]:
    """A folder beside `beside`, on the same disk, for what is moved into place from there; removed in the end."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    _sweep_once(beside.parent)
    folder = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, beside.parent))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            _lock(descriptor)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _new_file(folder: Path) -> tuple[int, Path]:
    """An open temporary file that is locked, where there are locks."""
    while True:
        descriptor, name = tempfile.mkstemp(_SUFFIX, _PREFIX, folder)
        with suppress(OSError):
            _lock(descriptor)
        if os.fstat(descriptor).st_nlink:  # else it was taken for a leftover before it was locked
            return descriptor, Path(name)
        os.close(descriptor)


# --- what killed processes leave ----------------------------------------------------------------------------


def remove_leftovers(folder: Path) -> None:
    """Remove from a folder, and from two levels below it, the temporary files and folders that nobody writes."""
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        found += [Path(where) / name for name in (*folders, *names) if _is_temporary(name)]
        if len(Path(where).relative_to(folder).parts) == _LEVELS:
            folders.clear()
    for path in found:
        _remove_if_left(path)


def _sweep_once(folder: Path) -> None:
    """Remove the leftovers of one folder alone, when this process first writes there."""
    if folder in _swept:
        return
    _swept.add(folder)
    for path in folder.iterdir():
        if _is_temporary(path.name):
            _remove_if_left(path)


def _is_temporary(name: str) -> bool:
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def _remove_if_left(path: Path) -> None:
    with suppress(OSError):  # gone by now, or not ours to remove
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            if _is_left(descriptor):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            os.close(descriptor)


def _is_left(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except BlockingIOError:
        return False
    except OSError:
        pass
    return time.time() - os.fstat(descriptor).st_mtime > _ABANDONED


# --- locks --------------------------------------------------------------------------------------------------


def _lock(descriptor: int, *, shared: bool = False) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def _unlock(descriptor: int) -> None:
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def locks_at(path: Path) -> Iterator[None]:
    """Turn what a file system without locks says in the block into a `LockError` that names the path and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise LockError(
            f"{path}: its file system has no file locks ({error.strerror}), without which nothing is written here; "
            "write into a folder on a local disk and copy it here afterwards"
        ) from None


@contextmanager
def locked(descriptor: int, path: Path) -> Iterator[None]:
    """Hold the lock of an open file; raises LockError where its file system has none."""
    with locks_at(path):
        _lock(descriptor)
    try:
        yield
    finally:
        _unlock(descriptor)


@contextmanager
def locked_for_reading(descriptor: int) -> Iterator[None]:
    """Keep writers away from an open file, where there are locks."""
    held = False
    with suppress(OSError):
        _lock(descriptor, shared=True)
        held = fcntl is not None
    try:
        yield
    finally:
        if held:
            _unlock(descriptor)


@contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Wait until no other process is in such a block with this lock file; raises LockError where there are no locks."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with locked(descriptor, file.parent):
            yield
    finally:
        os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder and wait until no other process is in such a block with it, where there are locks."""
    descriptor = _locked_folder(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            _unlock(descriptor)  # a process forked meanwhile has the folder open, too
        os.close(descriptor)


@contextmanager
def kept_until_done(folder: Path) -> Iterator[None]:
    """`alone_in` a folder of partial results, which is removed once the block is through and stays where it raises."""
    with alone_in(folder):
        yield
        shutil.rmtree(folder, ignore_errors=True)


def _locked_folder(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):
            _lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # who had the lock has removed the folder


def no_room(path: Path, error: OSError, size: int | None = None) -> str:
    """One line for a file that could not be written: what is full or closed, and how much room it needs."""
    if error.errno not in FULL:
        return f"{path}: cannot be written ({error.strerror or error})"
    needs = "" if size is None else f", needs {size / 1e6:,.0f} MB"
    return f"{path}: no space left on the device{needs}; free some room and try again"
