"""Feature extractors for Frechet distances: a small classifier for each data set, trained by us.

The distance between two sets of images is that of Gaussians fitted to the features. It is comparable only
with values that used the same extractor, whose `name` therefore goes into every record.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.checkpoints import SHIPPED, CheckpointError, check_origin, read_checkpoint

__all__ = ["DigitsFeatures", "ImageFeatures", "extractor_for", "load_extractor"]


class DigitsFeatures(nn.Module):
    """A convolutional classifier of 8x8 digits whose last hidden layer, 64 wide, serves as features.

    `forward` maps images in [-1, 1], (n, 1, 8, 8), to features (n, 64); `logits` to class scores (n, 10).
    """

    name = "digits-cnn-64"
    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2),
        )
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(4 * 64, self.num_features)
        self.classes = nn.Linear(self.num_features, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 64) of images (n, 1, 8, 8) in [-1, 1]."""
        return F.silu(self.hidden(self.dropout(self.convolutions(x).flatten(1))))

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (n, 10) of images (n, 1, 8, 8) in [-1, 1]."""
        scores: Tensor = self.classes(self.forward(x))
        return scores


class ImageFeatures(nn.Module):
    """A convolutional classifier of images whose last hidden layer serves as features.

    Three resolutions of two convolutions with group norm, averaged over the pixels. `forward` maps images in [-1, 1],
    (n, *event_shape), to features (n, num_features); `logits` to class scores (n, classes).
    """

    def __init__(
        self, name: str, event_shape: tuple[int, int, int], *, widths: tuple[int, ...], classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        h = event_shape[0]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.AvgPool2d(2))
            for inputs in (h, width):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU()]
            h = width
        self.name, self.num_features = name, h
        self.convolutions = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.2)
        self.hidden = nn.Linear(h, h)
        self.classes = nn.Linear(h, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, num_features) of images in [-1, 1]."""
        return F.silu(self.hidden(self.dropout(self.convolutions(x).mean((2, 3)))))

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (n, classes) of images in [-1, 1]."""
        scores: Tensor = self.classes(self.forward(x))
        return scores


Extractor = DigitsFeatures | ImageFeatures

EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "digits": DigitsFeatures,
    "fashion-mnist": lambda: ImageFeatures("fashion-mnist-cnn-96", (1, 28, 28), widths=(24, 48, 96)),
    "cifar10": lambda: ImageFeatures("cifar10-cnn-256", (3, 32, 32), widths=(64, 128, 256)),
}


def extractor_for(task: str) -> Extractor:
    """The untrained classifier of a task. Raises ValueError where it has none."""
    if task not in EXTRACTORS:
        raise ValueError(f"task {task!r} has no feature classifier; valid: {', '.join(EXTRACTORS)}")
    return EXTRACTORS[task]()


def load_extractor(task: str, *, path: Path | None = None) -> nn.Module | None:
    """The feature extractor of `task` in evaluation mode, or None where there is none, or none trained yet.

    Args:
        task: task id.
        path: safetensors file; default the shipped `checkpoints/<task>/features.safetensors`.

    Raises:
        CheckpointError: if the file is missing, truncated or holds other tensors.
    """
    if task not in EXTRACTORS:
        return None
    file = path or SHIPPED / task / "features.safetensors"
    if path is None and task != "digits" and not file.is_file():
        return None  # `flowlik train TASK features --ship` makes it
    tensors, card = read_checkpoint(file)
    check_origin(file, card, task=task, model="features")
    net = extractor_for(task)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: expected the tensors of {net.name}") from error
    return net.eval()
