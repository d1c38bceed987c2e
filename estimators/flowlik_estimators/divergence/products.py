r"""The divergence of a field, div v = tr dv/dx, by vector-Jacobian products.

- `exact`: d vector-Jacobian products that share one forward: one after the other, which is smallest and fastest on a
  CPU from about 32 rows on, or for fewer rows in batches of `GROUPED_ROWS` rows of cotangents, because there the
  calls cost more than the arithmetic. The graph stays only for the next product, and is itself differentiable only
  if asked.
- `hutchinson`: ``e^T J e`` for k probes with E[e e^T] = I, unbiased (Hutchinson 1990; for flows arXiv
  1810.01367), one forward and k vector-Jacobian products. The probes of a sample are the same at every time of a solve,
  adaptive or fixed-step: then each column is the divergence of one fixed quadratic form, which an error
  controller can follow, and the columns stay independent replicates.

Both return the value and (batch, columns) divergences: one column, or one a probe. Other laws of probes,
bases and a control variate are in `flowlik_estimators.divergence.probes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Noise, Run

GROUPED_ROWS, SMALLEST_GROUP = 256, 8
"""So many rows of cotangents share a backward pass; groups of fewer vector-Jacobian products do not pay.

Measured on a CPU, d = 64, time over that of the loop at 1 / 4 / 16 / 32 rows: closed-form mixture 0.14 / 0.22 / 0.33 /
0.55, MLP 0.11 / 0.21 / 0.44 / 0.66, U-Net 0.23 / 0.34 / 0.71 / 1.03. At d = 2 there is nothing to gain.
"""

Field = Callable[[Tensor], Tensor]
"""x (batch, *event) -> v (batch, *event), at a time that is fixed inside."""

Divergence = Callable[[Field, Tensor], tuple[Tensor, Tensor]]
"""A field and x -> the field's value (batch, *event) and its divergence (batch, columns)."""


def exact(field: Field, x: Tensor, *, differentiable: bool = False) -> tuple[Tensor, Tensor]:
    """Value and divergence (batch, 1): 1 forward and d vjps per sample.

    >>> value, divergence = exact(lambda x: x**2, torch.tensor([[1.0, 2.0]]))
    >>> value.tolist(), divergence.tolist()
    ([[1.0, 4.0]], [[6.0]])
    """
    x, value = with_graph(field, x, differentiable)
    columns = [row[:, i] for i, row in enumerate(jacobian_rows(value, x, differentiable))]
    return _released(value, differentiable), torch.stack(columns, 1).sum(1, keepdim=True)


def jacobian_rows(value: Tensor, x: Tensor, differentiable: bool) -> Iterator[Tensor]:
    """Row i of every Jacobian dvalue/dx, (batch, d), for i = 0 ... d - 1: one vjp each, zero where no graph leads."""
    size = x[0].numel()
    group = min(size, GROUPED_ROWS // len(x))
    start = 0
    if group >= SMALLEST_GROUP and not differentiable and value.requires_grad:
        for start in range(0, size, group):
            block = _grouped(value, x, range(start, min(start + group, size)))
            if block is None:
                break
            yield from block.flatten(2)
        else:
            return
    for i in range(start, size):
        yield _vjp(_component(value, i), x, differentiable, last=i == size - 1).flatten(1)


def _units(x: Tensor, which: range) -> Tensor:
    """Unit vectors of one event for the whole batch, (len(which), batch, *event), views of one small tensor."""
    units = torch.zeros(len(which), x[0].numel(), dtype=x.dtype, device=x.device)
    units[:, which.start : which.stop].fill_diagonal_(1.0)
    return units.view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)


def _grouped(value: Tensor, x: Tensor, which: range) -> Tensor | None:
    """Those rows of every Jacobian, (len(which), batch, *event); None where the network cannot be batched over."""

    def product(cotangent: Tensor) -> Tensor:
        (vjp,) = torch.autograd.grad(value, x, cotangent, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if vjp is None else vjp

    try:
        # not is_grads_batched: its rules are older, and take convolutions and norms one cotangent after the other
        block: Tensor = torch.func.vmap(product)(_units(x, which))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation of the network has no rule for a batch of cotangents
        return None
    return block


def hutchinson(
    field: Field, x: Tensor, probes: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Value and one estimate a probe (batch, k), probes (batch, k, *event): 1 forward and k vjps per sample.

    >>> probes = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    >>> value, estimates = hutchinson(lambda x: x @ torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.ones(1, 2), probes)
    >>> estimates.tolist()  # both about the trace, 4
    [[6.0, 2.0]]
    """
    value, columns, _ = hutchinson_with_products(field, x, probes, differentiable=differentiable, keep=False)
    return value, columns


def hutchinson_with_products(
    field: Field, x: Tensor, probes: Tensor, *, differentiable: bool = False, keep: bool = True
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same, and the products J^T e, (batch, d) each, without a graph (``keep`` False: none)."""
    x, value = with_graph(field, x, differentiable)
    count = probes.shape[1]
    columns, kept = [], []
    for k in range(count):
        probe = probes[:, k]
        vjp = _vjp(_along(value, probe), x, differentiable, last=k == count - 1)
        columns.append((vjp * probe).flatten(1).sum(1))
        if keep:
            kept.append(vjp.detach().flatten(1))
    return _released(value, differentiable), torch.stack(columns, 1), kept


def hutch_plus_plus(
    field: Field, x: Tensor, probes: Tensor, *, differentiable: bool = False
) -> tuple[Tensor, Tensor]:
    """Value and one estimate (batch, k) for each of the last k of 2 k probes, by 1 forward and 3 k vjps per sample.

    With Q an orthonormal basis of the products ``J^T e`` of the first k probes the trace is ``tr Q^T J Q`` plus that of
    the rest, ``g^T J g`` of the last probes less their parts in Q: unbiased, and quiet where J is of low rank (Meyer,
    Musco, Musco and Woodruff 2021, arXiv 2010.09649).

    >>> probes = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    >>> matrix = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    >>> _, estimates = hutch_plus_plus(lambda x: x @ matrix, torch.ones(1, 2), probes)
    >>> estimates.round(decimals=4).tolist()  # of rank one, so the head is all of it
    [[5.0]]
    """
    x, value = with_graph(field, x, differentiable)

    def products(vectors: Tensor) -> Tensor:
        vjps = [
            _vjp(_along(value, v.reshape(x.shape)), x, differentiable, last=False) for v in vectors.unbind(1)
        ]
        return torch.stack(vjps, 1).flatten(2)

    sketch, rest = probes.flatten(2).chunk(2, 1)
    head = torch.linalg.qr(products(sketch).mT).Q.mT  # (batch, k, d), orthonormal rows
    within = (head * products(head)).sum((1, 2))
    rest = rest - (rest @ head.mT) @ head
    columns = within[:, None] + (rest * products(rest)).sum(2)
    return _released(value, differentiable), columns


def vector_jacobian_products(field: Field, x: Tensor, probes: Tensor) -> Tensor:
    """``J^T e`` of each probe, (batch, k, d), probes (batch, k, *event): 1 forward and k vjps per sample."""
    x, value = with_graph(field, x, differentiable=False)
    count = probes.shape[1]
    vjps = [_vjp(_along(value, probes[:, k]), x, False, last=k == count - 1) for k in range(count)]
    return torch.stack(vjps, 1).flatten(2)


@dataclass(frozen=True, kw_only=True)
class Traced(Estimator):
    """Options of the families that take a trace by vector-Jacobian products."""

    trace: Literal["exact", "hutchinson"] = "exact"
    probes: int | None = None
    noise: Noise | None = None

    def implied(self) -> dict[str, object]:
        """One Rademacher probe, where there are probes at all."""
        return {"probes": 1, "noise": "rademacher"} if self.trace == "hutchinson" else {}

    def _check(self) -> None:
        self._at_least_one("probes")
        if self.trace != "hutchinson":
            self._no_effect(f"with trace={self.trace}", "probes", "noise")

    def divergence_rule(self, run: Run) -> Divergence:
        """The rule that these options name, with the probes of this call."""
        if self.trace == "hutchinson":
            assert self.probes is not None
            assert self.noise is not None
            probes = run.probes(self.probes, self.noise)
            return lambda field, x: hutchinson(field, x, probes, differentiable=run.differentiable)
        return lambda field, x: exact(field, x, differentiable=run.differentiable)

    @property
    def columns(self) -> int:
        """Number of divergence columns."""
        return self.probes or 1


def with_graph(field: Field, x: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    """x as a leaf (unless the caller differentiates through it) and the field's value with its graph."""
    with torch.enable_grad():
        if not (differentiable and x.requires_grad):
            x = x.detach().requires_grad_()
        return x, field(x)


def _component(value: Tensor, i: int) -> Tensor:
    """Component i of a value, summed over the batch: its gradient is row i of every Jacobian."""
    with torch.enable_grad():
        return value.flatten(1)[:, i].sum()


def _along(value: Tensor, probe: Tensor) -> Tensor:
    """``e^T v`` summed over the batch: its gradient is ``J^T e``."""
    with torch.enable_grad():
        return (value * probe).sum()


def _vjp(total: Tensor, x: Tensor, differentiable: bool, *, last: bool) -> Tensor:
    """The gradient of a sum over the batch, zero where it does not depend on x.

    Of a sum and not by a cotangent, for whose shape torch loads sympy, a third of a second.
    """
    if not total.requires_grad:
        return torch.zeros_like(x)
    keep = differentiable or not last
    (vjp,) = torch.autograd.grad(total, x, retain_graph=keep, create_graph=differentiable, allow_unused=True)
    return torch.zeros_like(x) if vjp is None else vjp


def _released(value: Tensor, differentiable: bool) -> Tensor:
    return value if differentiable else value.detach()
