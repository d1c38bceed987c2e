"""The synthetic tasks' closed forms, built from the committed constants in ``synthetic.npz``."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from .checkerboard import Checkerboard
from .gaussian import Gaussian
from .mixture import GaussianMixture

CONSTANTS = Path(__file__).with_name("synthetic.npz")
ClosedForm = Gaussian | GaussianMixture | Checkerboard
SYNTHETIC_TASKS = ("gaussian-2d", "gmm-2d", "gmm-64d", "checkerboard-2d", "thin-2d")


@cache
def _constants() -> dict[str, np.ndarray]:
    with np.load(CONSTANTS, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _arrays(task: str) -> dict[str, torch.Tensor]:
    prefix = task.replace("-", "_") + "_"
    return {
        name.removeprefix(prefix): torch.from_numpy(array.copy())
        for name, array in _constants().items()
        if name.startswith(prefix)
    }


def closed_form(task: str) -> ClosedForm:
    """The exact model of a synthetic task, float64 buffers on the CPU. Raises ValueError for another task."""
    if task not in SYNTHETIC_TASKS:
        raise ValueError(f"no closed form for task {task!r}; valid: {', '.join(SYNTHETIC_TASKS)}")
    arrays = _arrays(task)
    if task == "gaussian-2d":
        return Gaussian(arrays["mean"], arrays["cov"])
    if task == "checkerboard-2d":
        return Checkerboard(arrays["lower_left"])
    return GaussianMixture(arrays["weights"], arrays["means"], arrays["stds"], arrays["rotations"])


def constants_hash(task: str) -> str:
    """Twelve hexadecimal digits naming the constants of a synthetic task."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_arrays(task).items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
