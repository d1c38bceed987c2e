"""A small time-conditioned U-Net on top of the flow of the moment-matched Gaussian, for images.

With the mean m, covariance V diag(lam) V^T and `w_i(t) = (1 - t)^2 + t^2 lam_i`, the Gaussian with the data's
moments has a flow map in closed form; the network adds to it what is not Gaussian:

    u(x, t, s) = u_gauss(x, t, s) + k(t) * net_u(x, t, s)
    D(x, t, s) = D_gauss(t, s) + d * l(t, s) * net_D(x, t, s)

with `k_p(t)^2 = sum_i V_pi^2 lam_i / w_i(t)`, the variance of `x_1 - x_0` at pixel p that is left once x_t
is known, and `l(t, s)` the mean of `1/(1 - r + delta)` over r in [t, s], which follows the growth of the
divergence towards the data. Both heads start at zero, so an untrained network is the Gaussian flow. The
velocity head is gated: besides an additive term it predicts for every pixel a 3 x 3 filter of the whitened
image, because the gain of the map changes from place to place. At s = t the map is a velocity field and its
divergence; the embedding of s starts at zero, so that a map started from a teacher's weights is the teacher
on the diagonal and changes with s only through the Gaussian part.

Everything is differentiable in forward and in reverse mode (no fused attention). Cost: one network
evaluation for `velocity`, `average_velocity` and `joint` alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.gaussian import gaussian_map_coefficients, log1p_ratio
from flowlik_models.networks.embedding import TimeFeatures

__all__ = ["FlowMapUNet", "JointFlowMapUNet", "UNet"]

_LAST_STRETCH = 0.03  # delta: about the standard deviation of the dequantisation noise of 17 levels
_EMBED_FLOOR = 1e-3  # smallest 1 - t that the time features resolve
_CLIP = 4.0  # whitened pixels beyond this many standard deviations are softly clipped


_TAPS = 9  # of the 3 x 3 filters that the velocity head predicts for every pixel


_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def _zero(layer: _Layer) -> _Layer:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with scale and shift by the embedding, dropout, and a skip."""

    def __init__(self, inputs: int, outputs: int, embed: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(8, inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embed, 2 * outputs)
        self.norm2 = nn.GroupNorm(math.gcd(8, outputs), outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip: nn.Module = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulate(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv1(F.silu(self.norm1(h)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y) * (1 + scale) + shift)))
        out: Tensor = self.skip(h) + y
        return out


class UNet(nn.Module):
    """A velocity field v(x, t) on images of shape `event_shape`.

    Args:
        event_shape: (channels, height, width); height and width divisible by `2 ** (len(widths) - 1)`.
        widths: channels of each resolution, from the finest.
        blocks: residual blocks per resolution on the way down; as many on the way up.
        dropout: dropout in the residual blocks.
        embed: width of the time embedding.
        moments: mean (d,), eigenvalues (d,) and eigenvectors (d, d; columns) of the data; they become
        buffers.
            Without them zeros, ones and the identity stand in, to be filled from a checkpoint.

    Raises:
        ValueError: if the image cannot be halved often enough.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(
        self,
        event_shape: Sequence[int] = (1, 8, 8),
        *,
        widths: Sequence[int] = (32, 48, 64),
        blocks: int = 1,
        dropout: float = 0.1,
        embed: int = 128,
        moments: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = event_shape
        halvings = 2 ** (len(widths) - 1)
        if height % halvings or width % halvings:
            raise ValueError(f"a {height}x{width} image cannot be halved {len(widths) - 1} times")
        self.event_shape: tuple[int, ...] = (channels, height, width)
        self.dim = channels * height * width
        mean, values, vectors = moments or (torch.zeros(self.dim), torch.ones(self.dim), torch.eye(self.dim))
        self.register_buffer("mean", mean.float().clone())
        self.register_buffer("eigenvalues", values.float().clone())
        self.register_buffer("eigenvectors", vectors.float().clone())

        self.time = TimeFeatures(frequencies=6, delta=_EMBED_FLOOR)
        self.embed_t = nn.Sequential(nn.Linear(self.time.size, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.stem = nn.Conv2d(4 * channels, widths[0], 3, padding=1)
        down, skips, h = nn.ModuleList(), [widths[0]], widths[0]
        for level, w in enumerate(widths):
            for _ in range(blocks):
                down.append(ResBlock(h, w, embed, dropout))
                h = w
                skips.append(h)
            if level < len(widths) - 1:
                down.append(nn.AvgPool2d(2))
        self.down = down
        self.middle = ResBlock(h, h, embed, dropout)
        up = nn.ModuleList()
        for level, w in reversed(list(enumerate(widths))):
            for _ in range(blocks):
                up.append(ResBlock(h + skips.pop(), w, embed, dropout))
                h = w
            if level > 0:
                up.append(nn.Upsample(scale_factor=2, mode="nearest"))
        self.up = up
        self.norm = nn.GroupNorm(math.gcd(8, h), h)
        self.head = _zero(nn.Conv2d(h, (_TAPS + 1) * channels, 3, padding=1))

    def _embedding(self, t: Tensor, s: Tensor) -> Tensor:
        """The embedding of the two times, (batch, embed); a velocity field knows only t."""
        embedding: Tensor = self.embed_t(self.time(t))
        return embedding

    def _gaussian(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u_gauss and k(t), shaped like x, and the average divergence D_gauss, (batch,)."""
        vectors, mean, values = self.eigenvectors.to(x), self.mean.to(x), self.eigenvalues.to(x)
        c, divergence = gaussian_map_coefficients(values, t, s)
        time = t[:, None]
        u = mean + (c * ((x.flatten(1) - time * mean) @ vectors)) @ vectors.T
        w = (1 - time).square() + time.square() * values
        scale = ((values / w) @ vectors.square().T).sqrt()
        return u.view_as(x), scale.view_as(x), divergence

    def _inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Network inputs (batch, 4 c, h, w) and the image whitened pixel by pixel.

        The image in units of its overall spread; whitened pixel by pixel and softly clipped; and zoomed in on
        the two ends of the grey scale, -1 and 1, where much probability sits on a single level.
        """
        variance = self.eigenvectors.square() @ self.eigenvalues  # of the data, pixel by pixel
        time = t[:, None, None, None]
        noise = (1 - time).square()
        centred = x - time * self.mean.to(x).view(1, *self.event_shape)
        spread = noise + time.square() * variance.to(x).view(1, *self.event_shape)
        whitened = _CLIP * torch.tanh(centred * spread.rsqrt() / _CLIP)
        zoom = 0.5 * (noise + (2 * _LAST_STRETCH * time).square()).rsqrt()
        ends = torch.cat((torch.tanh((x + time) * zoom), torch.tanh((x - time) * zoom)), dim=1)
        plain = x * (noise + 0.5 * time.square()).rsqrt()
        return torch.cat((plain, whitened, ends), dim=1), whitened

    def _hidden(self, inputs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden layer (batch, widths[0], h, w), and the one at the lowest resolution."""
        h = self.stem(inputs)
        skips = [h]
        for layer in self.down:
            if isinstance(layer, ResBlock):
                h = layer(h, embedding)
                skips.append(h)
            else:
                h = layer(h)
        h = bottom = self.middle(h, embedding)
        for layer in self.up:
            joined = isinstance(layer, ResBlock)
            h = layer(torch.cat((h, skips.pop()), dim=1), embedding) if joined else layer(h)
        return F.silu(self.norm(h)), bottom

    def _evaluate(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u, shaped like x; D_gauss (batch,); and both hidden layers, for a divergence head."""
        t, s = t.clamp(0, 1), s.clamp(0, 1)  # an adaptive solver may step past the end and interpolate
        return self._evaluate_with(x, t, s, self._embedding(t, s))

    def _evaluate_with(
        self, x: Tensor, t: Tensor, s: Tensor, embedding: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # the closed form stays exact in mixed precision
            base, scale, base_divergence = self._gaussian(x, t, s)
        inputs, whitened = self._inputs(x, t)
        hidden, bottom = self._hidden(inputs, F.silu(embedding))
        out = self.head(hidden).unflatten(1, (_TAPS + 1, self.event_shape[0]))
        height, width = self.event_shape[1:]
        padded = F.pad(whitened, (1, 1, 1, 1))
        shifted = [padded[:, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        net = out[:, _TAPS] + (out[:, :_TAPS] * torch.stack(shifted, dim=1)).sum(1)
        return base + scale * net, base_divergence, hidden, bottom

    def forward(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity: what a field of the straight path predicts."""
        return self.velocity(x, t, cond=cond)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity field v(x, t), shaped like x; t is (batch,)."""
        return self._evaluate(x, t, t)[0]

    def velocity_and_hidden(self, x: Tensor, t: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity, and the last hidden layer (batch, widths[0], h, w), for an embedding (batch, embed) of one's
        own."""
        velocity, _, hidden, _ = self._evaluate_with(x, t, t, embedding)
        return velocity, hidden


class FlowMapUNet(UNet):
    """A flow map with average velocity u(x, t, s); the arguments are those of `UNet`."""

    def __init__(self, event_shape: Sequence[int] = (1, 8, 8), *, embed: int = 128, **options: Any) -> None:
        super().__init__(event_shape, embed=embed, **options)
        self.embed_s = nn.Sequential(
            nn.Linear(2 * self.time.size, embed), nn.SiLU(), _zero(nn.Linear(embed, embed))
        )

    def _embedding(self, t: Tensor, s: Tensor) -> Tensor:
        at_t, at_s = self.time(t), self.time(s)
        embedding: Tensor = self.embed_t(at_t) + self.embed_s(torch.cat((at_t, at_s), dim=1))
        return embedding

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The average velocity, shaped like x, from time t to time s; both are (batch,)."""
        return self._evaluate(x, t, s)[0]


class JointFlowMapUNet(FlowMapUNet):
    """A flow map with a second head, the average divergence D(x, t, s); the arguments are those of `UNet`."""

    def __init__(self, event_shape: Sequence[int] = (1, 8, 8), *, embed: int = 128, **options: Any) -> None:
        super().__init__(event_shape, embed=embed, **options)
        h, bottom = self.norm.num_channels, self.middle.conv2.out_channels
        self.local = nn.Conv2d(h, 2 * h, 1)
        self.pooled = nn.Linear(2 * h + bottom, embed)
        self.read_out = _zero(nn.Linear(embed, 1))

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average velocity, shaped like x, and average divergence, (batch,), by one network evaluation."""
        u, divergence, hidden, bottom = self._evaluate(x, t, s)
        pooled = torch.cat((F.silu(self.local(hidden)).mean((2, 3)), bottom.mean((2, 3))), dim=1)
        density = self.read_out(F.silu(self.pooled(pooled)))[:, 0]
        return u, divergence + self.dim * _mean_growth(t, s) * density


def _mean_growth(t: Tensor, s: Tensor) -> Tensor:
    """Mean of `1/(1 - r + delta)` over r between t and s, either order, (batch,)."""
    start = 1 - t + _LAST_STRETCH
    return log1p_ratio((t - s) / start) / start
