"""Students: the suite's joint flow maps sized by the data, and networks of one's own with a divergence head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients
from flowlik_models.distillation.recipes import is_image
from flowlik_models.distillation.teacher import Teacher
from flowlik_models.networks.embedding import TimeFeatures
from flowlik_models.networks.images import Moments, zeroed
from flowlik_models.networks.unet import JointFlowMapUNet
from flowlik_models.networks.vector import VectorFlowMap
from flowlik_models.recipes.recipe import Recipe

LEAST_SHARE = 1e-6
"""Of the mean variance: no direction has less."""

STORED_BASIS, MOST_DIMS = 1024, 3072
"""Images up to the first carry the eigenvectors of their covariance, up to the second cosines stand in for them."""


def student_of(
    teacher: Teacher,
    x: Tensor,
    recipe: Recipe,
    network: nn.Module | None = None,
    moments: Moments | None = None,
) -> nn.Module:
    """An untrained student with the teacher's ends: ``network``, or the suite's own, of a `sized` recipe with the
    ``moments`` of the data x (n, *event), taken here where they are not given.

    ``network`` is a module with `joint`, which is taken as it is, or one that knows two times, by
    ``average_velocity(x, t, s)`` or called as ``network(x, t, s)``, which gets a divergence head.

    Raises:
        ValueError: a network that does not answer as a map does.
    """
    if network is None:
        student = _own(teacher, tuple(x.shape[1:]), moments_of(x) if moments is None else moments, recipe)
    else:
        student = network if hasattr(network, "joint") else with_divergence_head(network, x)
        _check(student, teacher, x)
    teacher.give_ends(student)
    return student


def sized(recipe: Recipe, shape: tuple[int, ...], moments: Moments) -> Recipe:
    """The recipe with all that the suite's own network for data of this event shape and moments is made of.

    Raises:
        ValueError: images of more than 3,072 numbers, for which there is none.
    """
    if not is_image(shape):
        return recipe
    dim = math.prod(shape)
    if dim > MOST_DIMS:
        raise ValueError(
            f"distill: images {shape} have more than {MOST_DIMS} numbers, for which there is no network here: give "
            "network=, any module with joint(x, t, s)"
        )
    noise = float(moments[1].quantile(0.05).sqrt().clamp(1e-3, 0.1))
    basis = "stored" if dim <= STORED_BASIS else "cosine"
    return recipe.with_options(network={**_widths(shape), "basis": basis, "noise": noise, **recipe.network})


def _own(teacher: Teacher, shape: tuple[int, ...], moments: Moments, recipe: Recipe) -> nn.Module:
    if is_image(shape):
        return JointFlowMapUNet(shape, moments=moments, **recipe.network)
    flat = VectorFlowMap(*moments, eps=1.0 - teacher.end, delta=recipe.times.delta, **recipe.network)
    return flat if len(shape) == 1 else Unflattened(flat, shape)


def _widths(shape: tuple[int, ...]) -> dict[str, Any]:
    """Widths and attention of a U-Net for images of this shape: halved while both sides are even, down to 2."""
    _, height, width = shape
    levels = 1
    while (
        levels < 3
        and not (height % 2**levels or width % 2**levels)
        and min(height, width) >= 2 ** (levels + 1)
    ):
        levels += 1
    widths = ((24, 48, 64) if max(height, width) <= 8 else (32, 64, 96))[:levels]
    lowest = height // 2 ** (levels - 1)
    return {"widths": widths, "dropout": 0.0, "attention": (lowest,) if 4 <= lowest <= 8 else ()}


def moments_of(x: Tensor) -> Moments:
    """Mean (d,), eigenvalues (d,) ascending and eigenvectors (d, d) of rows, no eigenvalue next to nothing."""
    flat = x.flatten(1).double()
    mean = flat.mean(0)
    values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
    least = LEAST_SHARE * float(values.clamp_min(0).mean())
    if not least > 0.0:
        raise ValueError("distill: all rows of train_x are the same, so there is nothing to model")
    return mean, values.clamp_min(least), vectors


class Unflattened(nn.Module):
    """A joint flow map of vectors on events of another shape."""

    def __init__(self, flat: VectorFlowMap, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.flat, self.event_shape = flat, event_shape

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        """Average velocity (batch, *event) and average divergence (batch,) from t to s."""
        u, divergence = self.flat.joint(x.flatten(1), t, s)
        return u.view_as(x), divergence

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Tensor:
        """Average velocity from t to s, (batch, *event)."""
        return self.joint(x, t, s)[0]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        """The field on the diagonal s = t, (batch, *event)."""
        return self.joint(x, t, t)[0]

    def divergence_head(self) -> list[nn.Parameter]:
        """The parameters of the second head."""
        return self.flat.divergence_head()


def with_divergence_head(network: nn.Module, x: Tensor, hidden: int = 128) -> nn.Module:
    """A network of two times as a joint flow map: its average velocity, and beside it a small network of x, that
    velocity and both times for the average divergence, which starts as that of the Gaussian with x's variances.

    Args:
        network: answers with the average velocity (batch, *event), by ``average_velocity(x, t, s)`` or called as
            ``network(x, t, s)``.
        x: training rows (n, *event).
        hidden: width of the head.

    >>> class Still(nn.Module):
    ...     def forward(self, x, t, s):
    ...         return 0 * x
    >>> x = torch.randn(100, 2)
    >>> u, divergence = with_divergence_head(Still(), x).joint(x, torch.ones(100), torch.zeros(100))
    >>> u.shape, divergence.shape
    (torch.Size([100, 2]), torch.Size([100]))
    """
    return _WithDivergenceHead(network, x, hidden)


class _WithDivergenceHead(nn.Module):
    mean: Tensor
    variance: Tensor

    def __init__(self, network: nn.Module, x: Tensor, hidden: int) -> None:
        super().__init__()
        flat = x.flatten(1).double()
        self.event_shape = tuple(x.shape[1:])
        self.network = network
        self.register_buffer("mean", flat.mean(0).float())
        least = LEAST_SHARE * float(flat.var(0, unbiased=False).mean())
        self.register_buffer("variance", flat.var(0, unbiased=False).clamp_min(least).float())
        self.time = TimeFeatures(delta=5e-3)
        channels = 2 * self.event_shape[0]
        self.body: nn.Module = nn.Flatten()
        size = 2 * flat.shape[1]
        if is_image(self.event_shape):
            layers = (
                nn.Conv2d(channels, 32, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(32, hidden, 3, 2, 1),
                nn.SiLU(),
            )
            self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
            size = hidden
        self.first = nn.Linear(size + 2 * self.time.size, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.read_out = zeroed(nn.Linear(hidden, 1))

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        """Average velocity (batch, *event) and average divergence (batch,) from t to s."""
        u = self.average_velocity(x, t, s)
        time = t[:, None]
        variance = (1 - time).square() + time.square() * self.variance
        whitened = 4.0 * torch.tanh((x.flatten(1) - time * self.mean) * variance.rsqrt() / 4.0)
        body = self.body(torch.cat((whitened.view_as(x), u.detach()), 1))
        h = F.silu(self.first(torch.cat((body, self.time(t), self.time(s)), 1)))
        h = h + F.silu(self.second(h))
        _, divergence = gaussian_map_coefficients(self.variance, t, s)
        return u, divergence + len(self.mean) * self.read_out(h)[:, 0]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Tensor:
        """Average velocity from t to s, (batch, *event)."""
        call = getattr(self.network, "average_velocity", self.network)
        u: Tensor = call(x, t, s)
        return u

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        """The field on the diagonal s = t, (batch, *event)."""
        return self.average_velocity(x, t, t)

    def divergence_head(self) -> list[nn.Parameter]:
        """The parameters of the head."""
        layers = (self.body, self.first, self.second, self.read_out)
        return [parameter for layer in layers for parameter in layer.parameters()]


def _check(student: Any, teacher: Teacher, x: Tensor) -> None:
    """Raise ValueError unless the student answers two rows as a joint map does."""
    rows, shape = x[:2].float(), tuple(teacher.model.event_shape)
    t = rows.new_full((len(rows),), teacher.end)
    like = next(student.parameters(), rows)
    try:
        with torch.no_grad():
            u, divergence = student.joint(
                rows.to(like), t.to(like), torch.full_like(t, teacher.start).to(like)
            )
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        raise ValueError(
            f"distill: network= failed on 2 rows, {type(error).__name__}: {said}; expected joint(x, t, s), or a "
            "network(x, t, s) of two times, which gets a divergence head"
        ) from error
    if tuple(u.shape) != (len(rows), *shape) or tuple(divergence.shape) != (len(rows),):
        raise ValueError(
            f"distill: network= answers {tuple(u.shape)} and {tuple(divergence.shape)}, expected "
            f"{(len(rows), *shape)} and {(len(rows),)}"
        )
    if tuple(getattr(student, "event_shape", shape)) != shape:
        raise ValueError(f"distill: network= has event_shape {student.event_shape}, the model {shape}")
    student.event_shape = shape
