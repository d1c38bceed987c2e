"""The orthonormal cosine transform of type II as a matrix."""

from __future__ import annotations

import numpy as np
import scipy
import torch
from torch import Tensor


def cosines(n: int) -> Tensor:
    """The orthonormal cosine transform DCT-II, (n, n) float64, a basis vector a row."""
    return torch.from_numpy(scipy.fft.dct(np.eye(n), norm="ortho", axis=0))
