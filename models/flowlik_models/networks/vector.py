"""Flow maps of vectors: an MLP residual on the closed-form Gaussian map (docs/math.md section 5).

``u = u_gauss + W h + V[g(h) * y] + A[(G h) * (B y)]`` and ``D = D_gauss + d a(h) + sum_i b_i(h) y_i^2``, with y
the input whitened by the data's moments and h the last hidden layer. W, g, A, a and b start at zero, so training
starts from the exact map of the Gaussian with the data's moments. The multiplicative (gated) terms let the gain differ
from place to place; without them the latent's norm comes out wrong. Cost: one MLP evaluation for both outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients
from flowlik_models.networks.clusters import ClusterMap
from flowlik_models.networks.embedding import TimeFeatures

_CLIP = 4.0  # whitened inputs beyond this many standard deviations are softly clipped: the tails extrapolate


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _head(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """What reads the divergence, by a layer of its own where it has one."""
    if not hidden:
        return _zero_linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), _zero_linear(hidden, outputs))


class VectorFlowMap(nn.Module):
    """A (joint) flow map of d-dimensional vectors.

    ``mean`` (d,), ``eigenvalues`` (d,), ``eigenvectors`` (d, d) are the moments of the training data. With
    ``preconditioned`` off the network is a plain MLP on x without Gaussian part or gates. With ``divergence`` off there
    is no ``joint``: the map alone. ``head_hidden``: a layer of that width between h and D's own terms (0: none).

    ``clusters``: Gaussians of a mixture whose map takes the place of the one Gaussian's (0: none); ``clusters.fit``
    fits them to data, and their responsibilities join the network's input. ``waves`` random Fourier features of y
    (scale ``wave_scale`` radians per standard deviation) let a small network follow the steep places between modes of
    low-dimensional data. ``eps``: the data end lies at t = 1 - eps; ``delta``: the smallest 1 - t resolved.
    """

    def __init__(
        self,
        mean: Tensor,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        *,
        hidden: int = 256,
        depth: int = 4,
        gate_rank: int = 128,
        head_hidden: int = 0,
        preconditioned: bool = True,
        waves: int = 0,
        wave_scale: float = 1.0,
        clusters: int = 0,
        divergence: bool = True,
        eps: float = 0.0,
        delta: float = 5e-3,
    ) -> None:
        super().__init__()
        d = mean.numel()
        self.event_shape: tuple[int, ...] = (d,)
        self.eps = eps
        self.preconditioned = preconditioned
        self.register_buffer("mean", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.float())
        self.register_buffer("eigenvectors", eigenvectors.float())
        self.time = TimeFeatures(delta=delta)
        self.register_buffer("wave_vectors", wave_scale * torch.randn(d, waves))
        self.clusters = ClusterMap(clusters, d) if clusters else None
        self.first = nn.Linear(d + 2 * waves + 2 * self.time.size + clusters, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.shift = _zero_linear(hidden, d)
        if preconditioned:
            self.gain = _zero_linear(hidden, d)
            self.gate_in = nn.Linear(d, gate_rank, bias=False)
            self.gate = nn.Linear(hidden, gate_rank)
            self.gate_out = _zero_linear(gate_rank, d)
        self.head = _head(hidden, head_hidden, 1 + (d if preconditioned else 0)) if divergence else None
        if divergence:
            # bound here, not on the class: a map without the head must not look like a joint map
            self.joint = self._joint

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    wave_vectors: Tensor

    def _forward(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        inputs = [self.time(t), self.time(s)]
        y = x
        if self.preconditioned:
            with torch.autocast(
                x.device.type, enabled=False
            ):  # the closed form stays exact in mixed precision
                base, divergence, y, share = self._closed_form(x, t, s)
            inputs += share
        near = _CLIP * torch.tanh(y / _CLIP)
        phase = near @ self.wave_vectors
        h = F.silu(self.first(torch.cat((near, phase.sin(), phase.cos(), *inputs), 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        u = self.shift(h)
        if not self.preconditioned:
            return u, None if self.head is None else x.shape[1] * self.head(h).squeeze(1)
        u = u + base + (self.gain(h) * y) @ self.eigenvectors.T
        u = u + self.gate_out(self.gate(h) * self.gate_in(y))
        if self.head is None:
            return u, None
        read = self.head(h)
        residual = x.shape[1] * read[:, 0] + (read[:, 1:] * near.square()).sum(1)
        return u, divergence + residual

    def _closed_form(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Average velocity and divergence of the closed-form part, the whitened x, and responsibilities if any."""
        z = (x - t[:, None] * self.mean) @ self.eigenvectors
        y = z / ((1 - t[:, None]).square() + t[:, None].square() * self.eigenvalues).sqrt()
        if self.clusters is not None:
            base, divergence, share = self.clusters(x, t, s)
            return base, divergence, y, [share]
        c, divergence = gaussian_map_coefficients(self.eigenvalues, t, s)
        return (c * z) @ self.eigenvectors.T + self.mean, divergence, y, []

    def _joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average velocity (batch, d) and average divergence (batch,) from t to s."""
        u, divergence = self._forward(x, t, s)
        assert divergence is not None
        return u, divergence

    def divergence_head(self) -> list[nn.Parameter]:
        """The parameters of the second head."""
        return [] if self.head is None else list(self.head.parameters())

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Average velocity from t to s, (batch, d)."""
        return self._forward(x, t, s)[0]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The field on the diagonal s = t, (batch, d)."""
        return self._forward(x, t, t)[0]
