"""Solved trajectories of a teacher: states and cumulative log-determinants at nodes from the data down to the noise.

Nodes are uniform in ``log((t + 0.1)/(1 - t + 0.001))``; the state by classical Runge-Kutta steps, the divergence by one
fresh Rademacher probe at every node, integrated by a cubic spline (docs/training.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from .checkpoints import read_checkpoint, save_tensors
from .data import DIGITS_LEVELS, dequantise, digits
from .networks.embedding import stretched_time, unstretched_time
from .objectives.batch import Batch

STEPS = 32
_DELTA = 1e-3  # smallest 1 - t that the nodes resolve
_CHUNK = 256
_FROM_END = (0.5, 0.15)  # shares of pairs that start at the data and at the noise
_TO_END = 0.3  # share of pairs that go to the other end


@dataclass(frozen=True)
class Paths:
    """``times`` (nodes,) from 1 to 0, ``states`` (nodes, n, *event), ``log_dets`` (nodes, n): the integral of the
    divergence from the data to each node, in nats. The first ``own`` trajectories are the teacher's samples.
    """

    times: Tensor
    states: Tensor
    log_dets: Tensor
    own: int

    def pairs(self, n: int, generator: torch.Generator) -> Batch:
        """``n`` pairs of nodes of random trajectories, either order, with the averages between them."""
        last = len(self.times) - 1

        def node() -> Tensor:
            return torch.randint(last + 1, (n,), generator=generator)

        kind, end = torch.rand(n, generator=generator), torch.rand(n, generator=generator) < _TO_END
        at_data, at_noise = _FROM_END
        a = torch.where(kind < at_data, 0, torch.where(kind < at_data + at_noise, last, node()))
        b = torch.where(end, torch.where(a <= last // 2, last, 0), node())
        b = torch.where(a == b, torch.where(a == 0, last, 0), b)
        row = torch.randint(self.states.shape[1], (n,), generator=generator)
        t, s = self.times[a], self.times[b]
        moved = self.states[b, row] - self.states[a, row]
        velocity = moved / (s - t).reshape(-1, *([1] * (moved.ndim - 1)))
        divergence = (self.log_dets[b, row] - self.log_dets[a, row]) / (s - t)
        return Batch(self.states[a, row], t, s, velocity, divergence)


def velocity_and_divergence(teacher: Any, x: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and the mean of ``e^T J e`` over probes (k, batch, *event), (batch,), both without graph."""
    at = x.detach().requires_grad_()
    velocity = teacher.velocity(at, t)
    divergence = torch.zeros(len(x), device=x.device)
    for index, probe in enumerate(probes):
        more = index < len(probes) - 1
        product = torch.autograd.grad(velocity, at, probe, retain_graph=more)[0]
        divergence += (product * probe).flatten(1).sum(1) / len(probes)
    return velocity.detach(), divergence


def stored_paths(file: Path, teacher: Any, n: int) -> Paths:
    """The trajectories kept in ``file``, or solved now and kept there: minutes on one core."""
    if not file.is_file():
        made = solve(teacher, n)
        tensors = {"times": made.times, "states": made.states, "log_dets": made.log_dets}
        save_tensors(file, {**tensors, "own": torch.tensor(made.own)}, {})
        return made
    tensors, _ = read_checkpoint(file)
    return Paths(tensors["times"], tensors["states"], tensors["log_dets"], int(tensors["own"]))


def solve(teacher: Any, n: int, *, seed: int = 77, steps: int = STEPS) -> Paths:
    """``n`` trajectories: two thirds the teacher's own samples, from the noise, one third training digits."""
    device = next(teacher.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    own = n - n // 3
    noise = torch.randn((own, *teacher.event_shape), generator=generator)
    levels = digits("train")[0]
    pick = torch.randint(len(levels), (n - own,), generator=generator)
    data = dequantise(levels[pick], DIGITS_LEVELS, torch.rand(levels[pick].shape, generator=generator))
    low, high = stretched_time(torch.tensor([0.0, 1.0], dtype=torch.float64), _DELTA).tolist()
    nodes = torch.linspace(high, low, 2 * steps + 1, dtype=torch.float64)  # every other one a half step
    found = [
        _solved(teacher, part.to(device), nodes if forward else nodes.flip(0), generator)
        for start, forward in ((noise, False), (data, True))
        for part in torch.split(start, _CHUNK)
    ]
    times = _times(nodes)[::2].float()
    return Paths(times, torch.cat([s for s, _ in found], 1), torch.cat([d for _, d in found], 1), own)


def _times(nodes: Tensor) -> Tensor:
    return unstretched_time(nodes, _DELTA).clamp(0, 1)


def _solved(teacher: Any, x: Tensor, nodes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States (nodes, batch, *event) and log-determinants (nodes, batch), data first whichever way they were found."""
    times = _times(nodes)
    rates = 1 / (1 / (times + 0.1) + 1 / (1 - times + _DELTA))  # dt over d(stretched time)
    h = float(nodes[2] - nodes[0])

    def at(k: int) -> Tensor:
        return torch.full((len(x),), float(times[k]), device=x.device)

    def slope(y: Tensor, k: int) -> Tensor:
        with torch.no_grad():
            return torch.as_tensor(teacher.velocity(y, at(k)) * float(rates[k]))

    states, divergences = [], []
    for k in range(0, len(nodes), 2):
        probes = torch.randint(0, 2, (1, *x.shape), generator=generator).float() * 2 - 1
        velocity, divergence = velocity_and_divergence(teacher, x, at(k), probes.to(x.device))
        states.append(x.cpu())
        divergences.append(divergence.cpu().double() * rates[k])
        if k == len(nodes) - 1:
            break
        k1 = velocity * float(rates[k])
        k2 = slope(x + h / 2 * k1, k + 1)
        k3 = slope(x + h / 2 * k2, k + 1)
        k4 = slope(x + h * k3, k + 2)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    path, rate = torch.stack(states), torch.stack(divergences)
    order = nodes[::2]
    if h > 0:  # from the noise: turn round
        path, rate, order = path.flip(0), rate.flip(0), order.flip(0)
    rising = CubicSpline(order.flip(0).numpy(), rate.flip(0).numpy(), axis=0).antiderivative()
    integral = torch.from_numpy(rising(order.numpy()))
    return path, (integral - integral[:1]).float()
