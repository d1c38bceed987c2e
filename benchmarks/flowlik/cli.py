"""The command line `flowlik`.

Exit status: 0 all is well (cells ok, or skipped with a reason), 1 a cell or a gate failed, 2 bad usage or bad data (one
line says what, and what would be right). Live progress on a terminal, plain lines otherwise.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated

import typer

from flowlik import __version__
from flowlik.commands import build, inspect, results
from flowlik.commands.run import run
from flowlik.commands.surroundings import Commands

app = typer.Typer(
    name="flowlik",
    cls=Commands,
    help="How fast and how wrong are likelihood estimators of flow-based generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are parameters of estimators
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"flowlik {__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "list": inspect.list_,
    "train": build.train,
    "reference": build.reference,
    "figures": results.figures,
    "table": results.table,
    "report": results.report,
    "recommend": results.recommend,
    "compare": results.compare,
    "reproduce": results.reproduce,
    "merge": results.merge,
    "gallery": results.gallery,
    "check": inspect.check,
    "score": inspect.score,
    "device": inspect.device,
    "data": build.data,
    "sysinfo": inspect.sysinfo,
}
for name, command in COMMANDS.items():
    app.command(name)(command)
INTERRUPTED = 130


def main() -> None:
    """Entry point of the console script."""
    warnings.formatwarning = lambda message, *_, **__: f"flowlik: {' '.join(str(message).split())}\n"
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # who stops a program does not wait for its libraries to be put away
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
    finally:
        gc.freeze()  # the process ends, and the system takes back what looking through it would free


if __name__ == "__main__":
    main()
