"""torchcfm's wrappers (arXiv 2302.00482): ``net(t, x)``, t = 0 noise, t = 1 data.

``torch_wrapper`` takes one time for the whole batch, so that the network inside is called as it would be, with the
time as one column more; ``UNetModelWrapper`` takes a time a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowlik_models.adapters.recognise import class_names


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a wrapper of torchcfm; None for anything else."""
    names = class_names(net)
    if "torchcfm.torch_wrapper" in names:
        return {"predicts": "velocity", "call": _with_a_column}
    if "torchcfm.UNetModelWrapper" in names:
        return {"predicts": "velocity", "call": _time_first, **_images(net)}
    return None


def _with_a_column(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    if cond is not None:
        raise ValueError("torchcfm's torch_wrapper takes no condition; use call= with the network inside")
    return net.model(torch.cat([z, u[:, None]], 1))


def _time_first(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    return net(u, z) if cond is None else net(u, z, cond)


def _images(net: Any) -> dict[str, Any]:
    """The event shape where the network keeps it."""
    channels, size = getattr(net, "in_channels", None), getattr(net, "image_size", None)
    if not isinstance(channels, int) or not isinstance(size, int):
        return {}
    return {"event_shape": (channels, size, size)}
