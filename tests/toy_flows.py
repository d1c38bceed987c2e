"""Small flows with a known answer, for the tests of the estimators."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.policies import MixturePolicy, Positions


class Linear(nn.Module):
    """v = A x on the flattened event, so x_1 = exp(A) x_0 and log p(x) = log N(exp(-A) x; 0, I) - tr A."""

    def __init__(self, matrix: Tensor, event_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)
        self.event_shape = event_shape or (len(matrix),)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return (x.flatten(1) @ self.matrix.to(x.dtype).T).view_as(x)

    def log_prob(self, x: Tensor) -> Tensor:
        z = x.flatten(1) @ torch.matrix_exp(-self.matrix).to(x.dtype).T
        return (
            -0.5 * z.square().sum(1)
            - 0.5 * z.shape[1] * math.log(2 * math.pi)
            - self.matrix.to(x.dtype).trace()
        )


class LinearWithDivergence(Linear):
    """The same with its divergence, as a separate method."""

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.matrix.to(x.dtype).trace().expand(len(x))


class LinearMap(LinearWithDivergence):
    """The same as a joint flow map with a trainable rate: u = (exp((s - t) A) - I) x/(s - t), D = tr A."""

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.joint(x, t, s, cond=cond)[0]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        matrix = self.matrix.to(x.dtype)
        step = (s - t)[:, None]
        moved = torch.einsum("bij,bj->bi", torch.matrix_exp(step[:, :, None] * matrix), x)
        return (moved - x) / step, matrix.trace().expand(len(x))


class Field:
    """Any function v(x, t) as a model."""

    def __init__(self, function: Any, d: int = 2, **attributes: Any) -> None:
        self.event_shape = (d,)
        self.function = function
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.__dict__.update(attributes)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.seen.append((x.detach(), t.detach()))
        value: Tensor = self.function(x, t) if cond is None else self.function(x, t, cond)
        return value


def stable_matrix(d: int, seed: int = 0) -> Tensor:
    """A full matrix of moderate size, float64."""
    return 0.4 * torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def points(n: int, *event: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *event, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def spd(d: int, seed: int = 0) -> Tensor:
    """A full covariance matrix, float64."""
    a = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T / d + 0.2 * torch.eye(d, dtype=torch.float64)


def moments_of(covariance: Tensor, rank: int | None = None, mean: Tensor | None = None) -> SimpleNamespace:
    """Moments as the tasks attach them; below full rank with the mean of the other eigenvalues."""
    values, vectors = torch.linalg.eigh(covariance)
    d = len(values)
    k = d if rank is None else rank
    rest = None if k == d else float(values[: d - k].mean())
    mean = torch.zeros(d) if mean is None else mean
    return SimpleNamespace(
        mean=mean.numpy(),
        eigenvalues=values[d - k :].numpy(),
        eigenvectors=vectors[:, d - k :].numpy(),
        data_hash="",
        rest=rest,
    )


def with_moments(model: Any, moments: object) -> Any:
    object.__setattr__(model, "moments", moments)
    return model


def random_policy(
    shape: tuple[int, ...], layout: str, variance: str, *, anchored: bool, rotated: bool = False
) -> MixturePolicy:
    basis = torch.linalg.qr(points(6, 6, seed=7))[0] if rotated else None
    positions = Positions(shape, layout, basis)  # type: ignore[arg-type]
    batch, k = 5, 4
    widths = k if variance == "component" else 1
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    made = MixturePolicy(
        positions,
        normal(batch, positions.count, k),
        normal(batch, positions.count, k, positions.channels),
        (0.5 * normal(batch, positions.count, widths)).exp() * 0.3,
    )
    if not anchored:
        return made
    time = torch.full((batch,), 0.3, dtype=torch.float64)
    return MixturePolicy(positions, made.log_weights, made.means, made.variances, normal(batch, *shape), time)
