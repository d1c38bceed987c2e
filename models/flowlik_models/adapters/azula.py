"""azula's Denoisers: ``denoiser(z, u)`` is a posterior whose mean is the data, on its ``schedule``, u = 1 noise.

Its plug-ins bring the networks of EDM, ADM, Stable Diffusion, Flux and others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowlik_models.adapters.paths import Path
from flowlik_models.adapters.recognise import class_names


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a Denoiser; None for anything else."""
    names = class_names(net)
    if "azula.Denoiser" not in names:
        return None
    call = _at_one_time if "azula.GaussianDenoiser" in names else _call
    return {"predicts": "data", "path": _path(net.schedule), "call": call}


def _path(schedule: Any) -> Path:
    def scale(index: int) -> Any:
        def at(u: Tensor) -> Tensor:
            value = torch.as_tensor(schedule(u)[index], dtype=u.dtype, device=u.device)
            return value.reshape(u.shape) if value.numel() == u.numel() else value.expand(u.shape)

        return at

    return Path(alpha=scale(0), sigma=scale(1), clock=(1.0, 0.0))


def _call(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    """A condition is passed on as ``label``."""
    extras = {} if cond is None else {"label": cond}
    return net(z, u, **extras).mean


def _at_one_time(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    """The analytical denoiser takes one time for all its rows."""
    output = torch.empty_like(z)
    for time in torch.unique(u):
        rows = u == time
        output = output.index_put((rows,), net(z[rows], time).mean.to(z))
    return output
