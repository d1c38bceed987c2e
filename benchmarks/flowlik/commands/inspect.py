"""`flowlik list`, `check`, `score`, `device` and `sysinfo`: what is here, whether it is right, and what it is worth."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowlik.commands.options import (
    CheckpointsOption,
    DataOption,
    DeviceOption,
    JsonOption,
    OutOption,
    bad_usage,
    fail,
    pick_device,
    use_checkpoints,
    use_data,
)
from flowlik.commands.surroundings import need_room
from flowlik.commands.units import parse_duration

if TYPE_CHECKING:
    from flowlik.checks.contract import ContractVerdict
    from flowlik.checks.gates import Gate, Verdict

LISTS = ("estimators", "tasks", "models", "suites")


def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[estimators|tasks|models|suites]")] = None,
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME|mine.py]",
            help="One of them alone: an estimator's options, a task's models a line each. After tasks and models "
            "also a file with a task of your own.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: estimators, tasks, models and suites."""
    from flowlik.commands.listing import listed, one_alone
    from flowlik_models.names import unknown

    with bad_usage():
        if kind is not None and kind not in LISTS:
            raise ValueError(unknown("list", kind, LISTS))
        if file is not None:
            of = _of_file if file.endswith(".py") else one_alone
            found = {str(kind): of(str(kind), file)}
        else:
            found = {name: listed(name) for name in (LISTS if kind is None else (kind,))}
    if as_json:
        typer.echo(json.dumps(found if kind is None else found[kind], indent=2))
        return
    for name, entries in found.items():
        if kind is None:
            typer.echo(f"{name}:")
        for entry, text in entries.items():
            typer.echo(f"{'' if kind else '  '}{entry:<20} {text.replace('``', '`')}".rstrip())


def _of_file(kind: str, file: str) -> dict[str, str]:
    """What `list tasks mine.py` and `list models mine.py` say."""
    if kind not in ("tasks", "models"):
        raise ValueError(
            f"list {kind} {file}: a file (its name ends in .py) stands after tasks or models alone"
        )
    from flowlik.tasks.registry import get_task

    task = get_task(file)
    return {task.id: task.description if kind == "tasks" else ", ".join(task.models)}


def check(
    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[mine.py]", help="A file with a task of your own: its models are examined instead."
        ),
    ] = None,
    plugins: Annotated[
        bool, typer.Option("--plugins", help="Contract tests on every estimator instead.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Note the measured values in the baselines.")
    ] = False,
    only: Annotated[
        str | None, typer.Option("--only", help="Only gates (estimators) whose id contains this.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Run the accuracy and NFE gates of results/baselines, or the contract tests; or examine models of your own."""
    if file is not None:
        with bad_usage():
            if plugins or update or only is not None:
                raise ValueError(
                    f"check {file} examines its models; --plugins, --update and --only have no effect"
                )
            found = _examined(file, pick_device(device))
        raise typer.Exit(1 if found else 0)
    with bad_usage():
        chosen = pick_device(device)
        if plugins and update:
            raise ValueError(
                "--update notes what the gates measure; contract tests (--plugins) measure nothing"
            )
        if plugins and device != "auto":
            raise ValueError("--device is where gates run; contract tests (--plugins) run on the CPU")
        names = _estimators(only) if plugins else ()
        wanted = None if plugins else _gates(only)
    failed = count = 0
    for verdict in _contract_verdicts(names) if wanted is None else _gate_verdicts(wanted, chosen, update):
        typer.echo(verdict.line())
        count, failed = count + 1, failed + (not verdict.passed)
    typer.echo(f"{count} checks: {count - failed} passed, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _examined(file: str, device: str) -> int:
    """Print what the examination finds in every model of a file's task; how many findings there are."""
    from flowlik.checks.examination import examined

    count = 0
    for model, findings in examined(file, device):
        for finding in findings:
            typer.echo(f"{model}: {finding}")
        if not findings:
            typer.echo(f"{model}: nothing found")
        count += len(findings)
    return count


def score(
    task: Annotated[
        str, typer.Argument(metavar="mine.py", help="A file with a task of your own, or a task.")
    ],
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="Only these models of a file; default all.")
    ] = None,
    split: Annotated[str, typer.Option(help="What is scored: test or train.")] = "test",
    limit: Annotated[int | None, typer.Option(help="At most so many items.", min=1)] = None,
    accuracy: Annotated[
        float | None,
        typer.Option(help="Bits/dim that the stated error stays within (without a budget 0.01)."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Evaluations and derivative products an item at most.")
    ] = None,
    levels: Annotated[
        int | None, typer.Option(help="Of data that are scaled to [-1, 1] and dequantised already.", min=2)
    ] = None,
    weights: Annotated[
        int, typer.Option(help="Dequantisations an item; above 1 importance-weighted.", min=1)
    ] = 1,
    truncated_normal: Annotated[
        float,
        typer.Option(
            help="Dequantisation by a normal, cut at so many standard deviations; 0: uniform.", min=0
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the probes and of the pilot.")] = 0,
    out: OutOption = None,
    device: DeviceOption = "auto",
    checkpoints: CheckpointsOption = None,
    data_dir: DataOption = None,
) -> None:
    """Bits/dim of a model by an estimator that a pilot chooses, with its error; an interrupted call goes on."""
    from flowlik.scoring.score import Options, score_task
    from flowlik.tasks.registry import get_task
    from flowlik.tasks.task import UnavailableError

    with bad_usage():
        use_checkpoints(checkpoints)
        use_data(data_dir)
        chosen = pick_device(device)
        found = get_task(task)
        models = model or (found.given_models if task.endswith(".py") else [found.reference_model])
        folder = out or Path("runs/score") / found.id
        need_room(folder)
        options = Options(
            accuracy=accuracy, budget=budget, weights=weights, truncated_normal=truncated_normal, seed=seed
        )
        where = {"split": split, "limit": limit, "levels": levels, "device": chosen, "out": folder}
        try:
            found.check(models, chosen)
            for name in models:
                line = score_task(found, name, options, progress=_to_stderr, **where)  # type: ignore[arg-type]
                typer.echo(str(line))
        except UnavailableError as error:
            raise fail(str(error)) from None
        except KeyboardInterrupt:
            raise fail("interrupted; what is done is saved, the same command goes on", 130) from None


def _to_stderr(line: str) -> None:
    typer.echo(line, err=True)


def _gates(only: str | None) -> list[Gate]:
    from flowlik.checks.gates import load_gates

    return load_gates(only=only)


def _estimators(only: str | None) -> tuple[str, ...]:
    from flowlik_estimators import available

    names = tuple(name for name in available() if only is None or only in name)
    if not names:
        raise ValueError(f"no estimator contains {only!r} (valid: {', '.join(available())})")
    return names


def _contract_verdicts(names: tuple[str, ...]) -> Iterator[ContractVerdict]:
    from flowlik.checks.contract import contract_verdicts

    return contract_verdicts(names)


def _gate_verdicts(wanted: list[Gate], device: str, update: bool) -> Iterator[Verdict]:
    from flowlik.checks.gates import note_measured, run_gates

    verdicts = []
    for verdict in run_gates(wanted, device=device):
        verdicts.append(verdict)
        yield verdict
    if update:
        note_measured(verdicts)


def device(
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            help="Only this one, may be given several times: environment, agreement, synchronisations, timings, "
            "precision, memory, objectives, cifar10.",
        ),
    ] = None,
    time_limit: Annotated[str, typer.Option("--time-limit", help="Of each part: 90s, 30m or 8h.")] = "10m",
    out: OutOption = None,
    device: DeviceOption = "auto",
    data_dir: DataOption = None,
) -> None:
    """Try the suite on a GPU part by part, a JSON line each; without one the same at a hundredth of the size."""
    from flowlik.checks.device.run import FILE, Plan, run_parts
    from flowlik.records.writing import to_line

    failed = False
    with bad_usage():
        use_data(data_dir)
        folder = out or Path("runs/device")
        seconds = parse_duration(time_limit, "--time-limit")
        plan = Plan(parts=part or (), seconds=seconds, device=pick_device(device), folder=folder)
        need_room(folder)
        try:
            for line in run_parts(plan):
                typer.echo(to_line(line).decode().rstrip())
                failed |= line["status"] in ("failed", "timeout")
        except KeyboardInterrupt:
            raise fail(
                "interrupted; the parts that are done are kept, the same command goes on", 130
            ) from None
    typer.echo(f"lines: {folder / FILE}")
    raise typer.Exit(1 if failed else 0)


def sysinfo(as_json: JsonOption = False) -> None:
    """Print the environment that records would name."""
    from flowlik.records.environment import describe

    row = {name: value for name, value in describe().items() if name not in ("argv", "env_id")}
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    for name, value in row.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{name:<18} {text}")
