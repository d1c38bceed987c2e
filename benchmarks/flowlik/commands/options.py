"""What the commands share: the spelling of their options, and one line for the user where something is wrong."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer

TRAINED = Path("runs/train")
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder to write into; default: one below runs/.")
]
ShipOption = Annotated[bool, typer.Option("--ship", help="Copy the result into the source tree.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]

CheckpointsOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Folder of models of your own, such as runs/train; they come before the shipped ones.",
    ),
]

DataOption = Annotated[
    Path | None, typer.Option("--data-dir", envvar="FLOWLIK_DATA", help="Folder of the image data sets.")
]

InceptionOption = Annotated[
    Path | None,
    typer.Option(
        "--inception",
        envvar="FLOWLIK_INCEPTION",
        help="Weights of the standard Inception, for FID of images; see docs/images.md.",
    ),
]

RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]


def fail(message: str, status: int = 2) -> typer.Exit:
    """Print one line to the error stream; the caller raises what comes back."""
    with suppress(OSError):  # where standard error takes nothing, the status still says it
        typer.echo(f"flowlik: {message}", err=True)
    return typer.Exit(status)


def note(message: str) -> None:
    """Print one line to the error stream that is no failure."""
    typer.echo(f"flowlik: {message}", err=True)


@contextmanager
def bad_usage() -> Iterator[None]:
    """Turn what is wrong with the input into one line and exit status 2; with the disk, 1."""
    from flowlik.records.journal import StorageError
    from flowlik.running.retries import WorkerStartError

    try:
        yield
    except (StorageError, WorkerStartError) as error:
        raise fail(str(error), 1) from None
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's words, which flowlik.commands.surroundings puts into a line
        raise fail(" ".join(str(error).split())) from None


def use_checkpoints(folder: Path | None) -> None:
    """Look for models in this folder first, in this process and in those it starts; ValueError where it is none."""
    _look_in(folder, "FLOWLIK_CHECKPOINTS", "folder of checkpoints", "flowlik train TASK MODEL --out")


def use_data(folder: Path | None) -> None:
    """Look for image files in this folder, in this process and in those it starts; ValueError where it is none."""
    _look_in(folder, "FLOWLIK_DATA", "data folder", "flowlik data get NAME --data-dir")


def use_task_files(names: Iterable[str], *folders: Path) -> None:
    """Load the files among these names of tasks, and look for their stored references in these folders besides, and
    for their students where `flowlik train` puts them.

    What is started from here on has the files' folders on its path.

    Raises:
        ValueError: a file that is no task's; the line names it.
    """
    files = [name for name in names if name.endswith(".py")]
    if not files:
        return
    from flowlik.tasks.registry import get_task

    for name in files:
        get_task(name)
    places = [*folders, *(folder / "references" for folder in folders), Path("runs/references")]
    os.environ["FLOWLIK_REFERENCES"] = os.pathsep.join(str(place.resolve()) for place in places)
    os.environ["FLOWLIK_STUDENTS"] = str(TRAINED.resolve())


def use_inception(file: Path | None) -> None:
    """Judge samples of images by the Inception in this file, in this process and in those it starts; ValueError where
    it is not the well-known one."""
    if file is None:
        return
    from flowlik_models.features.inception import VARIABLE, check_weights

    check_weights(file.expanduser())
    os.environ[VARIABLE] = str(file.expanduser().resolve())


def _look_in(folder: Path | None, variable: str, what: str, maker: str) -> None:
    if folder is None:
        return
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such {what}; `{maker} {folder}` makes it")
    os.environ[variable] = str(folder.resolve())


def pick_device(name: str) -> str:
    """The device to use; `auto` is the first GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    valid = ("cpu", *(("cuda",) if gpus else ()), *(f"cuda:{index}" for index in range(gpus)))
    if name not in valid:
        raise ValueError(f"device {name!r} is not here (valid: auto, {', '.join(valid)})")
    return name
