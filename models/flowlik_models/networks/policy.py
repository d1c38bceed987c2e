"""Networks that answer with a policy for a whole segment of time (pi-Flow, arXiv 2510.14974; docs/math.md section 6).

From the point x, its time t and the segment's other end s they give, for every position, the log-weights, means and
variances of a mixture over the data point, or predictions of the data point on a grid of times. The heads start at
zero, so that an untrained network answers everywhere with one mixture, whose centres are drawn from the Gaussian with
the data's moments and are wide enough to overlap. Where structure is finer than the data are wide, some components
start about the point itself, on geometric scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowlik_models.closed_forms.policies import Layout, MixturePolicy, Positions, PredictionPolicy
from flowlik_models.networks.dit import DiT
from flowlik_models.networks.embedding import TimeFeatures
from flowlik_models.networks.images import ImageField, Moments
from flowlik_models.networks.unet import ResBlock, UNet

_CLIP = 4.0  # whitened inputs beyond this many standard deviations are softly clipped
_FINEST = 0.01  # smallest scale on which local components start, in standard deviations of the data
_LOG_SPAN = 12.0  # log-variances stay within this of the data's
_CLOSEST = 0.05  # anchored closer to the data than this, errors of the means would grow a thousandfold on the way back


@dataclass(frozen=True, kw_only=True)
class PolicyHead:
    """What a network answers with.

    ``kind``: ``mixture`` of ``components`` Gaussians at every position of ``layout``, with one ``variance`` a component
    or one ``shared`` by them, as a prior or ``anchored`` at the point it is asked at; or ``predictions`` of the data
    point at ``components`` times. ``local`` of the components start about the point itself. ``levels``: components
    start at the grey levels of images on [-1, 1], as many as there are, each as wide as the dequantisation.
    """

    kind: Literal["mixture", "predictions"] = "mixture"
    components: int = 16
    layout: Layout = "whole"
    variance: Literal["component", "shared"] = "component"
    anchored: bool = False
    local: int = 0
    levels: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for options that do not fit."""
        if self.components < 1 or (self.kind == "predictions" and self.components < 2):
            raise ValueError(
                f"{self.kind} need at least {1 if self.kind == 'mixture' else 2}, got {self.components}"
            )
        if self.kind == "predictions" and (self.anchored or self.local or self.variance != "component"):
            raise ValueError("predictions have neither variances nor an anchored form nor local components")
        if self.levels and (self.layout != "position" or self.local):
            raise ValueError("grey levels are those of positions, and no component is local then")
        if not 0 <= self.local <= self.components:
            raise ValueError(f"local is a number of the {self.components} components, got {self.local}")

    @property
    def widths(self) -> int:
        """Variances of one position."""
        return self.components if self.variance == "component" else 1


class MixtureRead(nn.Module):
    """Turns raw head outputs into a `MixturePolicy`: trained centres and widths plus what the network adds.

    ``mean`` and ``scale`` (P, C): location and standard deviation of the data's coordinates at every position.
    """

    mean: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self, head: PolicyHead, positions: Positions, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.head, self.positions = head, positions
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())
        count, channels, k = positions.count, positions.channels, head.components
        wide = torch.arange(k) < k - head.local
        near = torch.logspace(0, math.log10(_FINEST), max(head.local, 1))[: head.local]
        self.register_buffer("reach", torch.cat((torch.ones(k - head.local), near)))
        self.centres = nn.Parameter(torch.randn(count, k, channels))
        self.follow = nn.Parameter((~wide).float().repeat(count, 1))
        # each a part of the volume of its group, so that neighbours overlap
        sizes = torch.where(wide, k - head.local, head.local)
        logs = 2 * self.reach.log() - 2 / channels * sizes.log()
        self.log_widths = nn.Parameter(logs[: head.widths].repeat(count, 1))

    @torch.no_grad()
    def start_at_levels(self) -> None:
        """Centres at the K grey levels of images on [-1, 1], each as wide as uniform dequantisation."""
        k = self.head.components
        centres = (2 * torch.arange(k) + 1) / k - 1
        self.centres.copy_((centres[:, None] - self.mean[:, None]) / self.scale[:, None])
        logs = math.log((2 / k) ** 2 / 12) - self.scale.square().mean(1, keepdim=True).log()
        self.log_widths.copy_((_LOG_SPAN * torch.atanh(logs / _LOG_SPAN)).expand_as(self.log_widths))

    @property
    def outputs(self) -> int:
        """Raw numbers a position."""
        k, channels = self.head.components, self.positions.channels
        return k + k * channels + self.head.widths + k

    def forward(self, raw: Tensor, near: Tensor, x: Tensor, t: Tensor) -> MixturePolicy:
        """The policy from raw (batch, P, outputs), with gains on ``near`` (batch, P, C), at the point x and time t."""
        k, channels = self.head.components, self.positions.channels
        weights, shifts, widths, gains = torch.split(raw, [k, k * channels, self.head.widths, k], 2)
        offsets = self.reach[:, None] * (self.centres + shifts.reshape(*shifts.shape[:2], k, channels))
        means = offsets + (self.follow + gains)[..., None] * near[:, :, None]
        means = self.mean[:, None] + self.scale[:, None] * means
        logs = _LOG_SPAN * torch.tanh((self.log_widths + widths) / _LOG_SPAN)
        variances = self.scale.square().mean(1)[:, None] * logs.exp()
        if not self.head.anchored:
            return MixturePolicy(self.positions, weights, means, variances)
        noise = (1 - t).clamp_min(_CLOSEST)
        zeta = (t / noise).square()[:, None, None]
        return MixturePolicy(self.positions, weights, means, variances / (1 + variances * zeta), x, 1 - noise)


class VectorPolicy(nn.Module):
    """Policies of d-dimensional vectors by a residual MLP.

    ``mean`` (d,), ``eigenvalues`` (d,), ``eigenvectors`` (d, d) are the moments of the training data; per-position
    mixtures live in the coordinates of the eigenvectors. ``segments``: the numbers of equal segments the network is
    trained for. ``waves``, ``wave_scale``, ``delta`` as in `VectorFlowMap`; ``eps``: the data end lies at t = 1 - eps.
    """

    centre: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    wave_vectors: Tensor

    def __init__(
        self,
        mean: Tensor,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        *,
        head: PolicyHead,
        segments: tuple[int, ...],
        hidden: int = 128,
        depth: int = 3,
        waves: int = 0,
        wave_scale: float = 1.0,
        eps: float = 1e-3,
        delta: float = 5e-3,
    ) -> None:
        super().__init__()
        d = mean.numel()
        self.event_shape: tuple[int, ...] = (d,)
        self.eps, self.head, self.segments = eps, head, segments
        self.frozen_density = head.kind == "mixture"
        self.register_buffer("centre", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.float())
        self.register_buffer("eigenvectors", eigenvectors.float())
        self.time = TimeFeatures(delta=delta)
        self.register_buffer("wave_vectors", wave_scale * torch.randn(d, waves))
        self.first = nn.Linear(d + 2 * waves + 2 * self.time.size, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        basis = self.eigenvectors if head.layout == "position" else None
        positions = Positions(self.event_shape, head.layout, basis)
        location = positions.split(self.centre[None])[0]
        spread = self.eigenvalues.sqrt()[:, None] if basis is not None else self._spread()
        self.mixture = MixtureRead(head, positions, location, spread) if head.kind == "mixture" else None
        outputs = head.components * d if self.mixture is None else positions.count * self.mixture.outputs
        self.read = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def _spread(self) -> Tensor:
        """Standard deviation of every coordinate, (1, d)."""
        return (self.eigenvectors.square() @ self.eigenvalues).sqrt()[None]

    def policy(
        self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None
    ) -> MixturePolicy | PredictionPolicy:
        """The policy at (x, t) for the segment from t to s."""
        z = (x - t[:, None] * self.centre) @ self.eigenvectors
        y = z / ((1 - t[:, None]).square() + t[:, None].square() * self.eigenvalues).sqrt()
        near = _CLIP * torch.tanh(y / _CLIP)
        phase = near @ self.wave_vectors
        h = F.silu(self.first(torch.cat((near, phase.sin(), phase.cos(), self.time(t), self.time(s)), 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        raw = self.read(h)
        if self.mixture is None:
            x1 = self.centre + self._spread() * raw.view(len(x), self.head.components, -1)
            return PredictionPolicy(x1 + (t[:, None] * (x - t[:, None] * self.centre))[:, None], t, s)
        positions = self.mixture.positions
        near = positions.split(t[:, None] * (x - t[:, None] * self.centre)) / self.mixture.scale
        return self.mixture(raw.view(len(x), positions.count, -1), near, x, t)  # type: ignore[no-any-return]


_BACKBONES: dict[str, type[ImageField]] = {"unet": UNet, "dit": DiT}


class PolicyImages(nn.Module):
    """Policies of images, one mixture a pixel, by the network of a velocity field, whose weights it can start from.

    The backbone's own velocity at (x, t) gives a first guess of the data point, about which components start that
    do not start at grey levels.
    Arguments as of `UNet` (or of `DiT`, where ``kind`` says so), and as of `VectorPolicy`.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...] = (1, 8, 8),
        *,
        head: PolicyHead,
        segments: tuple[int, ...],
        eps: float = 0.0,
        kind: Literal["unet", "dit"] = "unet",
        wide: int = 0,
        embed: int = 128,
        moments: Moments | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if head.layout != "position" or head.kind != "mixture":
            raise ValueError("policies of images are mixtures at positions")
        self.backbone = _BACKBONES[kind](event_shape, embed=embed, moments=moments, **options)
        self.event_shape = self.backbone.event_shape
        self.eps, self.head, self.segments, self.frozen_density = eps, head, segments, True
        positions = Positions(self.event_shape, "position")
        location = positions.split(self.backbone.mean.view(1, *self.event_shape))[0]
        spread = positions.split(self.backbone.variance.sqrt().view(1, *self.event_shape))[0]
        self.mixture = MixtureRead(head, positions, location, spread)
        if head.levels:
            self.mixture.start_at_levels()
        else:
            nn.init.ones_(self.mixture.follow)
        width = self.backbone.hidden_width
        self.embed_s = nn.Sequential(
            nn.Linear(2 * self.backbone.time.size, embed), nn.SiLU(), nn.Linear(embed, embed)
        )
        if wide:
            self.widened = ResBlock(width, wide, embed, dropout=0.0)
            width = wide
        self.local = nn.Conv2d(width, 2 * width, 1)
        self.read = nn.Conv2d(2 * width, self.mixture.outputs, 1)
        for layer in (self.embed_s[2], self.read):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @staticmethod
    def adopted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a velocity field under the names they have here; those of a policy network as they are."""
        if any(name.startswith("backbone.") for name in tensors):
            return dict(tensors)
        return {f"backbone.{name}": tensor for name, tensor in tensors.items()}

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> MixturePolicy:
        """The policy at (x, t) for the segment from t to s."""
        net = self.backbone
        at_t, at_s = net.time(t), net.time(s)
        embedding = net.embed_t(at_t) + self.embed_s(torch.cat((at_t, at_s), 1))
        velocity, hidden = net.velocity_and_hidden(x, t, embedding)
        guess = x + (1 - t)[:, None, None, None] * velocity
        if hasattr(self, "widened"):
            hidden = self.widened(hidden, F.silu(embedding))
        raw = self.read(F.silu(self.local(hidden)))
        raw = raw.flatten(2).transpose(1, 2)
        near = (self.mixture.positions.split(guess) - self.mixture.mean) / self.mixture.scale
        return self.mixture(raw, near, x, t)  # type: ignore[no-any-return]
