"""Solved trajectories of a teacher: states and cumulative log-determinants at nodes from the data down to the noise.

Images: nodes are uniform in ``log((t + 0.1)/(1 - t + 0.001))``, the state by classical Runge-Kutta steps, the
divergence by one fresh Rademacher probe at every node, integrated by a cubic spline. Closed forms: the same steps
with the exact divergence as a part of the state, nodes jittered from batch to batch, so that a map sees all times,
and those of the uniform grids of up to eight steps among them (docs/training.md).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import scipy
import torch
from torch import Tensor

from flowlik_models.checkpoints import read_tensors, save_tensors
from flowlik_models.files import kept_until_done
from flowlik_models.images.pixels import mirrored, shifted
from flowlik_models.moments.training_images import TrainingImages, training_images
from flowlik_models.numerics.reparametrised_time import ReparametrisedTime
from flowlik_models.numerics.runge_kutta import rk4_increments
from flowlik_models.numerics.standard_normal import standard_normal_log_prob
from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.divergence_target import velocity_and_products
from flowlik_models.recipes.options import Trajectories
from flowlik_models.training.process_group import ALONE, WHOLE, Group, Part

STEPS = 32
_NODE_TIME = ReparametrisedTime(1e-3)  # nodes are uniform in it; they resolve 1 - t down to 1e-3
_CHUNK = 256
_NOISY = 0.9  # times beyond which a divergence estimate is noisy
_FROM_END = (0.5, 0.15)  # shares of pairs that start at the data and at the noise
_TO_END = 0.3  # share of pairs that go to the other end
_ON_GRID = 0.5  # share of pairs that are steps of a few-step grid

_GRID = 8  # steps of the finest few-step grid
_JITTERED = 32  # nodes of a closed form's trajectories besides those of the grid
_BLOCK = 1024  # trajectories that share their nodes
_SEED_STRIDE = 10_007  # more than there are chunks: each draws its probes from a seed of its own
_STORED = {"times", "states", "log_dets", "own", "grid", "cpu_seconds"}  # tensors in a pool's file
_Chunk = dict[str, Tensor]

DEFAULT = Trajectories()
"""Pairs in the order in which they come; of the steps of a grid one in ten is the whole way."""

WRONG = 2e-3
"""Bits/dim: a trajectory of a closed form whose log p is further from the exact one is solved again, or left out."""

SUBSTEPS = (1, 4, 16)
"""Runge-Kutta steps between neighbouring nodes, one attempt after another."""


@dataclass(frozen=True)
class TrajectoryPool:
    """Solved trajectories: ``times`` (nodes, n) from the data end to 0, ``states`` (nodes, n, *event), ``log_dets``
    (nodes, n): the integral of the divergence from the data to each node, in nats.

    The first ``own`` trajectories are the teacher's samples. ``grid``: indices of the nodes, the same for all
    trajectories, at the times of the uniform few-step grids. ``cpu_seconds``: what solving them took.
    """

    times: Tensor
    states: Tensor
    log_dets: Tensor
    own: int
    grid: tuple[int, ...] = ()
    cpu_seconds: float = 0.0

    moving: ClassVar[tuple[str, ...]] = ("times", "states", "log_dets")
    """The tensors."""

    def to(self, device: torch.device | str) -> TrajectoryPool:
        """The same on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.moving})

    def ends(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents and data points (n, *event), n even, of random trajectories among the teacher's own samples.

        The second half of them are the neighbours of the first: of rows 2 k and 2 k + 1 one in each half.
        """
        row = 2 * torch.randint(self.own // 2, (n // 2,), generator=generator, device=generator.device)
        rows = torch.cat((row, row + 1))
        return self.states[-1, rows], self.states[0, rows]

    def likelihoods(self, n: int, generator: torch.Generator, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        """The part's rows of ``n`` data points of random trajectories (n, *event), with their log-densities (n,)."""
        row = torch.randint(self.states.shape[1], (n,), generator=generator, device=generator.device)
        if part.count > 1:
            row = row[part.rows(n, device=row.device)]
        return self.states[0, row], self.log_source_of(row) + self.log_dets[-1, row]

    def log_source_of(self, row: Tensor) -> Tensor:
        """Log-densities of the latents of some trajectories under the source, here N(0, I)."""
        return standard_normal_log_prob(self.states[-1, row])

    def pairs(self, n: int, generator: torch.Generator, options: Trajectories = DEFAULT) -> Batch:
        """``n`` pairs of nodes of random trajectories, either order, with the averages between them.

        Where the pool has grid nodes half of the pairs are steps of the uniform grids of 1 (a share ``one_step`` of
        them), 2, 4 and 8 steps (the rest, in equal parts: errors add up over the steps), and the others start and end
        anywhere.
        """
        if self.grid:
            a, b = self._any_or_grid_steps(n, generator, options.one_step)
        else:
            a, b = self._steps_about_the_ends(n, generator)
        if options.to_noise is not None:
            falling = torch.rand(n, generator=generator, device=generator.device) < options.to_noise
            first, last = torch.minimum(a, b), torch.maximum(a, b)  # node 0 lies at the data
            a, b = torch.where(falling, first, last), torch.where(falling, last, first)
        row = torch.randint(self.states.shape[1], (n,), generator=generator, device=generator.device)
        t, s = self.times[a, row], self.times[b, row]
        moved = self.states[b, row] - self.states[a, row]
        velocity = moved / (s - t).reshape(-1, *([1] * (moved.ndim - 1)))
        divergence = (self.log_dets[b, row] - self.log_dets[a, row]) / (s - t)
        return Batch(self.states[a, row], t, s, velocity, divergence)

    def _steps_about_the_ends(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Source and target nodes (n,), most of them with an end of the trajectory among them."""
        last = len(self.times) - 1

        def node() -> Tensor:
            return torch.randint(last + 1, (n,), generator=generator, device=generator.device)

        kind = torch.rand(n, generator=generator, device=generator.device)
        end = torch.rand(n, generator=generator, device=generator.device) < _TO_END
        at_data, at_noise = _FROM_END
        a = torch.where(kind < at_data, 0, torch.where(kind < at_data + at_noise, last, node()))
        b = torch.where(end, torch.where(a <= last // 2, last, 0), node())
        return a, torch.where(a == b, torch.where(a == 0, last, 0), b)

    def _any_or_grid_steps(
        self, n: int, generator: torch.Generator, one_step: float
    ) -> tuple[Tensor, Tensor]:
        """Source and target nodes (n,): a share are steps of a few-step grid, either order."""
        finest, nodes = len(self.grid) - 1, len(self.times)
        drawn: dict[str, Any] = {"generator": generator, "device": generator.device}
        a = torch.randint(nodes, (n,), **drawn)
        b = (a + torch.randint(1, nodes, (n,), **drawn)) % nodes
        shares = torch.tensor((one_step, *[(1 - one_step) / 3] * 3), device=generator.device)
        step = finest // 2 ** torch.multinomial(shares, n, replacement=True, generator=generator)
        first = (torch.rand(n, **drawn) * (finest // step)).long() * step
        grid = torch.tensor(self.grid, device=generator.device)
        ends = torch.stack((grid[first], grid[first + step]))
        ends = torch.where(torch.rand(n, **drawn) < 0.5, ends, ends.flip(0))
        chosen = torch.rand(n, **drawn) < _ON_GRID
        return torch.where(chosen, ends[0], a), torch.where(chosen, ends[1], b)


def stored_pool(file: Path, solved: Callable[[], TrajectoryPool], group: Group = ALONE) -> TrajectoryPool:
    """The pool stored in ``file``, or solved now, by every process of the group, and stored there by the first.

    A file that lacks a tensor, as an older version wrote them, is made anew. Of several calls one solves; what it keeps
    while it does lies in ``file``'s folder of ``.parts``.
    """
    parts = file.with_suffix(".parts")
    with kept_until_done(parts) if group.first else nullcontext():
        return _stored_or_solved(file, solved, group)


def _stored_or_solved(file: Path, solved: Callable[[], TrajectoryPool], group: Group) -> TrajectoryPool:
    group.wait()  # the first one has the folder
    tensors = read_tensors(file)[0] if file.is_file() else {}
    group.wait()  # nobody writes while others still look
    if tensors.keys() >= _STORED:
        return _from_tensors(tensors)
    begun = time.process_time()
    made = solved()
    if not made.cpu_seconds:
        made = replace(made, cpu_seconds=time.process_time() - begun)
    if group.first:
        save_tensors(file, _to_tensors(made))
    return made


def _from_tensors(tensors: dict[str, Tensor]) -> TrajectoryPool:
    return TrajectoryPool(
        times=tensors["times"],
        states=tensors["states"],
        log_dets=tensors["log_dets"],
        own=int(tensors["own"]),
        grid=tuple(tensors["grid"].tolist()),
        cpu_seconds=float(tensors["cpu_seconds"]),
    )


def _to_tensors(pool: TrajectoryPool) -> dict[str, Tensor]:
    return {
        "times": pool.times,
        "states": pool.states,
        "log_dets": pool.log_dets,
        "own": torch.tensor(pool.own),
        "grid": torch.tensor(pool.grid, dtype=torch.int64),
        "cpu_seconds": torch.tensor(pool.cpu_seconds, dtype=torch.float64),
    }


def solve_closed_form(
    truth: Any, starts: Tensor, *, delta: float, generator: torch.Generator
) -> TrajectoryPool:
    """Trajectories of a closed form from ``starts`` (n, d) at its data end; ``delta``: smallest 1 - t to resolve.

    Solved in float64, one Runge-Kutta step between neighbouring nodes, some forty in all; stored in float32. A step may
    jump over a thin layer in which the nearest component changes, most of all beside the data: trajectories whose log p
    is `WRONG` are solved again with more steps, and left out where that does not help.

    Raises:
        ValueError: fewer than half are right.
    """
    end = 1.0 - truth.eps
    counts = node_counts(end, delta)
    parts = []
    for part in torch.split(starts.double(), _BLOCK):
        times = jittered_times(counts, end, delta, generator)
        left = part
        for substeps in SUBSTEPS:
            states, log_dets = _followed(truth, left, times, substeps)
            right = _right(truth, states, log_dets, end)
            parts.append((times[:, None].expand(-1, int(right.sum())), states[:, right], log_dets[:, right]))
            left = left[~right]
            if not len(left):
                break
    times, states, log_dets = (torch.cat(blocks, 1).float() for blocks in zip(*parts, strict=True))
    if states.shape[1] < len(starts) / 2:
        raise ValueError(
            f"{states.shape[1]} of {len(starts)} trajectories are within {WRONG} bits/dim of the exact log p"
        )
    return TrajectoryPool(times, states, log_dets, states.shape[1], grid_nodes(counts))


def _right(truth: Any, states: Tensor, log_dets: Tensor, end: float) -> Tensor:
    """Which trajectories (n,) have the exact log-density of their start; all, where that is not known."""
    if not hasattr(truth, "log_prob"):
        return torch.ones(states.shape[1], dtype=torch.bool)
    found = standard_normal_log_prob(states[-1]) + log_dets[-1]
    off: Tensor = (found - truth.log_prob(states[0], end)).abs()
    return off <= WRONG * states[0, 0].numel() * math.log(2.0)


def node_counts(end: float, delta: float, start: float = 0.0, jittered: int = _JITTERED) -> list[int]:
    """How many jittered nodes lie between neighbouring times of the finest grid, by length in reparametrised time."""
    edges = ReparametrisedTime(delta).at(torch.linspace(end, start, _GRID + 1, dtype=torch.float64))
    shares = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])
    return [max(1, round(jittered * share)) for share in shares.tolist()]


def grid_nodes(counts: list[int]) -> tuple[int, ...]:
    """Indices of the finest grid's nodes among all."""
    return tuple(sum(counts[:k]) + k for k in range(_GRID + 1))


def jittered_times(
    counts: list[int], end: float, delta: float, generator: torch.Generator, start: float = 0.0
) -> Tensor:
    """Times (nodes,) from the data end to ``start``: the finest grid's, and one in each part of its intervals."""
    grid = torch.linspace(end, start, _GRID + 1, dtype=torch.float64)
    reparametrised = ReparametrisedTime(delta)
    edges = reparametrised.at(grid)
    times = [grid[:1]]
    for k, count in enumerate(counts):
        unit = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
        times += [reparametrised.time(edges[k] + (edges[k + 1] - edges[k]) * unit), grid[k + 1 : k + 2]]
    return torch.cat(times).clamp(start, end)


def _followed(truth: Any, x: Tensor, times: Tensor, substeps: int = 1) -> tuple[Tensor, Tensor]:
    """States (nodes, n, d) and log-determinants (nodes, n) along falling times (nodes,), by so many Runge-Kutta steps
    from one to the next."""
    log_det = torch.zeros(len(x), dtype=x.dtype)
    states, log_dets = [x], [log_det]

    def slope(y: Tensor, t: float) -> tuple[Tensor, Tensor]:
        return truth.velocity_and_divergence(y, torch.full((len(y),), t, dtype=y.dtype))  # type: ignore[no-any-return]

    for first, last in pairwise(times.tolist()):
        between = torch.linspace(first, last, substeps + 1, dtype=times.dtype).tolist()
        for t, s in pairwise(between):
            moved, added = rk4_increments(slope, x, s - t, (t, t + (s - t) / 2, s))
            x, log_det = x + moved, log_det + added
        states.append(x)
        log_dets.append(log_det)
    return torch.stack(states), torch.stack(log_dets)


def solve(
    teacher: Any,
    n: int,
    *,
    probes: int = 1,
    data_share: float = 1 / 3,
    shift: float = 0.0,
    neighbour_distance: float = 0.0,
    reach: float = 1.0,
    seed: int = 77,
    steps: int = STEPS,
    images: TrainingImages | None = None,
    folder: Path | None = None,
    group: Group = ALONE,
) -> TrajectoryPool:
    """``n`` trajectories of a network: a share ``data_share`` from training images (the digits by default), of which a
    share ``shift`` are moved by a pixel, the others the teacher's own samples, from the noise.

    ``neighbour_distance``: every other of its samples begins so far from the one before it, in a random direction (0:
    anywhere). ``reach``: standard deviation of the noise they begin from.
    ``probes`` of every node beyond t = 0.9, where nearly all noise of the divergence lies; one elsewhere.
    ``folder``: where chunks of 256 are stored until all are solved, so that an interrupted call goes on there, and the
    processes of a ``group`` share the work.
    """
    generator = torch.Generator().manual_seed(seed)
    from_data = round(n * data_share)
    noise = _noise(teacher.event_shape, n - from_data, neighbour_distance, reach, generator)
    nodes = _nodes(steps)  # from the data to the noise
    starts = [(points, nodes.flip(0)) for points in torch.split(noise, _CHUNK)]
    if from_data:
        at_data = _images(images or training_images("digits"), from_data, shift, generator)
        starts += [(points, nodes) for points in torch.split(at_data, _CHUNK)]

    def chunk(index: int) -> _Chunk:
        solved = partial(_solved_chunk, teacher, *starts[index], probes, seed * _SEED_STRIDE + index)
        return _stored_chunk(folder, index, solved)

    chunks = _shared(chunk, len(starts), group)
    states, log_dets = (torch.cat([part[name] for part in chunks], 1) for name in ("states", "log_dets"))
    times = _times(nodes)[::2].float()[:, None].expand(-1, n)
    cpu_seconds = sum(float(part["cpu_seconds"]) for part in chunks)
    return TrajectoryPool(times, states, log_dets, n - from_data, cpu_seconds=cpu_seconds)


def _noise(
    shape: tuple[int, ...], n: int, neighbour_distance: float, reach: float, generator: torch.Generator
) -> Tensor:
    """``n`` points (n, *shape) of standard deviation ``reach``, every other at that distance of the one before it."""
    noise = reach * torch.randn((n, *shape), generator=generator)
    if neighbour_distance:
        step = noise[1::2].flatten(1)
        step = neighbour_distance * step / step.norm(dim=1, keepdim=True)
        noise[1::2] = noise[: 2 * len(step) : 2] + step.reshape(noise[1::2].shape)
    return noise


def _nodes(steps: int) -> Tensor:
    """Nodes (2 * steps + 1,) in reparametrised time from the data to the noise; every other one is a half step."""
    low, high = _NODE_TIME.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    return torch.linspace(high, low, 2 * steps + 1, dtype=torch.float64)


def _solved_chunk(teacher: Any, points: Tensor, nodes: Tensor, probes: int, seed: int) -> _Chunk:
    """The trajectories from ``points`` (k, *event) along the nodes."""
    begun = time.process_time()
    device = next(teacher.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    states, log_dets = _solved(teacher, points.to(device), nodes, probes, generator)
    cpu_seconds = torch.tensor(time.process_time() - begun, dtype=torch.float64)
    return {"states": states, "log_dets": log_dets, "cpu_seconds": cpu_seconds}


def _stored_chunk(folder: Path | None, index: int, solved: Callable[[], _Chunk]) -> _Chunk:
    """A chunk from its file, or solved and, where there is a folder, written."""
    if folder is None:
        return solved()
    file = folder / f"{index:03d}.safetensors"
    if file.is_file():
        return read_tensors(file)[0]
    made = solved()
    save_tensors(file, made)
    return made


def _shared(chunk: Callable[[int], _Chunk], count: int, group: Group) -> list[_Chunk]:
    """All chunks in every process of the group, of which each solves every n-th."""
    own_share = {index: chunk(index) for index in range(group.rank, count, group.size)}
    group.wait()
    chunks = [own_share.get(index) or chunk(index) for index in range(count)]
    group.wait()
    return chunks


def _images(images: TrainingImages, n: int, shift: float, generator: torch.Generator) -> Tensor:
    """``n`` random training images, dequantised, a share ``shift`` of them moved by a pixel."""
    levels = images.levels[torch.randint(len(images.levels), (n,), generator=generator)]
    levels = shifted(levels, shift, generator)
    if images.flips:
        levels = mirrored(levels, generator)
    return images.points(levels, generator)


def _times(nodes: Tensor) -> Tensor:
    return _NODE_TIME.time(nodes).clamp(0, 1)  # type: ignore[no-any-return]


def _solved(
    teacher: Any, x: Tensor, nodes: Tensor, probes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States (nodes, batch, *event) and log-determinants (nodes, batch), data first whichever way they were solved."""
    times = _times(nodes)
    rates = _NODE_TIME.slope(nodes)
    h = float(nodes[2] - nodes[0])

    def at(k: int) -> Tensor:
        return torch.full((len(x),), float(times[k]), device=x.device)

    def slope(y: Tensor, k: int) -> tuple[Tensor]:
        with torch.no_grad():
            return (teacher.velocity(y, at(k)) * float(rates[k]),)

    states, divergences = [], []
    for k in range(0, len(nodes), 2):
        count = probes if times[k] > _NOISY else 1
        signs = torch.randint(0, 2, (count, *x.shape), generator=generator).float() * 2 - 1
        velocity, products = velocity_and_products(teacher, x, at(k), signs.to(x.device))
        states.append(x.cpu())
        divergences.append(products.mean(0).cpu().double() * rates[k])
        if k == len(nodes) - 1:
            break
        first = (velocity * float(rates[k]),)
        x = x + rk4_increments(slope, x, h, (k, k + 1, k + 2), first)[0]
    path, rate = torch.stack(states), torch.stack(divergences)
    order = nodes[::2]
    if h > 0:  # from the noise: turn round
        path, rate, order = path.flip(0), rate.flip(0), order.flip(0)
    rising = scipy.interpolate.CubicSpline(
        order.flip(0).numpy(), rate.flip(0).numpy(), axis=0
    ).antiderivative()
    integral = torch.from_numpy(rising(order.numpy()))
    return path, (integral - integral[:1]).float()
