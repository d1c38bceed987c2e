r"""How skew the errors of a few fixed probes are, from the products that the probes take anyway.

The error of one probe is a quadratic form of random signs. Where its matrix S is nearly of rank one the form is nearly
a chi-square of one degree: the mean of k probes is often too low, the sample variance is too small in the same cases,
and Student's bar is too short. k forms cannot tell; the cross forms ``g_ij = e_i^T S e_j`` of two probes can, because
the products ``J^T e_i`` are known: ``E g_ij^2 = |S|_F^2``, ``E g_ij g_jl g_li = tr S^3``. Their ratio
``(tr S^3)^2/|S|^6`` is 1 for rank one and 0 for a symmetric law; its noise where S has full rank is one over the number
of triples. A multiple of the identity is taken off first: signs do not see it.

The variance is widened by `WIDENING` times that ratio (scaled by `SLOPE`, at most 1) times ``2 |S|^2``, the variance by
the cross forms, but by no more than `LARGEST` times the sample variance: cross forms see the diagonal of S too, which
makes no noise. In a basis chosen because S is nearly diagonal there they say nothing. Measured, eight probes: nine
separated isotropic components in 64 dimensions 0.90 before and 0.95 after, rank one 0.85 and 0.93, `gmm-64d` 0.945 and
0.950, the digits teacher 0.945 and 0.961.

Two to four probes have no triples, or four at most. Of them the products themselves tell the rank: with rank one all
``J^T e_i`` are parallel, and the mean of ``(e_i^T S^2 e_j)^2`` over that of ``|S e_i|^2 |S e_j|^2`` is ``tr S^4/(tr
S^2)^2``, one over the number of equal eigenvalues, whatever their signs. It is taken at every time and averaged by
the size of the products there; `FEW_WIDENING` times the square of what lies above `FLOOR`/d widens the variance, by
no more than `FEW_LARGEST` times. Measured, 2 / 3 / 4 probes: nine separated components 0.92 / 0.90 / 0.90 before,
0.95 / 0.94 / 0.94 after, with a mean standard error 1.3 to 1.6 times the mean |error|; the digits teacher (360
images) 0.95 / - / 0.96 and 0.96 / - / 0.96. Of exactly rank one (two components) 0.85 / 0.82 / 0.81 become 0.92 /
0.92 / 0.925 at 1.5 to 2 times the error; 0.95 / 0.935 / 0.94 would take 2.1 to 2.4 times: where every probe misses
the one direction, all that the probes see is small, and nothing in it tells by how much.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

BLOCK = 8
"""Cross forms are taken inside blocks of so many probes: their number grows with the probes, not with the square."""

FEWEST = 5
"""Of fewer probes the ratio of triples is noise."""

SLOPE, WIDENING, LARGEST = 3.0, 2.0, 3.0
FEW_WIDENING, FEW_LARGEST = 3.0, 10.0

FLOOR = 4.0
"""So much over d is the share of rank one from which few probes count: twice that of a random matrix."""


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """``(a_i . b_j + a_j . b_i)/2`` for all i < j of a block, (batch, pairs), from (batch, k, d) each."""
    table = left @ right.transpose(1, 2)
    i, j = _where(left.shape[1])
    return (_entries(table, i, j) + _entries(table, j, i)) / 2.0


def _entries(table: Tensor, i: list[int], j: list[int]) -> Tensor:
    """``table[:, i, j]``, one by one: the host would wait for lists to be on the device."""
    return torch.stack([table[:, a, b] for a, b in zip(i, j, strict=True)], 1)


def forms(products: Tensor, probes: Tensor, *, free: bool) -> Tensor:
    """What `widening` asks of a time, (batch, form_count), from products and probes (batch, k, d): the cross forms;
    of few probes their share of rank one too, weighted by the size of the products, and that size.

    ``free``: of Gaussian probes, which see the identity in J.
    """
    if (k := probes.shape[1]) >= FEWEST:
        return pairs(products, probes)
    if not free:
        trace = (products * probes).sum(2).mean(1) / probes.shape[2]
        products = products - trace[:, None, None] * probes
    table = products @ products.transpose(1, 2)
    i, j = _where(k)
    size = (_entries(table, i, i) * _entries(table, j, j)).mean(1)
    share = _entries(table, i, j).square().mean(1) / torch.where(size > 0, size, 1.0)
    floor = min(1.0, FLOOR / probes.shape[2])
    share = (share - floor) / (1.0 - floor) if floor < 1.0 else torch.zeros_like(share)
    weight = size.pow(0.25)
    return torch.cat((pairs(products, probes), (weight * share)[:, None], weight[:, None]), 1)


def overlaps(probes: Tensor, *, free: bool) -> Tensor:
    """``e_i . e_j`` of the pairs, (batch, pairs), by which `without_identity` knows the identity: nought where `forms`
    has taken it off, and of ``free`` probes."""
    found = pairs(probes, probes)
    return torch.zeros_like(found) if free or probes.shape[1] < FEWEST else found


def form_count(probes: int) -> int:
    """How many numbers `forms` gives; 0 where a single probe says nothing."""
    return 0 if probes < 2 else len(_where(probes)[0]) + (2 if probes < FEWEST else 0)


def widening(variance: Tensor, found: Tensor, probes: int) -> Tensor:
    """What a standard error grows by, (batch,), from the variance of one probe and `forms` along the path."""
    if probes < FEWEST:
        square, weight = found[:, :-2].square().mean(1), found[:, -1]
        share = (found[:, -2] / torch.where(weight == 0.0, 1.0, weight)).clamp(min=0.0)
        share = FEW_WIDENING * share.square()
        most = FEW_LARGEST
    else:
        square, share = _by_triples(found, probes)
        share, most = WIDENING * share, LARGEST
    more = share * 2.0 * square / torch.where(variance > 0.0, variance, 1.0)
    return torch.where(variance > 0.0, (1.0 + more.clamp(max=most)).sqrt(), 1.0)


def _by_triples(cross: Tensor, probes: int) -> tuple[Tensor, Tensor]:
    """``|S|^2`` and how far the law is that of rank one, (batch,) each, from cross forms (batch, pairs)."""
    square, triple, triples = cross.new_zeros(len(cross)), cross.new_zeros(len(cross)), 0
    start = 0
    for size in _sizes(probes):
        count = math.comb(size, 2)
        table = _table(cross[:, start : start + count], size)
        square = square + table.square().sum((1, 2)) / 2.0
        triple = triple + (table @ table * table).sum((1, 2)) / 6.0
        start, triples = start + count, triples + math.comb(size, 3)
    square, triple = square / start, triple / triples
    ratio = torch.where(square > 0, triple.square() / square.pow(3), 0.0)
    return square, (SLOPE * (ratio - 1.0 / triples)).clamp(0.0, 1.0)


def without_identity(found: Tensor, overlap: Tensor) -> Tensor:
    """Cross forms less the multiple of ``e_i . e_j`` that fits them best: that of the identity in S. What stands behind
    the forms of the pairs stays as it is."""
    cross, rest = found[:, : overlap.shape[1]], found[:, overlap.shape[1] :]
    size = overlap.square().sum(1, keepdim=True)
    fitted = (cross * overlap).sum(1, keepdim=True) / torch.where(size > 0, size, 1.0)
    return torch.cat((cross - fitted * overlap, rest), 1)


def _sizes(probes: int) -> list[int]:
    blocks = -(-probes // BLOCK)
    return [probes // blocks + (i < probes % blocks) for i in range(blocks)]


def _where(probes: int) -> tuple[list[int], list[int]]:
    """Rows and columns of all pairs, block after block."""
    found: list[tuple[int, int]] = []
    start = 0
    for size in _sizes(probes):
        found += combinations(range(start, start + size), 2)
        start += size
    return [i for i, _ in found], [j for _, j in found]


def _table(cross: Tensor, size: int) -> Tensor:
    """The symmetric table of a block, zero on the diagonal, (batch, size, size)."""
    table = cross.new_zeros(len(cross), size, size)
    i, j = _where(size)
    table[:, i, j] = cross
    table[:, j, i] = cross
    return table
