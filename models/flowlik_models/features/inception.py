"""The Inception network of 2015-12-05, whose pooled features are those of the published FID values.

The graph is Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) with 1008 class scores, as TensorFlow published it on
that day and as FID takes it since Heusel et al. 2017 (arXiv 1706.08500). It differs from later releases of the same
name in three places: average pooling leaves the padding out of its average, the pooling branch of the last block takes
the maximum, and images are enlarged to 299x299 bilinearly with pixel i of the output at i n/299 of the input. Values
change by more than most models differ where one of the three is missed.

The weights are those of the well-known conversion `pt_inception-2015-12-05-6726825d.pth`, whose parameter names the
modules have. The file is the user's own; nothing is ever downloaded.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.checkpoints import CheckpointError, fill
from flowlik_models.images.checksums import digest_of

__all__ = [
    "FILE",
    "NAME",
    "VARIABLE",
    "Inception",
    "check_weights",
    "enlarged",
    "load_inception",
    "named_weights",
]

NAME = "inception-2015-12-05"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256_BEGINS = "6726825d"
VARIABLE = "FLOWLIK_INCEPTION"


# --- blocks -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Conv:
    """A step of a path: convolution, batch norm, ReLU, under the name that its parameters have."""

    name: str
    width: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    padded: bool = True


@dataclass(frozen=True)
class Fork:
    """Two convolutions of the same input, joined along the channels."""

    left: Conv
    right: Conv


Step = Conv | Fork | Callable[[Tensor], Tensor]
Steps = Sequence[Step]


class Unit(nn.Module):
    """Convolution without bias, batch norm and ReLU."""

    def __init__(self, inputs: int, spec: Conv) -> None:
        super().__init__()
        high, wide = (spec.kernel, spec.kernel) if isinstance(spec.kernel, int) else spec.kernel
        padding = (high // 2, wide // 2) if spec.padded else (0, 0)
        self.conv = nn.Conv2d(
            inputs, spec.width, (high, wide), stride=spec.stride, padding=padding, bias=False
        )
        self.bn = nn.BatchNorm2d(spec.width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, width, h', w')."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Paths side by side on one input, their outputs joined along the channels in the order given."""

    def __init__(self, inputs: int, *paths: Steps) -> None:
        super().__init__()
        self.paths = paths
        self.width = sum(self._make(inputs, path) for path in paths)

    def _make(self, width: int, path: Steps) -> int:
        """Make the modules of a path that takes ``width`` channels; how many it gives."""
        for step in path:
            made: tuple[Conv, ...] = (step,) if isinstance(step, Conv) else ()
            made = (step.left, step.right) if isinstance(step, Fork) else made
            for conv in made:
                self.add_module(conv.name, Unit(width, conv))
            width = sum(conv.width for conv in made) if made else width
        return width

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) to (n, width, h', w')."""
        return torch.cat([self._along(path, x) for path in self.paths], dim=1)

    def _along(self, path: Steps, x: Tensor) -> Tensor:
        for step in path:
            if isinstance(step, Conv):
                x = self.get_submodule(step.name)(x)
            elif isinstance(step, Fork):
                x = torch.cat([self._along((side,), x) for side in (step.left, step.right)], dim=1)
            else:
                x = step(x)
        return x


def shrunk(x: Tensor) -> Tensor:
    """The largest of each 3x3 window, every other one, no padding."""
    return F.max_pool2d(x, 3, stride=2)


def average(x: Tensor) -> Tensor:
    """Means over 3x3 windows; at the border over the pixels that are there."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x: Tensor) -> Tensor:
    """Maxima over 3x3 windows."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


# --- the network --------------------------------------------------------------------------------------------
_STEM: Steps = (
    Conv("Conv2d_1a_3x3", 32, 3, stride=2, padded=False),
    Conv("Conv2d_2a_3x3", 32, 3, padded=False),
    Conv("Conv2d_2b_3x3", 64, 3),
    shrunk,
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, 3, padded=False),
    shrunk,
)


def _square(pooled: int) -> tuple[Steps, ...]:
    """Paths of the blocks at 35x35."""
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        (average, Conv("branch_pool", pooled)),
    )


def _long(inner: int) -> tuple[Steps, ...]:
    """Paths of the blocks at 17x17, whose 7x7 windows are rows and columns."""
    row, column = (1, 7), (7, 1)
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, row), Conv("branch7x7_3", 192, column)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, column),
            Conv("branch7x7dbl_3", inner, row),
            Conv("branch7x7dbl_4", inner, column),
            Conv("branch7x7dbl_5", 192, row),
        ),
        (average, Conv("branch_pool", 192)),
    )


def _wide(pool: Callable[[Tensor], Tensor]) -> tuple[Steps, ...]:
    """Paths of the blocks at 8x8."""
    row, column = (1, 3), (3, 1)
    return (
        (Conv("branch1x1", 320),),
        (
            Conv("branch3x3_1", 384),
            Fork(Conv("branch3x3_2a", 384, row), Conv("branch3x3_2b", 384, column)),
        ),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, 3),
            Fork(Conv("branch3x3dbl_3a", 384, row), Conv("branch3x3dbl_3b", 384, column)),
        ),
        (pool, Conv("branch_pool", 192)),
    )


_MIXED: dict[str, tuple[Steps, ...]] = {
    "Mixed_5b": _square(32),
    "Mixed_5c": _square(64),
    "Mixed_5d": _square(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, 3, stride=2, padded=False),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, 3),
            Conv("branch3x3dbl_3", 96, 3, stride=2, padded=False),
        ),
        (shrunk,),
    ),
    "Mixed_6b": _long(128),
    "Mixed_6c": _long(160),
    "Mixed_6d": _long(160),
    "Mixed_6e": _long(192),
    "Mixed_7a": (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, 3, stride=2, padded=False)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, stride=2, padded=False),
        ),
        (shrunk,),
    ),
    "Mixed_7b": _wide(average),
    "Mixed_7c": _wide(maximum),
}


class Inception(Block):
    """The network; ``forward`` gives the 2048 pooled features, `logits` the scores of its 1008 classes.

    Images are (n, 1 or 3, h, w): levels 0..255 as uint8, or floats in [-1, 1], which are first quantised to the level
    whose cell they lie in, the inverse of ``z = 2 (k + U)/256 - 1``. Grey images get three equal channels.
    """

    name = NAME
    num_features = 2048
    side = 299
    at_once = 64
    """Images to hand over at a time: the first layers hold 5.5 MB an image each."""

    def __init__(self) -> None:
        super().__init__(3, _STEM)
        width = self.width
        for name, paths in _MIXED.items():
            block = Block(width, *paths)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, 2048) of images (n, 1 or 3, h, w), float32."""
        levels = (x if x.dtype == torch.uint8 else quantised(x)).float()
        levels = levels.expand(-1, 3, -1, -1)
        found = super().forward((enlarged(levels, self.side) - 128) / 128)
        for name in _MIXED:
            found = self.get_submodule(name)(found)
        return found.mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """Class scores (n, 1008) of images as in `forward`."""
        scores: Tensor = self.fc(self.forward(x))
        return scores


def quantised(x: Tensor) -> Tensor:
    """Levels 0..255 (uint8) of values in [-1, 1]; what lies outside gets the nearest level."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def enlarged(x: Tensor, side: int) -> Tensor:
    """Images (n, c, h, w) bilinearly at (side, side), as TensorFlow 1 did: output pixel i lies at i n/side of the
    input's n, beyond whose last pixel nothing changes; no average where an image shrinks."""
    rows, columns = (_weights(n, side, x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _weights(n: int, side: int, like: Tensor) -> Tensor:
    """(side, n): how much each input pixel counts in each output pixel along one axis."""
    at = torch.arange(side, dtype=torch.float64) * n / side
    low = at.floor().long()
    share = (at - low)[:, None]
    unit = torch.eye(n, dtype=torch.float64)
    weights = (1 - share) * unit[low] + share * unit[(low + 1).clamp(max=n - 1)]
    return weights.to(like)


# --- the weights --------------------------------------------------------------------------------------------
def named_weights() -> Path | None:
    """The weights file that ``$FLOWLIK_INCEPTION`` names, or None. The command line's ``--inception`` sets it."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser() if named else None


def check_weights(path: Path) -> None:
    """Raise CheckpointError unless this is the well-known weights file, by the eight digits of its SHA-256."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the weights of Inception, {FILE}")
    found = digest_of(path, "sha256").partition(":")[2]
    if not found.startswith(SHA256_BEGINS):
        raise CheckpointError(
            f"{path}: expected a SHA-256 that begins with {SHA256_BEGINS}, found {found[:8]} "
            f"({path.stat().st_size} bytes): the file is truncated, altered or not {FILE}"
        )


def load_inception(path: Path) -> Inception:
    """The network with the weights of ``path``, in evaluation mode, its parameters frozen.

    Raises:
        CheckpointError: the file is missing, truncated, altered or holds other tensors; one line names it.
    """
    check_weights(path)
    stat = path.stat()
    return _loaded(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _loaded(path: Path, size: int, changed: int) -> Inception:
    """Kept as long as size and time of change of the file are the same: a run judges many cells with it."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        first = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: expected a file of tensors written by torch.save ({first})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{path}: expected tensors by name, as torch.save writes a state_dict")
    network = Inception()
    # counters of training batches, which conversions may or may not hold and evaluation never reads
    counters = {name: t for name, t in network.state_dict().items() if name.endswith(_COUNTER)}
    fill(network, {name: t for name, t in tensors.items() if not name.endswith(_COUNTER)} | counters, path)
    return network.eval().requires_grad_(False)


_COUNTER = ".num_batches_tracked"
