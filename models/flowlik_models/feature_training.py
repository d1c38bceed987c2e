"""Training of the classifier behind the Frechet distance of digits: half a minute on one core; nothing to resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checkpoints import save_checkpoint
from .data import DIGITS_LEVELS, data_hash, dequantise, digits, shifted
from .features import DigitsFeatures
from .training import Progress

STEPS = 1_200
_BATCH = 128
_LEARNING_RATE = 2e-3
_WEIGHT_DECAY = 0.05
_SMOOTHING = 0.05


def train_features(
    path: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[Progress], None] | None = None,
    commit: str | None = None,
) -> Path:
    """Train the classifier on the training digits, shifted by up to a pixel, and write ``path`` with its card.

    AdamW with cosine decay and label smoothing. The card gives the accuracy on both splits. Returns ``path``.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    levels, labels = digits("train")
    network = DigitsFeatures().train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    begun = time.monotonic()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        pick = torch.randint(len(levels), (_BATCH,), generator=generator)
        moved = shifted(levels[pick], 1.0, generator)
        x = dequantise(moved, DIGITS_LEVELS, torch.rand(moved.shape, generator=generator))
        loss = F.cross_entropy(network.logits(x), labels[pick], label_smoothing=_SMOOTHING)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        if progress and (step + 1) % 50 == 0:
            progress(Progress(step + 1, steps, float(loss.detach()), time.monotonic() - begun))
    network.eval()
    card: dict[str, Any] = {
        "task": "digits",
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
        "device": "cpu",
        "data_hash": data_hash("digits", "train"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "accuracy": {split: round(_accuracy(network, *digits(split)), 4) for split in ("train", "test")},
    }
    save_checkpoint(path, network, card)
    return path


def _accuracy(network: DigitsFeatures, levels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        x = dequantise(levels, DIGITS_LEVELS, torch.full(levels.shape, 0.5))
        return float((network.logits(x).argmax(1) == labels).float().mean())
