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

DIGITS_LEVELS = 17  # grey levels 0..16: counts of black pixels in 4 x 4 blocks
TRAIN_ITEMS = 1437
SPLITS = ("train", "test")


@lru_cache(maxsize=1)
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits  # a second to load, which no other task needs

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
