"""Feature extractors for Frechet distances: a small classifier of digits, trained by us and shipped.

The distance between two sets of images is that of Gaussians fitted to the features. It is comparable only
with values that used the same extractor, whose `name` therefore goes into every record.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DigitsFeatures", "load_extractor"]


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


def load_extractor(task: str, *, path: Path | None = None) -> nn.Module | None:
    """The feature extractor of `task` in evaluation mode, or None where there is none.

    Args:
        task: task id.
        path: safetensors file; default the shipped `checkpoints/<task>/features.safetensors`.

    Raises:
        CheckpointError: if the file is missing, truncated or holds other tensors.
    """
    if task != "digits":
        return None
    from flowlik_models.checkpoints import CheckpointError, read_checkpoint

    file = path or Path(__file__).parent / "checkpoints" / task / "features.safetensors"
    tensors, _ = read_checkpoint(file)
    net = DigitsFeatures()
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{file}: expected the tensors of {net.name}") from error
    return net.eval()
