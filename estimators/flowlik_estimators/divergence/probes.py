r"""Probe vectors e with E[e e^T] = I, the bases their signs stand in, and the Gaussian control variate.

A probe is ``e = B s``: coordinates s in the rows of an orthogonal basis B. The variance of ``e^T J e`` for random
signs is twice the squared off-diagonal part of B^T S B, S the symmetric part of J (docs/math.md section 2), so
the best basis is the one in which the Jacobian is nearest to diagonal.

- ``pixel``: B = I. ``dct``: two-dimensional orthonormal cosine transform x opponent colours, images of 1 or 3
  channels. ``pca``: the data's eigenvectors. Where there are fewer of them than dimensions, signs in their span
  plus other pixel signs projected on the complement: ``E[e e^T] = P + (I - P) = I`` still.
- ``hutch++``: signs, the products of a third of which find the head of J (`products.hutch_plus_plus`).
- ``orthogonal`` coordinates: columns of sqrt(d) D H, D random signs of the item, H a fixed orthogonal matrix
  (Hadamard for the even part of d, cosines for the odd), in an order drawn for the item. d of them give the
  trace exactly. Given D the k columns are a simple random sample without replacement from d values whose mean is the
  trace, so the sample variance times (1 - k/d) is unbiased for the squared error, and 0 at k = d.

The control is ``tr J = tr J_G + E[e^T (J - J_G) e]`` with the closed-form Jacobian ``J_G = V diag(c) V^T`` of the
moment-matched Gaussian's velocity (docs/math.md section 5): only the non-Gaussian residual is noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import scipy
import torch
from torch import Tensor

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients
from flowlik_models.numerics import random
from flowlik_models.numerics.cosine_transform import cosines
from flowlik_models.numerics.device_arrays import device_array, variances
from flowlik_models.numerics.streams import ORDER_STREAM

Noise = Literal["rademacher", "gaussian", "orthogonal", "hutch++"]
Basis = Literal["pixel", "dct", "pca"]


@dataclass(frozen=True)
class Rotation:
    """``apply`` turns coordinates (..., size) into vectors (..., d), ``back`` vectors into products with the rows."""

    size: int
    apply: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


def rotation(
    basis: Basis, event_shape: tuple[int, ...], moments: Any, dtype: torch.dtype, device: torch.device
) -> Rotation:
    """The basis for events of that shape; `refusal` says beforehand whether it fits."""
    d = math.prod(event_shape)
    if basis == "pixel":
        return Rotation(d, lambda s: s, lambda v: v)
    if basis == "dct":
        channels, rows, columns = event_shape
        colour = _colours(channels, dtype, device)
        down, across = (_cosines(n, dtype, device) for n in (rows, columns))

        def image(s: Tensor) -> Tensor:
            planes = s.reshape(*s.shape[:-1], *event_shape)
            planes = (down.T @ planes @ across).flatten(-2)
            return (colour.T @ planes).reshape(*s.shape[:-1], d)

        def waves(v: Tensor) -> Tensor:
            planes = v.reshape(*v.shape[:-1], *event_shape)
            planes = (down @ planes @ across.T).flatten(-2)
            return (colour @ planes).reshape(*v.shape[:-1], d)

        return Rotation(d, image, waves)
    vectors = device_array(moments.eigenvectors, dtype, device)
    rank = vectors.shape[1]
    if rank == d:
        return Rotation(d, lambda s: s @ vectors.T, lambda v: v @ vectors)

    def split(s: Tensor) -> Tensor:
        inside, outside = s[..., :rank], s[..., rank:]
        return outside + (inside - outside @ vectors) @ vectors.T

    def both(v: Tensor) -> Tensor:
        inside = v @ vectors
        return torch.cat([inside, v - inside @ vectors.T], -1)

    return Rotation(rank + d, split, both)


def coordinates(
    noise: Noise,
    key: int,
    items: Tensor,
    count: int,
    size: int,
    *,
    stream: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """``count`` draws of ``size`` coordinates an item, (batch, count, size), keyed by item.

    Raises:
        ValueError: more orthogonal probes than coordinates.
    """
    if noise == "orthogonal":
        return _orthogonal(key, items, count, size, stream=stream, dtype=dtype, device=device)
    draw = random.gaussian if noise == "gaussian" else random.rademacher
    return draw(key, items, (count, size), stream=stream, dtype=dtype, device=device)


class GaussianControl:
    """Quadratic forms and trace of the Jacobian of the moment-matched Gaussian's velocity."""

    def __init__(
        self, moments: Any, event_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        d = math.prod(event_shape)
        self.vectors = device_array(moments.eigenvectors, dtype, device)
        self.left_over = d - self.vectors.shape[1]
        self.eigenvalues = variances(moments, device)

    def squares(self, probes: Tensor) -> Tensor:
        """Squared eigen-coordinates of probes (batch, k, *event), (batch, k, eigenvalues): all that a form needs."""
        flat = probes.flatten(2)
        inside = (flat @ self.vectors).square()
        if not self.left_over:
            return inside
        outside = flat.square().sum(2, keepdim=True) - inside.sum(2, keepdim=True)
        return torch.cat([inside, outside], 2)

    def product(self, flat: Tensor, t: Tensor) -> Tensor:
        """``J_G e`` at the time t (a tensor of one element), (batch, k, d)."""
        c = self.spectrum(t).to(flat)
        rest = c[-1] if self.left_over else c.new_zeros(())
        along = c[:-1] if self.left_over else c
        product: Tensor = ((flat @ self.vectors) * (along - rest)) @ self.vectors.T + rest * flat
        return product

    def excess(self, squares: Tensor, t: Tensor) -> Tensor:
        """``e^T J_G e - tr J_G`` at the time t (a tensor of one element), (batch, k), of mean zero."""
        c = self.spectrum(t)
        once = torch.ones_like(c)
        if self.left_over:
            once[-1] = self.left_over
        excess: Tensor = squares @ c.to(squares) - (c * once).sum().to(squares)
        return excess

    def spectrum(self, t: Tensor) -> Tensor:
        """Eigenvalues of J_G at the time t (a tensor of one element), float64; the last for the rest, if any."""
        at = t.reshape(1).double()
        spectrum: Tensor = gaussian_map_coefficients(self.eigenvalues, at, at)[0][0]
        return spectrum


def refusal(
    noise: Noise | None, basis: str | None, control: str | None, probes: int | None, model: Any
) -> str | None:
    """None, or one line why probes of that law do not fit the model's events or moments."""
    shape = tuple(model.event_shape)
    d = math.prod(shape)
    if noise == "orthogonal" and probes is not None and probes > d:
        return f"noise=orthogonal has at most d = {d} probes, not {probes}"
    if noise == "hutch++" and probes is not None and probes > 3 * d:
        return f"noise=hutch++ has at most 3 d = {3 * d} products, not {probes}"
    if basis == "dct" and not is_image(shape):
        return f"basis=dct needs images (1 or 3, height, width), not events of shape {shape}"
    moments = getattr(model, "moments", None)
    if basis == "pca" or control == "gaussian":
        name = "basis=pca" if basis == "pca" else "control=gaussian"
        if moments is None:
            return f"{name} needs the data's moments (`model.moments`)"
        return _moments_refusal(moments, d, noise if basis == "pca" else None)
    return None


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether events are (1 or 3, height, width)."""
    return len(shape) == 3 and shape[0] in (1, 3)


@lru_cache(maxsize=8)
def _colours(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Grey, red-green and yellow-blue, orthonormal rows; of one channel itself."""
    if channels != 3:
        return torch.ones(1, 1, dtype=dtype, device=device)
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1).to(device, dtype)


@lru_cache(maxsize=16)
def _cosines(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`cosines`, made once."""
    return cosines(n).to(device, dtype)


@lru_cache(maxsize=4)
def _system(size: int) -> Tensor:
    """An orthogonal matrix of any size whose entries are nearly of one modulus, (size, size) float64."""
    even = size & -size  # the largest power of two that divides it
    signs = torch.from_numpy(scipy.linalg.hadamard(even, dtype=np.float64))
    return torch.kron(cosines(size // even), signs / math.sqrt(even))


def _orthogonal(
    key: int, items: Tensor, count: int, size: int, *, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if count > size:
        raise ValueError(f"noise=orthogonal has at most {size} probes, not {count}")
    signs = random.rademacher(key, items, (1, size), stream=stream, dtype=torch.float64)
    order = random.uniform(key, items, (size,), stream=stream + ORDER_STREAM, dtype=torch.float64)
    rows = _system(size)[order.argsort(1)[:, :count]]
    return (math.sqrt(size) * signs * rows).to(device, dtype)


def _moments_refusal(moments: Any, d: int, noise: Noise | None) -> str | None:
    vectors, values = np.asarray(moments.eigenvectors), np.asarray(moments.eigenvalues)
    rest = getattr(moments, "rest", None)
    if vectors.ndim != 2 or len(vectors) != d or values.shape != vectors.shape[1:]:
        return (
            f"the moments are of another data set: eigenvectors {vectors.shape} for events of {d} dimensions"
        )
    if vectors.shape[1] < d and rest is None:
        return f"the moments have {vectors.shape[1]} of {d} eigenvectors and no variance for the rest"
    if vectors.shape[1] < d and noise == "orthogonal":
        return "noise=orthogonal with basis=pca needs all eigenvectors"
    if not (np.isfinite(values).all() and (values > 0).all() and (rest is None or rest > 0)):
        return "the moments' covariance is singular: an eigenvalue is not positive"
    return None
