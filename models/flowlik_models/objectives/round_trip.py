"""The loss that asks a flow map to come back from where it went: FALCON, arXiv 2512.09914.

With ``X(x, t, s) = x + (s - t) u(x, t, s)`` it is ``|X(X(x, t, s), s, t) - x|^2``, beside the condition of the map.
A map that meets it exactly is one-to-one, so that the change of variables of its steps (`flow-map-exact`) is a density.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.conditions.condition import column


def round_trip_errors(network: Any, batch: Batch) -> Tensor:
    """Squared distances to where the rows began, per dimension, (batch,) with graph; two evaluations of the map.

    >>> import torch
    >>> from flowlik_models.closed_forms.catalogue import closed_form
    >>> x, t, s = torch.ones(1, 2), torch.tensor([0.9]), torch.tensor([0.1])
    >>> round_trip_errors(closed_form("gaussian-2d"), Batch(x, t, s, x)).round(decimals=6).tolist()
    [0.0]
    """
    x, t, s, cond = batch.x, batch.t, batch.s, batch.cond
    step = column(s - t, x)
    there = x + step * network.average_velocity(x, t, s, cond=cond)
    back = there - step * network.average_velocity(there, s, t, cond=cond)
    errors: Tensor = (back - x).flatten(1).square().mean(1)
    return errors
