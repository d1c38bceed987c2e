"""Real images: the 8x8 digits of scikit-learn, their split, uniform dequantisation, and hashes of data.

Images of L grey levels become continuous by `z = 2 (k + U)/L - 1`, U uniform on [0, 1), so that z lies in
[-1, 1); in bits per dimension `bpd = log2(L/2) - log p(z)/(d ln 2)` then bounds the code length of the
levels.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "DIGITS_LEVELS",
    "SPLITS",
    "TRAIN_ITEMS",
    "continuous",
    "data_hash",
    "dequantise",
    "digits",
    "mean_and_covariance",
    "mirrored",
    "shifted",
]

DIGITS_LEVELS = 17  # grey levels 0..16: counts of black pixels in 4 x 4 blocks
TRAIN_ITEMS = 1437
SPLITS = ("train", "test")


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    levels = torch.from_numpy(bunch.images[order].astype(np.uint8))[:, None]
    return levels, torch.from_numpy(bunch.target[order].astype(np.int64))


def digits(split: str) -> tuple[Tensor, Tensor]:
    """The digits of `split`: grey levels, uint8 (n, 1, 8, 8) in 0..16, and labels, int64 (n,).

    The 1,797 images that ship with scikit-learn, in the order of
    `numpy.random.default_rng(0).permutation(1797)`: the first 1,437 are for training, the last 360 for
    testing.

    Raises:
        ValueError: if the split is neither "train" nor "test".
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of digits; valid: {', '.join(SPLITS)}")
    levels, labels = _digits()
    chosen = slice(None, TRAIN_ITEMS) if split == "train" else slice(TRAIN_ITEMS, None)
    return levels[chosen].clone(), labels[chosen].clone()


def dequantise(levels: Tensor, n_levels: int, uniforms: Tensor) -> Tensor:
    """Continuous images `2 (k + U)/L - 1` in [-1, 1], in the dtype of `uniforms`.

    Args:
        levels: integers k in 0..n_levels - 1, any shape.
        n_levels: L.
        uniforms: U in [0, 1), of the same shape.

    Raises:
        ValueError: if the shapes differ or a level lies outside 0..n_levels - 1.
    """
    if levels.shape != uniforms.shape:
        raise ValueError(f"levels {tuple(levels.shape)} and uniforms {tuple(uniforms.shape)} differ in shape")
    if levels.numel() and (int(levels.min()) < 0 or int(levels.max()) >= n_levels):
        raise ValueError(f"levels must lie in 0..{n_levels - 1}")
    return continuous(levels, n_levels, uniforms)


def continuous(levels: Tensor, n_levels: int, uniforms: Tensor) -> Tensor:
    """The same of levels known to be right: nothing is looked at, so a GPU need not wait."""
    return 2 * (levels.to(uniforms) + uniforms) / n_levels - 1


def mean_and_covariance(levels: Tensor, n_levels: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of dequantised images, float64.

    The noise of the dequantisation enters exactly, as a variance of `(2/L)^2/12` on every pixel, so no
    eigenvalue is below it.
    """
    centres = 2 * (levels.double().flatten(1) + 0.5) / n_levels - 1
    covariance = torch.cov(centres.T, correction=0)
    covariance += torch.eye(len(covariance), dtype=torch.float64) * ((2 / n_levels) ** 2 / 12)
    return centres.mean(0), covariance


def data_hash(task: str, split: str) -> str:
    """Twelve hexadecimal digits that identify the images and labels of a split (sha256 of their bytes).

    Raises:
        ValueError: if the task has no data set, or the split is unknown.
    """
    if task != "digits":
        raise ValueError(f"task {task!r} has no data set; valid: digits")
    levels, labels = digits(split)
    digest = hashlib.sha256()
    for array in (levels, labels):
        digest.update(str((tuple(array.shape), array.dtype)).encode())
        digest.update(array.numpy().tobytes())
    return digest.hexdigest()[:12]


def mirrored(levels: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w), each mirrored left to right with probability one half."""
    coin = torch.rand(len(levels), generator=generator, device=generator.device) < 0.5
    return torch.where(coin[:, None, None, None], levels.flip(-1), levels)


def shifted(levels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the images (n, c, h, w) moved by at most one pixel each way, zeros filled in."""
    n, _, height, width = levels.shape
    device = generator.device
    moved = torch.rand(n, generator=generator, device=device) < share
    dy, dx = (
        torch.where(moved, torch.randint(0, 3, (n,), generator=generator, device=device), 1)[:, None]
        for _ in range(2)
    )
    rows, columns = dy + torch.arange(height, device=device), dx + torch.arange(width, device=device)
    padded = F.pad(levels, (1, 1, 1, 1))
    image = torch.arange(n, device=device)[:, None, None]
    return padded.movedim(1, 3)[image, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
