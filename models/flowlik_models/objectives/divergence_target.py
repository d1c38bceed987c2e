"""What a divergence head regresses where the field has no closed form: estimates of the trace of its Jacobian.

Exact (d products), or Hutchinson's mean of ``e^T J e`` over Rademacher signs in pixels or in a cosine basis, with or
without the Jacobian of the Gaussian of the same moments as control variate; all unbiased (docs/math.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import scipy
import torch
from torch import Tensor

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients


@dataclass(frozen=True, kw_only=True)
class DivergenceTarget:
    """How the divergence of a network's field is estimated: ``trace``, and number and law of Hutchinson's probes."""

    trace: Literal["hutchinson", "exact"] = "hutchinson"
    probes: int = 1
    basis: Literal["pixel", "dct"] = "pixel"
    control: Literal["none", "gaussian"] = "none"

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than one probe."""
        if self.probes < 1:
            raise ValueError(f"a divergence target needs at least one probe, got {self.probes}")

    def __call__(self, model: Any, x: Tensor, t: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Velocity, shaped like x, and its divergence or an unbiased estimate (batch,), without graph.

        ``model`` has ``velocity`` and, for the control, buffers ``mean``, ``eigenvalues`` and ``eigenvectors``.
        """
        return self.with_probes(model, x, t, self.draw(x, generator))

    def with_probes(self, model: Any, x: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
        """The same with probes (k, batch, *event) that `draw` gave."""
        velocity, traces = velocity_and_products(model, x, t, probes)
        if self.trace == "exact":
            return velocity, traces.sum(0)
        if self.control == "gaussian":
            traces = traces + _gaussian_remainder(model, probes, t)
        return velocity, traces.mean(0)

    def draw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Probes (k, batch, *event) for points x: E[e e^T] = I, or the unit vectors of the exact trace."""
        if self.trace == "exact":
            unit = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device).view(-1, 1, *x.shape[1:])
            return unit.expand(-1, *x.shape)
        shape = (self.probes, *x.shape)
        signs = torch.randint(0, 2, shape, generator=generator, device=generator.device).float() * 2 - 1
        if self.basis == "dct":
            axes = tuple(range(-1, -min(2, x.ndim - 1) - 1, -1))
            signs = torch.from_numpy(scipy.fft.idctn(signs.cpu().numpy(), axes=axes, norm="ortho"))
        return signs.to(x)


def velocity_and_products(model: Any, x: Tensor, t: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity, and ``e^T J e`` of every probe (k, batch), for probes (k, batch, *event); both without graph."""
    at = x.detach().requires_grad_()
    with torch.enable_grad():
        velocity = model.velocity(at, t)
    products = []
    for index, probe in enumerate(probes):
        more = index < len(probes) - 1
        product = torch.autograd.grad(velocity, at, probe, retain_graph=more)[0]
        products.append((product * probe).flatten(1).sum(1))
    return velocity.detach(), torch.stack(products)


def _gaussian_remainder(model: Any, probes: Tensor, t: Tensor) -> Tensor:
    """``tr J_gauss - e^T J_gauss e`` of the Gaussian with the model's moments, (k, batch)."""
    values, vectors = model.eigenvalues.to(probes), model.eigenvectors.to(probes)
    rates, trace = gaussian_map_coefficients(values, t, t)  # on the diagonal: the eigenvalues of its Jacobian
    expected: Tensor = trace - ((probes.flatten(2) @ vectors).square() * rates).sum(2)
    return expected
