"""flow_matching's ModelWrapper (Meta, arXiv 2412.06264): ``model(x, t, **extras)``, t = 0 noise, t = 1 data.

Its path is straight unless ``path=`` says otherwise; a scheduler of the library is a path.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.adapters.recognise import class_names


def options(net: Any) -> dict[str, Any] | None:
    """What is known of a ModelWrapper; None for anything else."""
    if "flow_matching.ModelWrapper" not in class_names(net):
        return None
    return {"predicts": "velocity", "call": _call}


def _call(net: Any, z: Tensor, u: Tensor, cond: Any) -> Any:
    """A condition is passed on as ``label``."""
    extras = {} if cond is None else {"label": cond}
    return net(x=z, t=u, **extras)
