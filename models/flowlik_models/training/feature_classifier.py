"""Training of the classifiers behind the Frechet distances: digits take half a minute on one core, Fashion-MNIST some
ten minutes; nothing to resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowlik_models.checkpoints import save_checkpoint
from flowlik_models.features.classifier import Extractor, extractor_for
from flowlik_models.images.pixels import continuous, mirrored, shifted
from flowlik_models.moments.training_images import TrainingImages, labelled, training_images
from flowlik_models.training.trainer import Progress

STEPS = {"digits": 1_200, "fashion-mnist": 3_000, "cifar10": 20_000}
_BATCH = 128
_JUDGED_AT_ONCE = 500
_REPORT_EVERY = 50  # steps
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_SMOOTHING = 0.05


def train_features(
    path: Path,
    task: str = "digits",
    *,
    seed: int = 0,
    steps: int | None = None,
    device: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    commit: str | None = None,
) -> Path:
    """Train the classifier of a task on its training images, shifted by up to a pixel and, where the data set's mirror
    images are as likely, mirrored; write ``path`` with its card.

    AdamW with cosine decay and label smoothing. The card gives the accuracy on both splits. Returns ``path``.

    Raises:
        ValueError: the task has no feature classifier.
        MissingDataError, DataError: the images are not there, or not as published.
    """
    steps = steps or STEPS.get(task, 0)
    torch.manual_seed(seed)
    network = extractor_for(task).train().to(device)
    images = training_images(task)
    begun = time.monotonic()

    def report(step: int, loss: float) -> None:
        if progress:
            progress(Progress(step, steps, loss, time.monotonic() - begun))

    _fit(network, images, labelled(task, "train"), steps, torch.Generator().manual_seed(seed), report)
    network.eval()
    card: dict[str, Any] = {
        "task": task,
        "model": "features",
        "name": network.name,
        "recipe": (
            f"AdamW {_LEARNING_RATE}, weight decay {_WEIGHT_DECAY}, cosine, {steps} steps of {_BATCH} images shifted "
            f"by up to a pixel, label smoothing {_SMOOTHING}"
        ),
        "seed": seed,
        "commit": commit,
        "train_seconds": round(time.monotonic() - begun, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(),
        "data_hash": images.identity,
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": {
            split: round(_accuracy(network, *labelled(task, split), images.n_levels, device), 4)
            for split in ("train", "test")
        },
    }
    save_checkpoint(path, network, card)
    return path


def _fit(
    network: Extractor,
    images: TrainingImages,
    training: tuple[Tensor, Tensor],
    steps: int,
    generator: torch.Generator,
    report: Callable[[int, float], None],
) -> None:
    """Train on the grey levels and labels ``training``; ``report`` takes the step and its loss."""
    levels, labels = training
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = torch.randint(len(levels), (_BATCH,), generator=generator)
        scores = network.logits(_augmented(images, levels[pick], generator).to(device))
        loss = F.cross_entropy(scores, labels[pick].to(device), label_smoothing=_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if (step + 1) % _REPORT_EVERY == 0:
            report(step + 1, float(loss.detach()))


def _augmented(images: TrainingImages, levels: Tensor, generator: torch.Generator) -> Tensor:
    """Images of grey levels (batch, *event), shifted, where mirror images are as likely mirrored, and dequantised."""
    levels = shifted(levels, 1.0, generator)
    if images.flips:
        levels = mirrored(levels, generator)
    return continuous(levels, images.n_levels, torch.rand(levels.shape, generator=generator))


def _accuracy(network: Extractor, levels: Tensor, labels: Tensor, n_levels: int, device: str) -> float:
    right = 0
    with torch.no_grad():
        for part, truth in zip(
            *(torch.split(values, _JUDGED_AT_ONCE) for values in (levels, labels)), strict=True
        ):
            x = continuous(part, n_levels, torch.full(part.shape, 0.5)).to(device)
            right += int((network.logits(x).argmax(1).cpu() == truth).sum())
    return right / len(labels)
