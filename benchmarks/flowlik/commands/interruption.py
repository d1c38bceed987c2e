"""What surrounds a run: its command line, its limits in words, and what happens when somebody stops it."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from flowlik.records.environment import plain_argument


def command_line() -> tuple[str, ...]:
    """This command as records keep it: without the folders of this machine."""
    return ("flowlik", *(plain_argument(argument) for argument in sys.argv[1:]))


def resume_command(folder: Path) -> str:
    """The command that goes on where this one was stopped."""
    kept: list[str] = []
    arguments = iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--out":
            next(arguments, None)
        elif argument != "--resume" and not argument.startswith("--out="):
            kept.append(argument)
    return shlex.join(["flowlik", *kept, "--out", str(folder), "--resume"])


@dataclass
class Stopped:
    """Where records lie by the time a run is stopped; None before there are any."""

    folder: Path | None = None


@contextmanager
def interruptible() -> Iterator[Stopped]:
    """Ctrl-C, and a request to end from a scheduler: say how to go on, and leave with status 130."""
    stopped = Stopped()
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield stopped
    except KeyboardInterrupt:
        done = "nothing was run yet"
        if stopped.folder is not None:
            done = f"what is done is saved; go on with: {resume_command(stopped.folder)}"
        typer.echo(f"flowlik: interrupted; {done}", err=True)
        raise typer.Exit(130) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
