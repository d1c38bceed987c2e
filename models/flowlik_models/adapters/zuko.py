"""zuko's continuous flow (CNF): its ODE carries data at u = 0 to N(0, I) at u = 1, by ``transform.f(u, z, c)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.adapters.paths import Path, reverse
from flowlik_models.adapters.recognise import class_names


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a CNF; None for anything else.

    Raises:
        ValueError: another flow of zuko's, which is no field.
    """
    names = class_names(net)
    if "zuko.CNF" in names:
        return {
            "predicts": "velocity",
            "path": _path(net),
            "event_shape": tuple(net.base().event_shape),
            "call": _call,
        }
    if "zuko.Flow" in names:
        raise ValueError(
            f"wrap: {type(net).__name__} is a flow with a log_prob of its own, not a field; of zuko's only CNF is one"
        )
    return None


def _path(net: Any) -> Path:
    first, last = (float(u) for u in net.transform.times)
    if (first, last) == (0.0, 1.0):
        return reverse()
    length = last - first
    return Path(
        alpha=lambda u: (last - u) / length, sigma=lambda u: (u - first) / length, clock=(last, first)
    )


def _call(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    return net.transform.f(u, z, cond)
