"""Arrays of numpy as tensors on a device; what is copied to another device is kept there."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

_kept: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def device_array(array: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The array as a tensor; off the CPU it is copied once, for as long as the array lives, and is not to be changed.

    A copy makes the host wait for the device, and eigenvectors of images take megabytes.

    >>> device_array(np.ones(2), torch.float32, torch.device("cpu"))
    tensor([1., 1.])
    """
    array = np.asarray(array)
    if device.type == "cpu":
        return torch.as_tensor(array).to(dtype)
    key = (id(array), dtype, device)
    if key not in _kept:
        _kept[key] = torch.as_tensor(array).to(device, dtype)
        weakref.finalize(array, _kept.pop, key, None)
    return _kept[key]


def variances(moments: Any, device: torch.device) -> Tensor:
    """Eigenvalues of moments and, where they are of low rank, the variance of the rest, (k,) or (k + 1,) float64."""
    values = device_array(moments.eigenvalues, torch.float64, device)
    return values if moments.rest is None else torch.cat([values, values.new_full((1,), moments.rest)])
