"""Fields of any framework on vectors, and one-step generators beside their fake model (RealUID, arXiv 2509.22459).

A field answers with the conditional target of its path (`flowlik_models.conditional_paths`) in the plane or above. With
the data's moments, ``b = E[f_cond | x_t]`` and ``k^2``, the variance of f_cond that x_t leaves open, are in closed form
for Gaussian data, and ``f = b + k * (W h + g(h) * y + A[(G h) * (B y)])`` in the coordinates of the eigenvectors, y the
whitened input and h the last hidden layer; W, g and A start at zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowlik_models.conditional_paths import PATHS, PathName, column, ends
from flowlik_models.networks.embedding import TimeFeatures
from flowlik_models.networks.vector import _CLIP, _zero_linear


class PathField(nn.Module):
    """A field of d-dimensional vectors in the framework ``path``; arguments as of `VectorFlowMap`.

    ``velocity`` is the field of the probability-flow ODE, and is there only where the path starts from N(0, I).
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    wave_vectors: Tensor

    def __init__(
        self,
        mean: Tensor,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        *,
        path: PathName = "flow-matching",
        hidden: int = 128,
        depth: int = 4,
        gate_rank: int = 64,
        waves: int = 0,
        wave_scale: float = 1.0,
        delta: float = 5e-3,
    ) -> None:
        super().__init__()
        d = mean.numel()
        self.event_shape: tuple[int, ...] = (d,)
        self.path = PATHS[path]
        self.register_buffer("mean", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.float())
        self.register_buffer("eigenvectors", eigenvectors.float())
        self.register_buffer("wave_vectors", wave_scale * torch.randn(d, waves))
        self.time = TimeFeatures(delta=delta)
        inputs = d + 2 * waves + self.time.size + (d if self.path.paired else 0)
        self.first = nn.Linear(inputs, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.shift, self.gain = _zero_linear(hidden, d), _zero_linear(hidden, d)
        self.gate_in = nn.Linear(d, gate_rank, bias=False)
        self.gate, self.gate_out = nn.Linear(hidden, gate_rank), _zero_linear(gate_rank, d)
        if not self.path.paired:
            # bound here, not on the class: a field without this ODE must not look as if it had one
            self.velocity = self._velocity

    def forward(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The predicted target at x (batch, d) and t (batch,), for x_0 = ``cond`` on a paired path, (batch, d)."""
        if self.path.paired == (cond is None):
            need = "needs x_0 as cond" if self.path.paired else "takes no cond"
            raise ValueError(f"a field of this framework {need}")
        (a, c, g), (alpha, beta, gamma) = (
            tuple(part[:, None] for part in parts) for parts in (self.path.point(t), self.path.target(t))
        )
        start = torch.zeros_like(x) if cond is None else cond
        z = (x - c * start - a * self.mean) @ self.eigenvectors
        variance = a.square() * self.eigenvalues + g.square()
        y = z / variance.sqrt()
        base = (alpha * a * self.eigenvalues + gamma * g) / variance * z
        scale = (alpha * g - gamma * a).abs() * (self.eigenvalues / variance).sqrt()
        residual = self._residual(y, t, None if cond is None else (cond - self.mean) @ self.eigenvectors)
        answer: Tensor = alpha * self.mean + beta * start + (base + scale * residual) @ self.eigenvectors.T
        return answer

    def _residual(self, y: Tensor, t: Tensor, start: Tensor | None) -> Tensor:
        """What the network adds, in units of the open standard deviation, from the whitened point (batch, d)."""
        near = _CLIP * torch.tanh(y / _CLIP)
        phase = near @ self.wave_vectors
        inputs = [near, phase.sin(), phase.cos(), self.time(t)]
        if start is not None:
            inputs.append(_CLIP * torch.tanh(start / self.eigenvalues.sqrt() / _CLIP))
        h = F.silu(self.first(torch.cat(inputs, 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        residual: Tensor = self.shift(h) + self.gain(h) * y + self.gate_out(self.gate(h) * self.gate_in(y))
        return residual

    def _velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity of the path's ODE, (batch, d)."""
        data, noise = ends(self.path, x, t, self(x, t), None)
        rates = self.path.rates(t)
        assert rates is not None
        return column(rates[0], x) * data + column(rates[1], x) * noise


class OneStepGenerator(nn.Module):
    """A generator x = G(z) and the fake model that follows it.

    G is the data point that the field ``generator`` predicts at the time ``start`` of the path, from a latent scaled to
    what data of mean ``mean`` and variances ``spread`` (both of ``event_shape``) are there; so with a teacher's weights
    it starts as that teacher's denoiser. ``fake_is_flow``: whether the fake model was fitted to the generator alone, so
    that its ODE is the generator's.
    """

    networks = ("generator", "fake")
    mean: Tensor
    spread: Tensor

    def __init__(
        self,
        generator: Any,
        fake: Any,
        path: PathName,
        mean: Tensor,
        spread: Tensor,
        *,
        start: float,
        fake_is_flow: bool,
    ) -> None:
        super().__init__()
        self.event_shape: tuple[int, ...] = generator.event_shape
        self.generator, self.fake = generator, fake
        self.path, self.start, self.fake_is_flow = PATHS[path], start, fake_is_flow
        self.conditional = self.path.paired
        self.register_buffer("mean", mean.float().reshape(self.event_shape))
        self.register_buffer("spread", spread.float().reshape(self.event_shape))

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """x (batch, *event) from the latent z of the same shape, given x_0 = ``cond`` on a paired path."""
        t = torch.full((len(z),), self.start, dtype=z.dtype, device=z.device)
        a, c, g = (column(part, z) for part in self.path.point(t))
        x = a * self.mean + (a.square() * self.spread + g.square()).sqrt() * z
        if cond is not None:
            x = x + c * cond
        return ends(self.path, x, t, self.generator(x, t, cond=cond), cond)[0]

    @staticmethod
    def adopted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A teacher's tensors, for generator and fake model alike; those of a one-step generator as they are."""
        if any(name.startswith("generator.") for name in tensors):
            return dict(tensors)
        return {
            f"{part}.{name}": tensor for part in ("generator", "fake") for name, tensor in tensors.items()
        }
