"""Networks of images on top of the flow of the moment-matched Gaussian: what every backbone shares.

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

Everything is differentiable in forward and in reverse mode. Cost: one network evaluation for `velocity`,
`average_velocity` and `joint` alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, TypeVar

import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients, log1p_ratio
from flowlik_models.networks.embedding import TimeFeatures
from flowlik_models.numerics.cosine_transform import along_axes, cosines

__all__ = [
    "ClassField",
    "FlowMap",
    "ImageField",
    "JointFlowMap",
    "Moments",
    "cosine_basis",
    "cosine_moments",
    "zeroed",
]

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean (d,), eigenvalues (d,) and eigenvectors (d, d; columns)."""
Basis = Literal["stored", "cosine"]

_EMBED_FLOOR = 1e-3  # smallest 1 - t that the time features resolve
_CLIP = 4.0  # whitened pixels beyond this many standard deviations are softly clipped
_TAPS = 9  # of the 3 x 3 filters that the velocity head predicts for every pixel
_DEQUANTISATION = 0.03  # about the standard deviation of the noise of 17 levels

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def zeroed(layer: _Layer) -> _Layer:
    """The layer with weights and bias zero."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def cosine_basis(event_shape: Sequence[int]) -> Tensor:
    """The orthonormal cosine transform (type II) along every axis as columns (d, d), float64.

    Of three channels its first axis is grey, red against blue, and green against both: nearly the principal axes of
    natural images, and none of it has to be stored.
    """
    return reduce(torch.kron, map(cosines, event_shape)).T.contiguous()


def cosine_moments(event_shape: Sequence[int], moments: Moments) -> Moments:
    """The Gaussian of the same mean and of the same variances along the axes of `cosine_basis`."""
    mean, values, vectors = moments
    images = vectors.double().T.reshape(-1, *event_shape)
    found = torch.from_numpy(scipy.fft.dctn(images.cpu().numpy(), axes=(1, 2, 3), norm="ortho")).flatten(1)
    return mean, values.double() @ found.square(), cosine_basis(event_shape)


class ImageField(nn.Module):
    """A velocity field v(x, t) on images of shape `event_shape`; a backbone derives from it.

    A backbone builds its layers after this, calls `_add_head` last, and implements `_hidden`.

    Args:
        event_shape: (channels, height, width).
        embed: width of the time embedding.
        moments: of the data; they become buffers. Without them zeros, ones and the identity (or the cosine basis) stand
            in, to be filled from a checkpoint.
        basis: whether the eigenvectors are part of the checkpoint, or those of `cosine_basis`, to which the moments
            are then restricted; products with them are then taken axis by axis.
        noise: about the standard deviation of the dequantisation noise, the finest scale of the data.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    squared: Tensor
    variance: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        embed: int = 128,
        moments: Moments | None = None,
        basis: Basis = "stored",
        noise: float = _DEQUANTISATION,
    ) -> None:
        super().__init__()
        channels, height, width = event_shape
        self.event_shape: tuple[int, ...] = (channels, height, width)
        self.dim, self.noise, self.embed_width = channels * height * width, noise, embed
        for name, value in zip(
            ("mean", "eigenvalues", "eigenvectors"), self._moments(moments, basis), strict=True
        ):
            stored = name != "eigenvectors" or basis == "stored"
            self.register_buffer(name, value.float().clone(), persistent=stored)
        self.separable = basis == "cosine"
        for axis, size in enumerate(self.event_shape if self.separable else ()):
            self.register_buffer(f"cosines{axis}", cosines(size).float(), persistent=False)
        # worked out once: at d = 3072 they cost as much as a part of the network
        self.register_buffer("squared", torch.empty(0), persistent=False)
        self.register_buffer("variance", torch.empty(0), persistent=False)
        self._derive()
        self.register_load_state_dict_post_hook(_derive_again)  # type: ignore[no-untyped-call]
        self.time = TimeFeatures(frequencies=6, delta=_EMBED_FLOOR)
        self.embed_t = nn.Sequential(nn.Linear(self.time.size, embed), nn.SiLU(), nn.Linear(embed, embed))

    def _moments(self, moments: Moments | None, basis: Basis) -> Moments:
        if basis == "cosine" and moments is not None:
            return cosine_moments(self.event_shape, moments)
        vectors = cosine_basis(self.event_shape) if basis == "cosine" else torch.eye(self.dim)
        return moments or (torch.zeros(self.dim), torch.ones(self.dim), vectors)

    def _derive(self) -> None:
        """The variance of every pixel, and squares of the eigenvectors where they are no product of cosines."""
        if not self.separable:
            self.squared = self.eigenvectors.square()
        self.variance = self._at_pixels(self.eigenvalues[None])[0]

    def _cosines(self, like: Tensor) -> list[Tensor]:
        """The cosine transforms along the axes, whose Kronecker product is V^T."""
        return [self.get_buffer(f"cosines{axis}").to(like) for axis in range(len(self.event_shape))]

    def _along(self, x: Tensor) -> Tensor:
        """Coordinates ``x V`` along the eigenvectors, columns of V, of rows x (batch, d)."""
        if self.separable:
            return along_axes(x, self._cosines(x))
        return x @ self.eigenvectors.to(x)

    def _back(self, z: Tensor) -> Tensor:
        """Rows ``z V^T`` of coordinates z (batch, d) along the eigenvectors."""
        if self.separable:
            return along_axes(z, [rows.T for rows in self._cosines(z)])
        return z @ self.eigenvectors.to(z).T

    def _at_pixels(self, variances: Tensor) -> Tensor:
        """Variances ``sum_i V_pi^2 variances_i`` of the pixels p, from those along the eigenvectors; (batch, d)."""
        if self.separable:
            return along_axes(variances, [rows.T.square() for rows in self._cosines(variances)])
        return variances @ self.squared.to(variances).T

    def _add_head(self, hidden: int, bottom: int) -> None:
        """The velocity head; ``hidden`` and ``bottom`` are the channels of the two layers that `_hidden` returns."""
        self.hidden_width, self.bottom_width = hidden, bottom
        self.head = zeroed(nn.Conv2d(hidden, (_TAPS + 1) * self.event_shape[0], 3, padding=1))

    def _hidden(self, inputs: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden layer (batch, hidden, h, w), and one at the lowest resolution (batch, bottom, h', w').

        ``inputs`` (batch, 4 channels, h, w), ``embedding`` (batch, embed).
        """
        raise NotImplementedError

    def _embedding(self, t: Tensor, s: Tensor) -> Tensor:
        """The embedding of the two times, (batch, embed); a velocity field knows only t."""
        embedding: Tensor = self.embed_t(self.time(t))
        return embedding

    def _gaussian(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u_gauss and k(t), shaped like x, and the average divergence D_gauss, (batch,)."""
        mean, values = self.mean.to(x), self.eigenvalues.to(x)
        c, divergence = gaussian_map_coefficients(values, t, s)
        time = t[:, None]
        u = mean + self._back(c * self._along(x.flatten(1) - time * mean))
        w = (1 - time).square() + time.square() * values
        scale = self._at_pixels(values / w).sqrt()
        return u.view_as(x), scale.view_as(x), divergence

    def _inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Network inputs (batch, 4 c, h, w) and the image whitened pixel by pixel.

        The image in units of its overall spread; whitened pixel by pixel and softly clipped; and zoomed in on
        the two ends of the grey scale, -1 and 1, where much probability sits on a single level.
        """
        time = t[:, None, None, None]
        noise = (1 - time).square()
        centred = x - time * self.mean.to(x).view(1, *self.event_shape)
        spread = noise + time.square() * self.variance.to(x).view(1, *self.event_shape)
        whitened = _CLIP * torch.tanh(centred * spread.rsqrt() / _CLIP)
        zoom = 0.5 * (noise + (2 * self.noise * time).square()).rsqrt()
        ends = torch.cat((torch.tanh((x + time) * zoom), torch.tanh((x - time) * zoom)), dim=1)
        plain = x * (noise + 0.5 * time.square()).rsqrt()
        return torch.cat((plain, whitened, ends), dim=1), whitened

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
        """The velocity, and the last hidden layer (batch, hidden, h, w), for an embedding (batch, embed) of one's
        own."""
        velocity, _, hidden, _ = self._evaluate_with(x, t, t, embedding)
        return velocity, hidden


def _derive_again(module: nn.Module, _keys: Any) -> None:
    assert isinstance(module, ImageField)
    module._derive()


class ClassField(ImageField):
    """A backbone whose field is that of a class, or of all classes together. To be mixed into a backbone.

    ``cond`` is the label of each row, (batch,) whole numbers from 0 to ``classes`` - 1; None: the field of all classes.
    Each label, and none, has a row that is added to the embedding of the time, zero at the start. In training mode the
    label ``classes`` is none.
    """

    def __init__(self, event_shape: Sequence[int], *, classes: int, **options: Any) -> None:
        super().__init__(event_shape, **options)
        self.classes = classes
        self.embed_class = nn.Embedding(classes + 1, self.embed_width)
        nn.init.zeros_(self.embed_class.weight)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity field v(x, t) of each row's class, shaped like x; t is (batch,).

        Raises:
            ValueError: labels that are no whole numbers, not one a row, or of no class; one line.
        """
        time = t.clamp(0, 1)
        none = time.new_full(time.shape, self.classes, dtype=torch.long)
        rows = none if cond is None else self._checked(cond, len(x))
        return self.velocity_and_hidden(x, time, self._embedding(time, time) + self.embed_class(rows))[0]

    def guided(self, guidance: float) -> GuidedField:
        """The field ``(1 + w) v(x, t, label) - w v(x, t)`` at guidance w, with the same weights."""
        return GuidedField(self, guidance)

    def _checked(self, labels: Tensor, n: int) -> Tensor:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != (n,):
            found = f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
            raise ValueError(
                f"labels are whole numbers, one a row, (batch,): expected int64 ({n},), got {found}"
            )
        outside = labels[(labels < 0) | (labels >= self.classes + self.training)]
        if len(outside):
            raise ValueError(f"label {int(outside[0])} is of no class: expected 0 to {self.classes - 1}")
        return labels.long()


class GuidedField(nn.Module):
    """``(1 + w) v(x, t, label) - w v(x, t)`` of a `ClassField`: two evaluations, both counted.

    Its density is that of its own ODE, not ``p(x | label)^(1 + w)`` (Ho and Salimans 2022, arXiv 2207.12598).
    """

    networks = ("network",)

    def __init__(self, network: ClassField, guidance: float) -> None:
        super().__init__()
        self.network, self.guidance = network, guidance
        self.event_shape = network.event_shape
        if hasattr(network, "moments"):
            self.moments = network.moments

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The guided velocity, shaped like x. ValueError without ``cond``."""
        if cond is None:
            raise ValueError(f"guidance={self.guidance:g} needs cond, the label that it guides to")
        own, free = self.network.velocity(x, t, cond=cond), self.network.velocity(x, t)
        return (1.0 + self.guidance) * own - self.guidance * free


class FlowMap(ImageField):
    """A backbone with average velocity u(x, t, s): the embedding knows both times. To be mixed into a backbone."""

    def __init__(self, event_shape: Sequence[int], **options: Any) -> None:
        super().__init__(event_shape, **options)
        embed = self.embed_width
        self.embed_s = nn.Sequential(
            nn.Linear(2 * self.time.size, embed), nn.SiLU(), zeroed(nn.Linear(embed, embed))
        )

    def _embedding(self, t: Tensor, s: Tensor) -> Tensor:
        at_t, at_s = self.time(t), self.time(s)
        embedding: Tensor = self.embed_t(at_t) + self.embed_s(torch.cat((at_t, at_s), dim=1))
        return embedding

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The average velocity, shaped like x, from time t to time s; both are (batch,)."""
        return self._evaluate(x, t, s)[0]


class JointFlowMap(FlowMap):
    """A flow map with a second head, the average divergence D(x, t, s), on features pooled over the image."""

    def __init__(self, event_shape: Sequence[int], **options: Any) -> None:
        super().__init__(event_shape, **options)
        hidden, embed = self.hidden_width, self.embed_width
        self.local = nn.Conv2d(hidden, 2 * hidden, 1)
        self.pooled = nn.Linear(2 * hidden + self.bottom_width, embed)
        self.read_out = zeroed(nn.Linear(embed, 1))

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average velocity, shaped like x, and average divergence, (batch,), by one network evaluation."""
        u, divergence, hidden, bottom = self._evaluate(x, t, s)
        pooled = torch.cat((F.silu(self.local(hidden)).mean((2, 3)), bottom.mean((2, 3))), dim=1)
        density = self.read_out(F.silu(self.pooled(pooled)))[:, 0]
        return u, divergence + self.dim * _mean_growth(t, s, self.noise) * density

    def divergence_head(self) -> list[nn.Parameter]:
        """The parameters of the second head."""
        layers = (self.local, self.pooled, self.read_out)
        return [parameter for layer in layers for parameter in layer.parameters()]


def _mean_growth(t: Tensor, s: Tensor, delta: float) -> Tensor:
    """Mean of `1/(1 - r + delta)` over r between t and s, either order, (batch,)."""
    start = 1 - t + delta
    return log1p_ratio((t - s) / start) / start
