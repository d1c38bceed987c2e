"""A teacher's solved trajectories.

Between neighbouring nodes lies one classical Runge-Kutta step. The nodes are jittered from block to block, so that a
student sees all times, and those of the uniform grids of up to eight steps are among them. The divergence is taken at
the nodes, exactly in few dimensions, by fresh probes beyond, and integrated by the spline through them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import scipy
import torch
from torch import Tensor

from flowlik_models.checkpoints import read_checkpoint, save_tensors
from flowlik_models.distillation.teacher import EXACT_DIMS, Teacher
from flowlik_models.numerics.reparametrised_time import ReparametrisedTime
from flowlik_models.numerics.runge_kutta import rk4_increments
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.training.trajectories import TrajectoryPool, grid_nodes, jittered_times, node_counts

BLOCK = 1024
"""Trajectories that share their nodes and a file; fewer of many numbers."""

NUMBERS = 2**18
"""In the states of a block at one time."""

_SEED_STRIDE = 10_007


@dataclass(frozen=True)
class Pool(TrajectoryPool):
    """Solved trajectories with the log-density of each one's latent under the source, ``log_source`` (n,) nats."""

    log_source: Tensor = field(default_factory=lambda: torch.empty(0))

    moving: ClassVar[tuple[str, ...]] = (*TrajectoryPool.moving, "log_source")

    def log_source_of(self, row: Tensor) -> Tensor:
        """Log-densities of the latents of some trajectories under the source."""
        return self.log_source[row]


def solved_pool(
    teacher: Teacher,
    starts: Callable[[int, torch.Generator], Tensor],
    n: int,
    *,
    own: float,
    delta: float,
    nodes: int = 32,
    probes: int = 1,
    device: str = "cpu",
    folder: Path | None = None,
    say: Callable[[int], None] = lambda _: None,
) -> Pool:
    """``n`` trajectories of a teacher: a share ``own`` its own samples, from the noise, the others from data.

    Args:
        teacher: the field.
        starts: (n, generator) -> points x (n, *event), which start at ``scale`` x.
        n: how many trajectories.
        own: share of the teacher's own samples.
        delta: smallest 1 - t that the nodes resolve.
        nodes: jittered nodes besides those of the grids.
        probes: of the divergence at each node, where it is not exact.
        device: where the teacher lies.
        folder: where blocks are kept, so that an interrupted call goes on there.
        say: called with the number of trajectories solved.
    """
    size = max(16, min(BLOCK, NUMBERS // max(1, teacher_dim(teacher))))
    blocks, done = [], 0
    samples = round(own * n)
    sizes = [(True, k) for k in _parts(samples, size)] + [(False, k) for k in _parts(n - samples, size)]
    for index, (from_noise, count) in enumerate(sizes):
        file = None if folder is None else folder / f"{index:04d}.safetensors"
        if file is not None and file.is_file():
            block = read_checkpoint(file)[0]
        else:
            generator = torch.Generator().manual_seed(77 * _SEED_STRIDE + index)
            block = _block(
                teacher, None if from_noise else starts, count, delta, nodes, probes, device, generator
            )
            if file is not None:
                save_tensors(file, block)
        blocks.append(block)
        done += count
        say(done)
    return _joined(blocks, samples, grid_nodes(node_counts(teacher.end, delta, teacher.start, nodes)))


def teacher_dim(teacher: Teacher) -> int:
    """Numbers of one item."""
    return int(torch.Size(teacher.model.event_shape).numel())


def _parts(n: int, size: int) -> list[int]:
    return [min(size, n - start) for start in range(0, n, size)]


def _joined(blocks: list[dict[str, Tensor]], own: int, grid: tuple[int, ...]) -> Pool:
    def whole(name: str, dim: int) -> Tensor:
        return torch.cat([block[name] for block in blocks], dim)

    times = [block["times"][:, None].expand(-1, block["states"].shape[1]) for block in blocks]
    seconds = sum(float(block["cpu_seconds"]) for block in blocks)
    states, log_dets, log_source = whole("states", 1), whole("log_dets", 1), whole("log_source", 0)
    return Pool(torch.cat(times, 1), states, log_dets, own, grid, seconds, log_source)


def _block(
    teacher: Teacher,
    starts: Callable[[int, torch.Generator], Tensor] | None,
    n: int,
    delta: float,
    nodes: int,
    probes: int,
    device: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Trajectories from data or, without ``starts``, from the noise, data first whichever way they were solved."""
    begun = time.process_time()
    counts = node_counts(teacher.end, delta, teacher.start, nodes)
    times = jittered_times(counts, teacher.end, delta, generator, teacher.start)
    if starts is None:
        x, order = teacher.source.sample(n, generator), times.flip(0)
    else:
        x, order = teacher.scale * starts(n, generator), times
    states, rates = _followed(teacher.model, x.to(device), order, probes, generator)
    if starts is None:
        states, rates = states.flip(0), rates.flip(0)
    log_source = teacher.source.log_prob(states[-1].to(device)).cpu()
    return {
        "times": times.float(),
        "states": states.float(),
        "log_dets": _integral(rates, times, delta).float(),
        "log_source": log_source.double(),
        "cpu_seconds": torch.tensor(time.process_time() - begun, dtype=torch.float64),
    }


def _followed(
    model: Any, x: Tensor, times: Tensor, probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States (nodes, n, *event) and divergences (nodes, n) at times (nodes,), float64 on the CPU."""
    dtype, y = x.dtype, x.double()
    exact = x[0].numel() <= EXACT_DIMS
    target = DivergenceTarget(trace="exact") if exact else DivergenceTarget(probes=probes)
    states, rates = [], []

    def slope(at: Tensor, t: float) -> tuple[Tensor]:
        with torch.no_grad():
            return (model.velocity(at.to(dtype), x.new_full((len(x),), t)).double(),)

    moments = times.tolist()
    for k, t in enumerate(moments):
        velocity, divergence = target(model, y.to(dtype), x.new_full((len(x),), t), generator)
        _check_finite(t, y, velocity, divergence)
        states.append(y.cpu())
        rates.append(divergence.double().cpu())
        if k + 1 < len(moments):
            s = moments[k + 1]
            y = y + rk4_increments(slope, y, s - t, (t, (t + s) / 2, s), (velocity.double(),))[0]
    return torch.stack(states), torch.stack(rates)


def _check_finite(t: float, *values: Tensor) -> None:
    """Refuse a teacher that has no trajectories."""
    bad = torch.stack([~torch.isfinite(value.reshape(len(value), -1)).all(1).cpu() for value in values]).any(
        0
    )
    if bool(bad.any()):
        raise ValueError(
            f"the teacher's velocity or divergence is NaN or infinite at t = {t:.4g} in {int(bad.sum())} of {len(bad)} "
            "trajectories; `flowlik check` shows where"
        )


def _integral(rates: Tensor, times: Tensor, delta: float) -> Tensor:
    """Integrals (nodes, n) of rates (nodes, n) from the first of the falling times (nodes,), by a spline."""
    time = ReparametrisedTime(delta)
    r = time.at(times).flip(0)
    values = rates.flip(0) * time.slope(r)[:, None]
    whole = torch.from_numpy(
        scipy.interpolate.CubicSpline(r.numpy(), values.numpy(), axis=0).antiderivative()(r.numpy())
    )
    return (whole - whole[-1:]).flip(0)
