"""Samples of a shipped exact flow as a data set: realistic images whose log p is known exactly, of every one.

The flow is the shipped one, whatever checkpoints of one's own there are, and its samples are drawn anew in every
process: their noise is keyed by split and number, and blocks of a fixed size pass through the flow in float64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flowlik_models.checkpoints import SHIPPED
from flowlik_models.moments.training_images import TrainingImages
from flowlik_models.networks.autoregressive import AutoregressiveFlow
from flowlik_models.numerics.random import gaussian
from flowlik_models.numerics.standard_normal import standard_normal_log_prob
from flowlik_models.zoo import load_model, model_hash

FLOWS = {"digits-flow": "digits"}
"""Tasks whose data an exact flow's samples are -> what the flow was trained on."""

SPLITS = ("test", "train")
TRAINING_SAMPLES = 16_384
MOMENT_SAMPLES = 2_048  # of the split train, for the moments of a task: two seconds
_BLOCK = 128
_KEY = 64_017


@lru_cache(maxsize=1)
def known_flow(task: str) -> AutoregressiveFlow:
    """The flow of a task of `FLOWS`, float64 on the CPU.

    Raises:
        CheckpointError: its shipped checkpoint is missing or damaged.
    """
    flow = load_model(FLOWS[task], "exact-flow", path=SHIPPED / FLOWS[task] / "exact-flow.safetensors")
    assert isinstance(flow, AutoregressiveFlow)
    return flow.double().requires_grad_(False)


def flow_hash(task: str) -> str:
    """Twelve hexadecimal digits that name the flow."""
    return model_hash(FLOWS[task], "exact-flow", path=SHIPPED / FLOWS[task] / "exact-flow.safetensors")


def samples(task: str, split: str, n: int) -> Tensor:
    """The first ``n`` samples of a split, (n, *event) float64; the same whatever else is drawn.

    >>> bool((samples("digits-flow", "test", 3)[:2] == samples("digits-flow", "test", 2)).all())
    True
    """
    blocks = [_block(task, SPLITS.index(split), first) for first in range(0, n, _BLOCK)]
    flow = known_flow(task)
    return torch.cat([torch.empty((0, *flow.event_shape), dtype=torch.float64), *blocks])[:n]


@lru_cache(maxsize=TRAINING_SAMPLES // _BLOCK)
def _block(task: str, split: int, first: int) -> Tensor:
    flow = known_flow(task)
    ids = torch.arange(first, first + _BLOCK)
    return flow.from_noise(gaussian(_KEY + split, ids, flow.event_shape, dtype=torch.float64))


@torch.no_grad()
def log_density(task: str, x: Tensor) -> Tensor:
    """The flow's own log p of points x (batch, *event), in float64 nats, (batch,)."""
    z, log_det = known_flow(task).inverse(x.double().cpu())
    return standard_normal_log_prob(z) + log_det


@lru_cache(maxsize=1)
def sampled_images(task: str) -> TrainingImages:
    """The training samples of a task of `FLOWS`, float32, to train on."""
    drawn = samples(task, "train", TRAINING_SAMPLES).float()
    return TrainingImages(drawn, 0, flips=False, identity=flow_hash(task))


@lru_cache(maxsize=2)
def mean_and_covariance(task: str, n: int = MOMENT_SAMPLES) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the first ``n`` training samples, float64."""
    rows = samples(task, "train", n).flatten(1)
    return rows.mean(0), torch.cov(rows.T)


def sampled_moments(task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), eigenvalues (d,) ascending and eigenvectors (d, d; columns) of all training samples."""
    mean, covariance = mean_and_covariance(task, TRAINING_SAMPLES)
    return (mean, *torch.linalg.eigh(covariance))
