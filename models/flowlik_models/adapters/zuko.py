"""zuko's flows. A CNF is a field: its ODE carries data at u = 0 to N(0, I) at u = 1, by ``transform.f(u, z, c)``; any
other over N(0, I) is an exact flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.adapters.exact_flow import WrappedFlow
from flowlik_models.adapters.paths import Path, reverse
from flowlik_models.adapters.recognise import class_names


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a CNF or another flow; None for anything else.

    Raises:
        ValueError: a flow over another law than N(0, I).
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
        return {"exact": WrappedFlow(net, _noise_shape(net.base()))}
    return None


def _noise_shape(base: Any) -> tuple[int, ...]:
    """Event shape of the law that an exact flow starts from."""
    if "zuko.DiagNormal" not in class_names(base) or (base.mean != 0).any() or (base.stddev != 1).any():
        raise ValueError(f"wrap: the flow starts from {base}, expected N(0, I)")
    return tuple(base.event_shape)


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
