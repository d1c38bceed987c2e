"""`flowlik train`: training with progress, the accuracy that goes on the model's card, and shipping.

The recipes and the trainer are those of `flowlik_models`; what the harness adds is the judgement: bits/dim against the
task's reference on points that training never saw.
"""

from __future__ import annotations

from pathlib import Path

from flowlik.records.environment import commit
from flowlik.records.paths import need_source_root
from flowlik.running.registry import is_follower
from flowlik.tasks.registry import get_task
from flowlik.training.card import accuracy, likelihood_error
from flowlik.training.progress import progress_of
from flowlik_models.files import remove_leftovers, write_atomically
from flowlik_models.training.feature_classifier import train_features
from flowlik_models.training.trainer import train


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
        ValueError: unknown task or model, an option without effect, a checkpoint it builds on is missing, or `ship`
            without a source tree.
    """
    found = get_task(task)
    if model == "features" and accumulate is not None:
        raise ValueError("--accumulate has no effect on features, whose batches are small")
    shipped = None
    if ship:
        shipped = need_source_root("--ship") / "models" / "flowlik_models" / "checkpoints" / task
    remove_leftovers(out / task)
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
        write_atomically(shipped / file.name, file.read_bytes())
    return shipped / path.name
