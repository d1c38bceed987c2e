"""What surrounds every command: what the system refuses is one line with the cure, and nobody's settings change it."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from flowlik.commands.options import fail
from flowlik_models.files import FULL

_SHOWN = 120  # characters of a path that a line shows
_LONGEST_NAME = 255  # bytes, on every file system in use
_ROOM_FOR_NAMES = 200  # bytes of a path that what is written into a folder adds
_CURES: dict[int | None, str] = {
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links point at one another",
    **dict.fromkeys(FULL, "free some space and give the same command again"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS), "give another place or change who may read and write there"
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files (ulimit -n)"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file stands where a folder should be"),
    errno.EISDIR: "a folder stands where a file should be",
    errno.ENOENT: "give the path of one that is there",
}
_OF_PATHS = {
    "home directory": "a path begins with ~, and there is no such home folder: write it out",
    "Symlink loop": "too many levels of symbolic links: those of a path that was given point at one another",
}


class Commands(TyperGroup):
    """The commands, each of which ends with one line where the system refuses something."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        settle()
        with one_line():
            return super().invoke(ctx)


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what the system refuses into one line and an exit status: 1 where a disk is full, else 2."""
    try:
        _need_a_working_directory()
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # nobody reads any more, and typer ends without a word
        raise fail(refusal(error), 1 if error.errno in FULL else 2) from None
    except RecursionError:
        raise fail("nested too deeply to be read: expected a few levels", 2) from None
    except MemoryError:
        raise fail("not enough memory: ask for fewer items or a smaller batch", 1) from None
    except RuntimeError as error:  # of pathlib
        line = next((line for words, line in _OF_PATHS.items() if words in str(error)), None)
        if line is None:
            raise
        raise fail(line) from None


def _need_a_working_directory() -> None:
    """End here where it was removed: libraries would crash on it."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise fail("the working directory was removed: change to one that is there", 2) from None


def refusal(error: OSError) -> str:
    """One line for what the system refused: where, why, and the cure."""
    where = shortened(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else ""
    if not where and _is_of_a_stream(error):
        where = "standard output"
    why = (error.strerror or " ".join(str(error).split()) or type(error).__name__).lower()
    cure = _CURES.get(error.errno)
    return f"{f'{where}: ' if where else ''}{why}{f'; {cure}' if cure else ''}"


def shortened(path: str) -> str:
    """A path that fits on a line: of a long one the beginning and the end."""
    return path if len(path) <= _SHOWN else f"{path[: _SHOWN // 2]}...{path[-_SHOWN // 2 :]}"


def _is_of_a_stream(error: OSError) -> bool:
    """Whether it was a line of ours that nothing took, and no file."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(
        frame.f_globals.get("__name__") in (typer.echo.__module__, "rich.console") for frame, _ in frames
    )


def settle() -> None:
    """Make this process, and those it starts, independent of the user's plotting settings and of the alphabet of the
    terminal: figures go into files, and a character that a stream cannot hold is written as its number."""
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def need_room(folder: Path) -> None:
    """Try a file where a folder that results will be written into is or will be; nothing is made.

    Raises:
        OSError: nothing can be written there.
        ValueError: its name is not UTF-8, which checkpoints need.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in str(folder.absolute())):
        raise ValueError(
            f"{folder}: its name is not UTF-8, and no checkpoint could be read there: give another"
        )
    try:
        with suppress(FileNotFoundError):
            (folder / ("x" * _ROOM_FOR_NAMES)).stat()
        too_long = any(len(os.fsencode(part)) > _LONGEST_NAME for part in folder.parts)
        there = folder
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 16))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    if too_long:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(folder))
