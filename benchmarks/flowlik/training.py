"""`flowlik train`: training with progress, the accuracy that goes on the model's card, and shipping.

The recipes and the trainer are those of `flowlik_models`; what the harness adds is the judgement: bits/dim against the
task's reference on points that training never saw.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flowlik import measures
from flowlik.cells import Cell, Options
from flowlik.environment import commit
from flowlik.executors import is_follower
from flowlik.places import need_source_root
from flowlik.points import whole
from flowlik.tasks import Task, UnavailableError, get_task

if TYPE_CHECKING:
    from flowlik_models.training import Progress

STEPS = (1, 2, 4, 8)
JUDGED_ITEMS = 1000
FEW_DIMENSIONS = 8
JUDGED_STEPS = 32  # of a field
JUDGED_IMAGES = 128  # of more than 64 pixels: a field costs hundreds of evaluations an image
SMALL = 64  # dimensions
JUDGED_PAIRS = 500
JUDGED_DRAWS = 4000
REPEATED = 5  # times so many
WATCHED_ITEMS = 256  # while training goes on
PLAIN_LINE_EVERY = 30.0  # seconds


def train_model(
    task: str,
    model: str,
    *,
    out: Path,
    device: str = "cpu",
    seed: int = 0,
    steps: int | None = None,
    resume: bool = True,
    ship: bool = False,
    accumulate: int | None = None,
) -> Path:
    """Train a model of a task below `out`, note its accuracy on the card, and copy it into the source tree on `ship`.

    Model `features` is the classifier behind the Frechet distance of a data set of images.

    Returns:
        The checkpoint's path.

    Raises:
        ValueError: unknown task or model, a checkpoint it builds on is missing, or `ship` without a source tree.
    """
    from flowlik_models.feature_training import train_features
    from flowlik_models.training import train

    found = get_task(task)
    shipped = None
    if ship:
        shipped = need_source_root("--ship") / "models" / "flowlik_models" / "checkpoints" / task
    with progress_of(f"{task} {model}") as progress:
        if model == "features":
            if is_follower():  # small, and trained by one process
                return out / task / f"{model}.safetensors"
            path = train_features(
                out / task / f"{model}.safetensors",
                task,
                device=device,
                seed=seed,
                steps=steps,
                progress=progress,
                commit=commit()[0],
            )
            return _placed(path, shipped)
        path = train(
            task,
            model,
            out=out,
            device=device,
            seed=seed,
            steps=steps,
            resume=resume,
            progress=progress,
            validate=lambda network: accuracy(found, network, device),
            quick_validate=lambda network: likelihood_error(found, network, device),
            commit=commit()[0],
            accumulate=accumulate,
        )
    return path if is_follower() else _placed(path, shipped)


def _placed(path: Path, shipped: Path | None) -> Path:
    """The checkpoint's path, after copying it with its card into the source tree where that was asked for."""
    if shipped is None:
        return path
    shipped.mkdir(parents=True, exist_ok=True)
    for file in (path.with_suffix(".json"), path):
        shutil.copyfile(file, shipped / file.name)
    return shipped / path.name


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a plain line every half minute otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console()
    if is_follower():
        yield lambda _: None
        return
    if not console.is_terminal:
        last = [-PLAIN_LINE_EVERY]

        def line(progress: Progress) -> None:
            if progress.step == progress.steps or progress.seconds - last[0] >= PLAIN_LINE_EVERY:
                last[0] = progress.seconds
                step = f"step {progress.step}/{progress.steps}"
                text = f"{title}: {step}  {_state(progress)}  {progress.seconds:.0f}s"
                console.print(text, soft_wrap=True, highlight=False)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console) as bar:
        row = bar.add_task(title, total=None)
        yield lambda progress: bar.update(
            row,
            completed=progress.step,
            total=progress.steps,
            description=f"{title}  {_state(progress)}",
        )


def _state(progress: Progress) -> str:
    """Loss, speed and error of the likelihood where they are known, and skipped steps where there are any."""
    text = f"loss {progress.loss:.4g}"
    if progress.flops is not None:
        text += f"  {progress.rate:.0f} images/s  {_operations(progress.flops)}FLOP/s"
    if progress.utilisation is not None:
        text += f" ({progress.utilisation:.0%} of the bf16 peak)"
    if progress.validation is not None:
        text += f"  error {progress.validation:.3g} bits/dim"
    return text + (f"  {progress.skipped} skipped" if progress.skipped else "")


def _operations(flops: float) -> str:
    """Operations a second with a prefix, up to where `FLOP/s` goes on."""
    for prefix, size in (("P", 1e15), ("T", 1e12)):
        if flops >= size:
            return f"{flops / size:.3g} {prefix}"
    return f"{flops / 1e9:.3g} G"


def likelihood_error(task: Task, network: Any, device: str) -> float | None:
    """Mean |error| of the one-step likelihood in bits/dim on a part of the test items; None for a model without one."""
    from flowlik_estimators import get

    if hasattr(network, "joint"):
        estimator = get("f2d2", steps=1)
    elif getattr(network, "frozen_density", False):
        estimator = get("pi-flow", segments=min(network.segments))
    else:
        return None
    try:
        return _judged(task, network, estimator, "test", device, items=WATCHED_ITEMS).get("bpd_mae")
    except UnavailableError:
        return None


def accuracy(task: Task, network: Any, device: str) -> dict[str, Any]:
    """What goes on a model's card: bits/dim and, where there is a reference, bias and mean |error|, by split and steps.

    A joint map is judged by `f2d2`, a map alone by its cycle error, a field by `ode`, beyond a few dimensions with
    Hutchinson's trace, a generator of x_1 given x_0 by its density on the pairs it is trained for and by their energy
    distance.
    """
    from flowlik_estimators import get

    if hasattr(network, "joint"):
        estimators = [get("f2d2", steps=steps) for steps in STEPS]
    elif hasattr(network, "policy"):
        jacobians = ("frozen",) if network.frozen_density else ("full",)
        estimators = [get("pi-flow", segments=n, jacobian=j) for n in network.segments for j in jacobians]
    elif getattr(network, "conditional", False):
        return {"pairs": _of_pairs(task, network, device)}
    elif hasattr(network, "generate"):
        estimators = _of_generator(task, network)
    elif hasattr(network, "average_velocity"):
        return {"cycle_error": {str(steps): _cycle(task, network, steps, device) for steps in STEPS}}
    elif not hasattr(network, "velocity"):
        return {}
    else:
        trace = "exact" if task.dim <= FEW_DIMENSIONS else "hutchinson"
        estimators = [get("ode", solver="rk4", steps=JUDGED_STEPS, grid="logsnr", trace=trace)]
    report: dict[str, Any] = {}
    for split in task.splits if task.levels else ("test",):
        for estimator in estimators:
            try:
                report.setdefault(split, {})[estimator.label] = _judged(
                    task, network, estimator, split, device
                )
            except UnavailableError:
                continue
    return report


def _of_generator(task: Task, network: Any) -> list[Any]:
    """Routes of a one-step generator that are quick enough for a card: those in the plane."""
    from flowlik_estimators import get

    if task.dim > FEW_DIMENSIONS:
        return []
    routes = ("invert", "fake-flow") if network.fake_is_flow else ("invert",)
    return [get("generator", route=route) for route in routes]


def _of_pairs(task: Task, network: Any, device: str) -> dict[str, float]:
    """Of a generator of x_1 given x_0: bits/dim of log p(x_1 | x_0) and its error against the coupling's, the share of
    points with a root, and the energy distance of pairs with generated x_1 to true pairs.

    That of fresh true pairs stands beside it: what the same number of draws gives where nothing is wrong.
    """
    from flowlik.samples import energy_distance
    from flowlik_estimators import get
    from flowlik_models.coupling import TurnedPairs
    from flowlik_models.synthetic import closed_form

    coupling = TurnedPairs(closed_form(task.id))  # type: ignore[arg-type]
    draws = torch.Generator().manual_seed(0)

    def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = coupling.truth.sample(n, generator=draws, dtype=torch.float64)
        return coupling.pairs(x, draws).to(device), x.to(device)

    model = copy.deepcopy(network).to(device).double().eval()
    start, end = pairs(JUDGED_PAIRS)
    found = get("generator").log_prob(model, end, cond=start)
    valid = found.valid.cpu()
    bpd, truth = (
        measures.bits_per_dim(of.cpu()[valid].numpy(), task.dim)
        for of in (found.log_prob, coupling.log_prob(end.cpu(), start.cpu()))
    )
    error = bpd - truth
    distances = []
    for _ in range(REPEATED):
        (others, _), fresh, true = pairs(JUDGED_DRAWS), pairs(JUDGED_DRAWS), pairs(JUDGED_DRAWS)
        with torch.no_grad():
            made = model.generate(torch.randn(others.shape, generator=draws).to(others), cond=others)
        known = torch.cat(true, 1)
        distances.append([energy_distance(torch.cat(of, 1), known) for of in ((others, made), fresh)])
    generated, drawn = torch.tensor(distances).T
    row = {
        "bpd": bpd.mean(),
        "bpd_error": error.mean(),
        "bpd_mae": np.abs(error).mean(),
        "valid_share": float(valid.double().mean()),
        "energy_distance": float(generated.mean()),
        "energy_distance_se": float(generated.std()) / math.sqrt(REPEATED),
        "energy_distance_fresh": float(drawn.mean()),
    }
    return _rounded(row)


def _rounded(row: dict[str, Any]) -> dict[str, float]:
    """What is known, to four digits."""
    return {name: float(f"{value:.4g}") for name, value in row.items() if np.isfinite(value)}


def _judged(
    task: Task, network: Any, estimator: Any, split: str, device: str, items: int = JUDGED_ITEMS
) -> dict[str, float]:
    from flowlik.evaluation import evaluate

    if task.dim > SMALL:
        items = min(items, JUDGED_IMAGES)
    cell = Cell(
        task=task.id,
        model="",
        estimator=estimator,
        device=device,
        options=Options(split=split, n_items=items, batch_size=500),
    )
    points = task.items(split, items)
    points = replace(points, x=points.x.to(torch.float32))
    out = evaluate(cell, network, points.x, points.ids)
    shape = (points.draws, points.n)
    try:
        truth = task.reference(split, points, estimator.data_end(network)).log_prob
    except (UnavailableError, ValueError):
        truth = np.full(shape, np.nan)
    levels = None if split == "teacher-samples" else task.levels
    row = measures.summarise(
        out.log_prob.reshape(shape), truth, out.valid.reshape(shape), dim=task.dim, levels=levels
    )
    return _rounded({name: row[name] for name in ("bpd", "bpd_error", "bpd_mae", "spearman") if name in row})


def _cycle(task: Task, network: Any, steps: int, device: str) -> float:
    from flowlik.density import cycle_error
    from flowlik_estimators import get

    x = whole(task.items("test", JUDGED_ITEMS).x).to(device=device, dtype=torch.float32)
    error = cycle_error(get("meanflow", steps=steps), network, x)
    return float("nan") if error is None else float(f"{error:.4g}")
