"""A Boltzmann generator of four particles with double-well forces (DW4), judged by reweighing.

`python double_wells.py [SIZE]` draws configurations by replica exchange, trains a velocity field on them, distils it
into a map and weighs the samples of both towards exp(-U). The energy is known, its constant is not. U is that of
Koehler et al. 2020 (arXiv 2006.02425): four particles in the plane, without their common translation, 6 dimensions.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

import flowlik

PARTICLES, PLANE = 4, 2
BASIS = torch.linalg.svd(torch.eye(PARTICLES) - 1 / PARTICLES)[0][
    :, : PARTICLES - 1
]  # orthogonal to the translation
PAIRS = torch.triu_indices(PARTICLES, PARTICLES, 1)
NEAR = 4.0  # the distance at the top of the barrier


def distances(x: Tensor) -> Tensor:
    """(batch, 6) distances of all pairs of x (batch, 6)."""
    place = BASIS.to(x) @ x.view(-1, PARTICLES - 1, PLANE)
    return (place[:, PAIRS[0]] - place[:, PAIRS[1]]).norm(dim=2)


def energy(x: Tensor) -> Tensor:
    """U(x) in nats, (batch,)."""
    away = distances(x) - NEAR
    return (-4.0 * away.square() + 0.9 * away**4).sum(1)


def close_pairs(x: Tensor) -> Tensor:
    """How many of the six pairs are on the near side of their barrier, (batch,)."""
    return (distances(x) < NEAR).sum(1)


def tempered(chains: int, steps: int, seed: int, keep: int = 20) -> Tensor:
    """(chains, steps / keep, 6) configurations by Metropolis with replica exchange, after as many steps to settle."""
    generator = torch.Generator().manual_seed(seed)
    beta = 1.0 / torch.tensor([1.0, 1.6, 2.6, 4.2])[:, None]
    x = 3.0 * torch.randn(len(beta), chains, 6, generator=generator)
    here, kept = energy(x.flatten(0, 1)).view(len(beta), chains), []
    for step in range(2 * steps):
        moved = x + 0.35 / beta.sqrt()[..., None] * torch.randn(x.shape, generator=generator)
        there = energy(moved.flatten(0, 1)).view_as(here)
        taken = torch.rand(here.shape, generator=generator).log() < beta * (here - there)
        x, here = torch.where(taken[..., None], moved, x), torch.where(taken, there, here)
        k = step % (len(beta) - 1)
        swapped = torch.rand(chains, generator=generator).log() < (beta[k] - beta[k + 1]) * (
            here[k] - here[k + 1]
        )
        both, order = slice(k, k + 2), torch.stack([swapped.long(), 1 - swapped.long()])
        x[both] = x[both].gather(0, order[..., None].expand(-1, -1, 6))
        here[both] = here[both].gather(0, order)
        if step >= steps and step % keep == 0:
            kept.append(x[0])
    return torch.stack(kept, 1)


def split_chains(values: Tensor) -> float:
    """Gelman and Rubin's ratio of the halves of chains (chains, n): 1 where they have forgotten their beginning."""
    halves = torch.cat(values.double().chunk(2, 1))
    between, within = halves.mean(1).var(), halves.var(1).mean()
    return math.sqrt(float((within * (1 - 1 / halves.shape[1]) + between) / within))


def trained(x: Tensor, steps: int) -> nn.Module:
    """A velocity field by flow matching; rotations, reflections and permutations of the particles are drawn anew."""
    sizes = [7, 256, 256, 256, 256, 6]
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
    net = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        data = turned(x[torch.randint(len(x), (512,))])
        noise, t = torch.randn_like(data), torch.rand(len(data), 1)
        loss = (net(torch.cat([(1 - t) * noise + t * data, t], 1)) - (data - noise)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def turned(x: Tensor) -> Tensor:
    """The same configurations, each rotated or reflected, its particles in another order."""
    place = BASIS.to(x) @ x.view(-1, PARTICLES - 1, PLANE)
    order = torch.rand(len(x), PARTICLES).argsort(1)
    place = place.gather(1, order[:, :, None].expand_as(place))
    rotation = torch.linalg.qr(torch.randn(len(x), PLANE, PLANE))[0]
    return (BASIS.T.to(x) @ place @ rotation).flatten(1)


def report(size: float = 1.0, n: int = 2000) -> Iterator[str]:
    """Line by line: whether the chains agree, then share, log Z and a free energy by the field and by its map."""
    torch.manual_seed(0)
    chains = tempered(200, max(80, int(8000 * size)), seed=0)
    x = chains.flatten(0, 1)
    two, four = ((close_pairs(x) == pairs).view(chains.shape[:2]).float() for pairs in (2, 4))
    gap = math.log(float(four.mean() / two.mean()))
    yield f"chains: R-hat {split_chains(two):.3f}; F(two close pairs) - F(four) {gap:.3f}"
    net = trained(x, max(2, int(12_000 * size)))
    field = flowlik.wrap(net, (6,), call=lambda net, z, u, cond: net(torch.cat([z, u[:, None]], 1)))
    steps, pool = max(2, int(12_000 * size)), max(64, int(16_384 * size))
    student = flowlik.distill(field, turned(x), steps=steps, pool=pool, say=lambda line: None)
    for name, model, estimator in (
        ("field, ODE", field, "ode[rtol=1e-5,atol=1e-5]"),
        *(
            (f"map, {steps} step{'s'[: steps > 1]}", student, f"f2d2[steps={steps}]")
            for steps in (8, 4, 2, 1)
        ),
    ):
        found = flowlik.reweigh(model, energy, n, estimator=estimator)
        gap = found.free_energy(lambda x: close_pairs(x) == 2, lambda x: close_pairs(x) == 4)
        yield f"{name}: {found}; F(two close pairs) - F(four) {gap}"


if __name__ == "__main__":
    for line in report(*map(float, sys.argv[1:2])):
        print(line, flush=True)  # noqa: T201 - what the command is for
