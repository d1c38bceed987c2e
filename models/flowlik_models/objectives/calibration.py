r"""Calibration of a joint map's divergence head by likelihoods that are known, the map itself being left as it is.

The few-step likelihood ``log N(z) + sum_k (t_{k+1} - t_k) D(x_k, t_k, t_{k+1})`` has two errors: that of the head, and
that of the map, whose z is no longer the teacher's. A regression shrinks: with a mean square error m a dimension left
in z its mean square is about m too small and log p m d/2 nats too large, though the head be perfect. Here the head
regresses what makes the sum right, over uniform grids of 1, 2, 4 and 8 steps from points whose likelihood is known (the
ends of solved trajectories): plain squares, in bits/dim. Its D is then no longer the divergence of the map, only its
sums from the data to the noise are meant (docs/training.md).
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowlik_models.interfaces import ends_of
from flowlik_models.numerics.standard_normal import standard_normal_log_prob

STEPS = (1, 2, 4, 8)


def calibration_loss(network: Any, x: Tensor, log_prob: Tensor, end: float) -> Tensor:
    """Mean square error of the few-step likelihood in bits/dim, a scalar with graph to the divergence head.

    Args:
        network: a joint map whose other parameters are frozen.
        x: points (batch, *event) at time ``end``; the rows take the numbers of steps in turn.
        log_prob: their log-densities (batch,), nats.
        end: time of the data.

    Raises:
        ValueError: log-densities of another shape than (batch,).
    """
    if log_prob.shape != x.shape[:1]:
        raise ValueError(f"expected log-densities of shape {tuple(x.shape[:1])}, got {tuple(log_prob.shape)}")
    errors = []
    for k, steps in enumerate(STEPS):
        rows = slice(k, None, len(STEPS))
        if len(x[rows]):
            errors.append(few_step_log_prob(network, x[rows], steps, end) - log_prob[rows].double())
    bits = math.log(2.0) * x[0].numel()
    return (torch.cat(errors) / bits).square().mean()


def few_step_log_prob(network: Any, x: Tensor, steps: int, end: float) -> Tensor:
    """What `f2d2` computes on the uniform grid, (batch,) float64, with graph."""
    ends = ends_of(network)
    noisy, source = (
        (0.0, standard_normal_log_prob) if ends is None else (ends.noisy_end, ends.source.log_prob)
    )
    log_det = x.new_zeros(len(x), dtype=torch.float64)
    for start, stop in pairwise(end + (noisy - end) * k / steps for k in range(steps + 1)):
        t, s = (x.new_full((len(x),), value) for value in (start, stop))
        u, divergence = network.joint(x, t, s)
        x = x + (stop - start) * u
        log_det = log_det + (stop - start) * divergence.double()
    return source(x) + log_det


def only_the_head(network: Any) -> None:
    """Freeze everything but the divergence head."""
    network.requires_grad_(False)
    for parameter in network.divergence_head():
        parameter.requires_grad_(True)
