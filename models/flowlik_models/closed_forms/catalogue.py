"""The synthetic tasks' closed forms, built from the committed constants in ``synthetic.npz`` or from formulas.

The Gaussians of the scaling tasks need none: their eigenvectors are cosines and their eigenvalues fall with the square
of the frequency down to a floor, as those of images do, at any number of dimensions.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

from flowlik_models.closed_forms.checkerboard import Checkerboard
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.closed_forms.targets import TARGETS, Funnel, ManyWell
from flowlik_models.numerics.cosine_transform import cosines

CONSTANTS = Path(__file__).with_name("synthetic.npz")
ClosedForm = Gaussian | GaussianMixture | Checkerboard | ManyWell | Funnel
SYNTHETIC_TASKS = ("gaussian-2d", "gmm-2d", "gmm-64d", "checkerboard-2d", "thin-2d", *TARGETS)
SCALING_DIMS = {f"gaussian-{dim}d": dim for dim in (16, 64, 256, 1024, 3072)}
CLOSED_FORM_TASKS = (*SYNTHETIC_TASKS, *SCALING_DIMS)
_SPECTRUM_FLOOR = 1e-3


@cache
def _constants() -> dict[str, np.ndarray]:
    with np.load(CONSTANTS, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _scaling_spectrum(dim: int) -> np.ndarray:
    frequency = np.arange(dim) * (16 / dim)
    return np.asarray(np.maximum((1 + frequency) ** -2.0, _SPECTRUM_FLOOR))


def _scaling_gaussian(dim: int) -> Gaussian:
    axes = cosines(dim).T.contiguous()
    return Gaussian.from_eigen(torch.zeros(dim), torch.from_numpy(_scaling_spectrum(dim)), axes)


def _arrays(task: str) -> dict[str, torch.Tensor]:
    if task in SCALING_DIMS:
        return {"eigenvalues": torch.from_numpy(_scaling_spectrum(SCALING_DIMS[task]))}
    if task in TARGETS:
        own = TARGETS[task]()
        if isinstance(own, GaussianMixture):
            return {"means": own.means, "stds": own.stds, "weights": own.weights}
        return own.constants()
    prefix = task.replace("-", "_") + "_"
    return {
        name.removeprefix(prefix): torch.from_numpy(array.copy())
        for name, array in _constants().items()
        if name.startswith(prefix)
    }


def closed_form(task: str) -> ClosedForm:
    """The exact model of a synthetic task, float64 buffers on the CPU. Raises ValueError for another task.

    >>> model = closed_form("gmm-2d")
    >>> type(model).__name__, model.event_shape, len(model.weights)
    ('GaussianMixture', (2,), 8)
    """
    if task not in CLOSED_FORM_TASKS:
        raise ValueError(f"no closed form for task {task!r}; valid: {', '.join(CLOSED_FORM_TASKS)}")
    if task in SCALING_DIMS:
        return _scaling_gaussian(SCALING_DIMS[task])
    if task in TARGETS:
        return TARGETS[task]()
    arrays = _arrays(task)
    if task == "gaussian-2d":
        return Gaussian(arrays["mean"], arrays["cov"])
    if task == "checkerboard-2d":
        return Checkerboard(arrays["lower_left"])
    return GaussianMixture(arrays["weights"], arrays["means"], arrays["stds"], arrays["rotations"])


def constants_hash(task: str) -> str:
    """Twelve hexadecimal digits naming the constants of a synthetic task.

    >>> len(constants_hash("gmm-2d")), constants_hash("gmm-2d") == constants_hash("thin-2d")
    (12, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_arrays(task).items()):
        digest.update(name.encode() + str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
