"""`flowlik train`, `reference` and `data`: what runs build on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flowlik.commands.options import (
    TRAINED,
    CheckpointsOption,
    DataOption,
    DeviceOption,
    JsonOption,
    OutOption,
    ShipOption,
    bad_usage,
    fail,
    pick_device,
    use_checkpoints,
    use_data,
)
from flowlik.commands.surroundings import need_room


def train(
    task: str,
    model: str,
    out: OutOption = None,
    ship: ShipOption = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Number of steps instead of the recipe's.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted training.")] = True,
    accumulate: Annotated[
        int | None, typer.Option(help="Parts a process takes its batch in, to need less memory.", min=1)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Of a file: time for trajectories and training, instead of the recipe's steps."),
    ] = None,
    data_dir: DataOption = None,
) -> None:
    """Train a model from nothing, or go on where an interrupted training stopped.

    With a file, mine.py, the reference model of its task is distilled: direct-f2d2, meanflow-f2d2,
    shortcut-distill-f2d2, lsd-f2d2, and direct-f2d2-calibrated after direct-f2d2.
    """
    from flowlik.running.registry import is_follower
    from flowlik.tasks.stored_references import FOLDER
    from flowlik.training.train import train_model
    from flowlik_models.training.trainer import TrainingError

    with bad_usage():
        use_data(data_dir)
        chosen = pick_device(device)
        folder = out or TRAINED
        need_room(folder)
        if task.endswith(".py"):
            if ship or accumulate is not None:
                raise ValueError(f"{task}: --ship and --accumulate are for the built-in tasks")
            return _distilled(
                task, model, folder, chosen, minutes=minutes, steps=steps, seed=seed, resume=resume
            )
        if minutes is not None:
            raise ValueError(f"--minutes is for files with a task; {task} takes --steps")
        # of a teacher trained here: the card tells how far its students are from it
        if (folder / FOLDER).is_dir():
            use_checkpoints(folder)
        options: dict[str, Any] = {"seed": seed, "steps": steps, "resume": resume, "ship": ship}
        options["accumulate"] = accumulate
        try:
            path = train_model(task, model, out=folder, device=chosen, **options)
        except TrainingError as error:
            raise fail(str(error), 1) from None
    if not is_follower():
        typer.echo(f"checkpoint: {path}")


def _distilled(file: str, model: str, out: Path, device: str, **options: Any) -> None:
    """Distil the teacher in a file, print the student's card and how to go on."""
    from flowlik.scoring.distill import distill_task
    from flowlik.tasks.arrays import ArrayTask
    from flowlik.tasks.registry import get_task
    from flowlik_models.training.trainer import TrainingError

    task = get_task(file)
    if not isinstance(task, ArrayTask):
        raise ValueError(f"{file}: TASK is of type {type(task).__name__}, expected a flowlik.ArrayTask")
    try:
        path = distill_task(task, model, out=out, device=device, say=typer.echo, **options)
    except TrainingError as error:
        raise fail(str(error), 1) from None
    where = "" if out == TRAINED else f" --checkpoints {out}"
    typer.echo(
        f"checkpoint: {path}; flowlik run -t {file} -m {model}{where} -e 'f2d2[steps=1|2|4|8]' judges it"
    )


def reference(
    task: str,
    out: OutOption = None,
    ship: ShipOption = False,
    device: DeviceOption = "auto",
    limit: Annotated[
        int | None, typer.Option(help="Items a split (default 256, of pooled probes 500).", min=2)
    ] = None,
    stderr: Annotated[
        float | None,
        typer.Option(
            help="Standard error of an item, bits/dim, that pooled probes reach (images of more than 128 numbers: "
            "0.005); others take the exact trace without it."
        ),
    ] = None,
    checkpoints: CheckpointsOption = None,
    data_dir: DataOption = None,
) -> None:
    """Compute the task's converged likelihoods and the checks they passed; an interrupted call goes on."""
    from flowlik.references.make import make_reference, ship_reference
    from flowlik.tasks.registry import get_task
    from flowlik.tasks.stored_references import FOLDER, own_checkpoints
    from flowlik.tasks.task import UnavailableError

    with bad_usage():
        use_data(data_dir)
        use_checkpoints(checkpoints)
        chosen = pick_device(device)
        found = get_task(task)
        task = found.id
        if ship and found.reference_folders:
            raise ValueError(f"--ship copies into the source tree, where {found.id} is none of the tasks")
        found.check([found.reference_model] if found.reference_model in found.given_models else [], chosen)
        folder = out or (own_checkpoints() or Path("runs")) / FOLDER
        need_room(folder)
    try:
        path = make_reference(task, folder, device=chosen, limit=limit, stderr=stderr, progress=typer.echo)
        if ship:
            path = ship_reference(task, folder)
    except UnavailableError as error:
        raise fail(str(error)) from None
    except ValueError as error:
        raise fail(" ".join(str(error).split()), 1) from None
    typer.echo(f"reference: {path}")


def data(
    action: Annotated[str | None, typer.Argument(metavar="[get]", help="get: fetch NAME.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A data set of images.")] = None,
    data_dir: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which data is where and whether it is as published, or get a data set from its official address."""
    from flowlik.commands import data_sets
    from flowlik_models.names import unknown

    with bad_usage():
        if action not in (None, "get"):
            raise ValueError(unknown("action", str(action), ("get",)))
        if action == "get" and name is None:
            raise ValueError("flowlik data get needs a name: flowlik data lists them")
        if action == "get" and as_json:
            raise ValueError("--json prints the list of flowlik data; data get has none")
        if name is not None:
            data_sets.check_get(name, data_dir)
    if name is not None and data_dir is not None:
        try:
            folder = data_sets.get(name, data_dir)
        except ValueError as error:
            raise fail(" ".join(str(error).split()), 1) from None
        except KeyboardInterrupt:
            raise fail(f"interrupted; the same command goes on: flowlik data get {name}", 130) from None
        typer.echo(f"{name}: {folder}")
        return
    found = data_sets.listing(data_dir)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    data_sets.print_listing(found, data_dir)
