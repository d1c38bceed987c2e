r"""The variance of one probe in a basis, and the coefficient of a control, from two vector-Jacobian products an item.

With signs s in the rows m_i of a basis, ``e = sum s_i m_i`` and ``w = J^T e``, the variance of ``e^T J e`` is
``2 (|S|^2 - sum_i (m_i^T S m_i)^2)``, S the symmetric part of J (docs/math.md section 2). Two probes e_1, e_2 of an
item estimate all of it without bias: ``|J|^2`` by |w|^2, the antisymmetric part by ``((w_1.e_2 - w_2.e_1)/2)^2``, and
``m_i^T J m_i`` by ``s_i (m_i.w)``, once by each probe. The diagonal cancels exactly, so that what is left is a sum of d
squares of off-diagonal noise: a few items say more than the scatter of many quadratic forms would. A control ``c G`` of
known G is taken off the products, which makes the variance a square polynomial in c.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowlik_estimators.divergence.law import squared_products

_ROUNDING = 1e-6  # of a control's squared size, in single precision: a variance below that is none


@dataclass(frozen=True)
class Forms:
    """Two probes an item in one basis and what they gave at every node.

    ``signs`` s (items, 2, size), ``probes`` m_i.e, which in an orthonormal basis is the same; ``products`` m_i.w
    (nodes, items, 2, size); ``pairs`` w_1.e_2 - w_2.e_1 (nodes, items). ``diagonal``: False for probes without axes
    (Gaussian ones), whose variance is ``2 |S|^2``.
    """

    signs: Tensor
    probes: Tensor
    products: Tensor
    pairs: Tensor
    diagonal: bool

    def combined(self, weights: Tensor) -> Forms:
        """The same of sums over the nodes, weights (combinations, nodes)."""

        def summed(values: Tensor) -> Tensor:
            total: Tensor = torch.tensordot(weights.to(values), values, 1)
            return total

        return replace(self, products=summed(self.products), pairs=summed(self.pairs))


@dataclass(frozen=True)
class Known:
    """A control: ``axes`` m_i.v of its eigenvectors (k, size), and its ``spectrum`` (nodes, k or k + 1).

    One eigenvalue more than axes is that of all other directions.
    """

    axes: Tensor
    spectrum: Tensor

    def combined(self, weights: Tensor) -> Known:
        """The control of sums over the nodes."""
        return replace(self, spectrum=weights.to(self.spectrum) @ self.spectrum)


def variance(forms: Forms) -> Tensor:
    """Variance of one probe, averaged over the items, (nodes,) float64."""
    return _estimate(forms).clamp(min=0.0)


def squares(forms: Forms) -> Tensor:
    """Squares of the products as `flowlik_estimators.divergence.law.Law.columns` takes them, averaged, (nodes,)."""
    found = squared_products(forms.probes.double(), forms.products.double(), free=not forms.diagonal)
    return found.mean((1, 2))


def less(forms: Forms, known: Known, by: Tensor) -> Forms:
    """The same of J - by G, ``by`` (nodes,); G is symmetric, so the pairs do not change."""
    axes, k = known.axes.double(), len(known.axes)
    scaled = (by[:, None] * known.spectrum)[:, None, None]
    above, rest = scaled[..., :k], scaled[..., k:]
    taken: Tensor | float = 0.0
    if rest.shape[-1]:
        above, taken = above - rest, rest * forms.probes.double()
    taken = taken + ((forms.signs.double() @ axes.T)[None] * above) @ axes
    return replace(forms, products=forms.products.double() - taken)


def coefficient(forms: Forms, known: Known) -> Tensor:
    """The coefficient of the control that leaves the least variance, (nodes,).

    0 where the control's own variance is rounding only: its Jacobian is a multiple of one, as at both ends of time, or
    its axes are the rows of the basis.
    """
    one = torch.ones(len(forms.products), dtype=torch.float64, device=forms.products.device)
    below, here, above = (_estimate(less(forms, known, c * one)) for c in (-1.0, 0.0, 1.0))
    slope, curvature = (below - above) / 4.0, (below + above) / 2.0 - here
    moves = curvature > _ROUNDING * known.spectrum.double().square().sum(1)
    return torch.where(moves, slope / torch.where(moves, curvature, 1.0), 0.0)


def _estimate(forms: Forms) -> Tensor:
    w = forms.products.double()
    square = w.square().sum(3).mean(2) - (forms.pairs.double() / 2.0).square()
    if forms.diagonal:
        square = square - (forms.signs.double() * w).prod(2).sum(2)
    return 2.0 * square.mean(1)


def choose(variances: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The quietest basis at each node, from variances of one probe and coefficients of the control, (bases, nodes).

    Returns:
        Index of the basis, its coefficient, variance of one probe; each (nodes,). Variances are averaged 1 : 2 : 1 with
        those of the neighbouring nodes before they are compared.
    """
    smooth = _smoothed(variances)
    quietest = smooth.argmin(0)
    pick = quietest[None]
    return quietest, coefficients.gather(0, pick)[0], smooth.gather(0, pick)[0]


def scale(variance: Tensor, squares: Tensor, basis: Tensor) -> Tensor:
    """The chosen variance over the squares of the products in that basis, (nodes,), from squares (bases, nodes)."""
    square = _smoothed(squares).gather(0, basis[None])[0]
    return torch.where(square > 0.0, variance / torch.where(square > 0.0, square, 1.0), 0.0)


def _smoothed(values: Tensor) -> Tensor:
    padded = torch.cat([values[:, :1], values, values[:, -1:]], 1)
    return (padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]) / 4.0
