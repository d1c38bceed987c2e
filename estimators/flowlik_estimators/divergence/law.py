"""The law of the probes at a node: how many, in which basis, with how much of the Gaussian control taken off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Run
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.probes import Basis, GaussianControl, Noise
from flowlik_estimators.divergence.products import hutchinson_with_products

AUTO: Literal["auto"] = "auto"
"""Of a basis or a control: chosen by the pilot."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """``probes`` of ``noise`` in a ``basis``, less a ``control``; auto where a pilot chooses."""

    noise: Noise
    basis: Literal["pixel", "dct", "pca", "auto"]
    control: Literal["none", "gaussian", "auto"]
    probes: int

    @property
    def automatic(self) -> bool:
        """Whether a pilot is needed to know the law."""
        return AUTO in (self.basis, self.control)

    @property
    def named_basis(self) -> Basis:
        """The basis where the options name one."""
        assert self.basis != "auto"
        return self.basis


@dataclass(frozen=True)
class Node:
    """How one node's probes are drawn.

    As the pilot saw them: variance of one probe, ``scale`` of that variance over what `Law.columns` calls squares, and
    error of the rule.
    """

    basis: Basis
    coefficient: float
    probes: int
    variance: float | None = None
    scale: float | None = None
    error: float | None = None


class Law:
    """Probes in one basis, and their control."""

    def __init__(self, options: ProbeOptions, model: Any, run: Run, basis: Basis) -> None:
        self.noise: Noise = options.noise
        moments = getattr(model, "moments", None)
        self.rotation = laws.rotation(basis, run.event_shape, moments, run.dtype, run.device)
        controlled = options.control in ("gaussian", "auto") and moments is not None
        self.control = (
            GaussianControl(moments, run.event_shape, run.dtype, run.device) if controlled else None
        )

    def coordinates(self, noise: Noise, run: Run, count: int, stream: int) -> Tensor:
        """Coordinates of probes in this basis, (batch, count, size), keyed by item and stream."""
        return laws.coordinates(
            noise,
            run.key,
            run.items,
            count,
            self.rotation.size,
            stream=stream,
            dtype=run.dtype,
            device=run.device,
        )

    def draw(self, run: Run, count: int, stream: int) -> Tensor:
        """Probes (batch, count, *event), keyed by item and stream."""
        drawn = self.coordinates(self.noise, run, count, stream)
        return self.rotation.apply(drawn).reshape(run.batch, count, *run.event_shape)

    def squares(self, probes: Tensor) -> Tensor | None:
        """What the control needs of the probes, once."""
        return None if self.control is None else self.control.squares(probes)

    def controlled(self, columns: Tensor, squares: Tensor | None, coefficient: float, t: Tensor) -> Tensor:
        """The columns less the control."""
        if squares is None or self.control is None:
            return columns
        return columns - coefficient * self.control.excess(squares, t)

    def controlled_products(self, products: Tensor, flat: Tensor, coefficient: float, t: Tensor) -> Tensor:
        """Products ``J^T e`` of probes ``flat``, (batch, k, d) each, less those of the control."""
        if self.control is None or coefficient == 0.0:
            return products
        return products - coefficient * self.control.product(flat, t)

    def columns(
        self, model: Any, run: Run, x: Tensor, t: float, node: Node, stream: int
    ) -> tuple[Tensor, Tensor]:
        """Fresh estimates of the divergence at (x, t), (batch, probes), and squares of their products, likewise.

        A square is ``|J^T e|^2`` less the control's and, but for Gaussian probes, less its part along e: what the
        identity in J adds to it, and not to the variance.
        """
        probes, at = self.draw(run, node.probes, stream), run.at(t)
        _, columns, products = hutchinson_with_products(
            lambda y: run.velocity(model, y, at), x.to(run.dtype), probes, differentiable=run.differentiable
        )
        squares = None if node.coefficient == 0.0 else self.squares(probes)
        controlled = self.controlled(columns, squares, node.coefficient, at[:1])
        flat = probes.flatten(2)
        left = self.controlled_products(torch.stack(products, 1), flat, node.coefficient, at[:1])
        return controlled, squared_products(flat, left, free=self.noise == "gaussian")


def squared_products(probes: Tensor, products: Tensor, *, free: bool) -> Tensor:
    """``|w|^2`` of products w (..., d), less the part along the probe unless the probes are ``free`` of axes."""
    square = products.square().sum(-1)
    if free:
        return square
    return square - (probes * products).sum(-1).square() / probes.square().sum(-1)
