"""diffusers' UNet2DModel and DiTTransformer2DModel: ``net(z, step, class_labels).sample``, DDPM's noise by default.

Give the scheduler that belongs to the network as ``path=``. DiT works on latents and predicts variances too, which are
left away.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.adapters.recognise import class_names

KINDS = ("UNet2DModel", "DiTTransformer2DModel")


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a network of diffusers; None for anything else."""
    names = class_names(net)
    if not any(f"diffusers.{kind}" in names for kind in KINDS):
        return None
    known: dict[str, Any] = {"path": "ddpm", "call": _call}
    if (shape := _event_shape(net.config)) is not None:
        known["event_shape"] = shape
    return known


def _event_shape(config: Any) -> tuple[int, ...] | None:
    size = getattr(config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return int(config.in_channels), int(height), int(width)


def _call(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    output = net(z, u, class_labels=cond).sample
    return output[:, : z.shape[1]]
