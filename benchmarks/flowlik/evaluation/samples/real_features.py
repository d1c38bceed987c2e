"""Features of a task's training images, which samples are held against: their normal law, and some of them as they are.

Of image data sets they are kept in the cache folder, by the hashes of images and extractor. The standard Inception
takes every training image in its 8 bits, as published values do; a task's own network the dequantised images of
`Task.real_samples`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowlik.evaluation.samples.extractors import standard_extractor
from flowlik.measures.frechet import Normal, Sums, features_of, normal_of
from flowlik.measures.precision_recall import NEIGHBOURS, mean_kernel, radii
from flowlik.tasks.task import Task
from flowlik_models.checkpoints import CheckpointError, read_tensors, save_tensors, tensors_digest
from flowlik_models.files import no_room
from flowlik_models.images import ImageSet, cache_dir, evaluation_order

KEPT = 10_000
"""Images on each side that kernel distance, precision and recall compare, whose cost is the product of the two."""

ROWS = 1024
_SAID_EVERY = 10 * ROWS


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """`normal` of all `count` images; of at most `KEPT` of them the `features` (m, f), float32, the distance from each
    to its third nearest other one, `radii` (m,), and the mean of the kernel over pairs of them, `kernel`."""

    count: int
    normal: Normal
    features: Tensor
    radii: Tensor
    kernel: float


def real_features(task: Task, extractor: Any, device: torch.device) -> RealFeatures | None:
    """Features of the training images by that extractor, computed on `device`, held on the CPU; None where the task has
    no real items.

    Raises:
        UnavailableError: the images are not there.
    """
    identity = f"{task.data_hash('train')}-{extractor.name}-{_weights_hash(extractor)}"
    file = cache_dir() / "features" / f"{task.id}-train-{identity}.safetensors"

    def make() -> RealFeatures | None:
        network = extractor.to(device)
        if extractor.name == standard_extractor(task):
            return _of_images(network, task.images("train"), device)  # type: ignore[attr-defined]
        real = task.real_samples()
        return None if real is None else _of_tensor(network, real.to(device))

    return _known(_Source(identity, file if task.eight_bit_images else None, make))


def _weights_hash(extractor: torch.nn.Module) -> str:
    return tensors_digest(extractor.state_dict())[:12]


@dataclass(frozen=True)
class _Source:
    identity: str
    file: Path | None
    make: Callable[[], RealFeatures | None] = field(compare=False)


@lru_cache(maxsize=4)
def _known(source: _Source) -> RealFeatures | None:
    file = source.file
    if file is None:
        return source.make()
    if file.is_file():
        try:
            return load(file, source.identity)
        except CheckpointError as error:
            warnings.warn(f"{error}; made again", stacklevel=2)
    found = source.make()
    if found is None:
        return None
    try:
        save(file, found, source.identity)
    except OSError as error:
        warnings.warn(f"the features of real images are not kept: {no_room(file, error)}", stacklevel=2)
    return found


# --- computing ----------------------------------------------------------------------------------------------
def _of_tensor(extractor: Any, images: Tensor) -> RealFeatures:
    features = features_of(extractor, images)
    return _finished(len(features), normal_of(features), features[:KEPT])


def _of_images(extractor: Any, images: ImageSet, device: torch.device) -> RealFeatures:
    """All images of a set, streamed in their 8 bits; those kept are the first of the order of evaluation."""
    chosen = torch.from_numpy(evaluation_order(len(images))[:KEPT])
    place = torch.full((len(images),), -1)
    place[chosen] = torch.arange(len(chosen))
    kept = torch.empty(len(chosen), extractor.num_features)
    sums = Sums()
    for chunk in images.chunks(ROWS):
        if sums.count % _SAID_EVERY == 0:
            _say(f"{extractor.name}: features of the training images, {sums.count:,} of {len(images):,}")
        features = features_of(extractor, torch.tensor(chunk, device=device))
        here = place[sums.count : sums.count + len(chunk)]
        kept[here[here >= 0]] = features[(here >= 0).to(device)].cpu()
        sums.add(features)
    return _finished(sums.count, sums.normal(), kept.to(device))


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - minutes of silence would look like a hang


def _finished(count: int, normal: Normal, features: Tensor) -> RealFeatures:
    around = radii(features) if len(features) > NEIGHBOURS else torch.zeros(len(features))
    return RealFeatures(
        count,
        Normal(normal.mean.cpu(), normal.covariance.cpu()),
        features.cpu(),
        around.cpu(),
        mean_kernel(features),
    )


# --- keeping ------------------------------------------------------------------------------------------------
def save(path: Path, found: RealFeatures, identity: str) -> None:
    """Write features to ``path`` as safetensors, whole or not at all."""
    tensors = {
        "mean": found.normal.mean,
        "covariance": found.normal.covariance,
        "features": found.features,
        "radii": found.radii,
        "kernel": torch.tensor(found.kernel, dtype=torch.float64),
        "count": torch.tensor(found.count),
    }
    save_tensors(path, tensors, {"identity": identity, "digest": tensors_digest(tensors)})


def load(path: Path, identity: str) -> RealFeatures:
    """Features read from ``path``, of those images by that extractor.

    Raises:
        CheckpointError: the file is missing, damaged, altered or of other images; one line names it.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("digest") != tensors_digest(tensors):
        raise CheckpointError(f"{path}: altered since it was written")
    if metadata.get("identity") != identity:
        raise CheckpointError(
            f"{path}: expected features {identity}, found those of {metadata.get('identity')}"
        )
    names = ("mean", "covariance", "features", "radii", "kernel", "count")
    if set(tensors) != set(names):
        raise CheckpointError(
            f"{path}: expected tensors {', '.join(names)}, found {', '.join(sorted(tensors))}"
        )
    return RealFeatures(
        int(tensors["count"]),
        Normal(tensors["mean"], tensors["covariance"]),
        tensors["features"],
        tensors["radii"],
        float(tensors["kernel"]),
    )
