"""Which probes a trace is worth: the law of the probes at a node, and the pilot that chooses it.

A pilot measures the quadratic forms of every candidate on a few draws of the model itself. The draws are the same for
every call, so that what is chosen does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowlik_estimators import probes as laws
from flowlik_estimators import quadrature
from flowlik_estimators.base import Run
from flowlik_estimators.probes import Basis, GaussianControl, Noise
from flowlik_estimators.trace import hutchinson

if TYPE_CHECKING:
    from flowlik_estimators.ode import ODE

STEP_ENDS = 17
"""Without probes, the adaptive solve of x ends a step at the nodes of this rule; it interpolates between its steps."""

PILOT_STREAM = 2**17
PILOT_ITEMS = 16
PILOT_PROBES = 2
PILOT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Node:
    """How one node's probes are drawn; variance of one probe and error of the rule as the pilot saw them."""

    basis: Basis
    coefficient: float
    probes: int
    variance: float | None = None
    error: float | None = None


class Law:
    """Probes in one basis, and their control."""

    def __init__(self, estimator: ODE, model: Any, run: Run, basis: Basis) -> None:
        assert estimator.noise is not None
        self.noise: Noise = estimator.noise
        moments = getattr(model, "moments", None)
        self.rotation = laws.rotation(basis, run.event_shape, moments, run.dtype, run.device)
        controlled = estimator.control in ("gaussian", "auto") and moments is not None
        self.control = (
            GaussianControl(moments, run.event_shape, run.dtype, run.device) if controlled else None
        )

    def draw(self, run: Run, count: int, stream: int) -> Tensor:
        """Probes (batch, count, *event), keyed by item and stream."""
        drawn = laws.coordinates(
            self.noise,
            run.key,
            run.items,
            count,
            self.rotation.size,
            stream=stream,
            dtype=run.dtype,
            device=run.device,
        )
        return self.rotation.apply(drawn).reshape(run.batch, count, *run.event_shape)

    def squares(self, probes: Tensor) -> Tensor | None:
        """What the control needs of the probes, once."""
        return None if self.control is None else self.control.squares(probes)

    def controlled(self, columns: Tensor, squares: Tensor | None, coefficient: float, t: Tensor) -> Tensor:
        """The columns less the control."""
        if squares is None or self.control is None:
            return columns
        return columns - coefficient * self.control.excess(squares, t)

    def columns(self, model: Any, run: Run, x: Tensor, t: float, node: Node, stream: int) -> Tensor:
        """Fresh estimates of the divergence at (x, t), (batch, probes)."""
        probes, at = self.draw(run, node.probes, stream), run.at(t)
        _, columns = hutchinson(
            lambda y: run.velocity(model, y, at), x.to(run.dtype), probes, differentiable=run.differentiable
        )
        squares = None if node.coefficient == 0.0 else self.squares(probes)
        return self.controlled(columns, squares, node.coefficient, at[:1])


class Pilot:
    """Quadratic forms of every candidate at the nodes, on draws of the model that are the same for every call.

    The draws do not depend on the batch, nor does what is chosen by them; the probes are others than those of
    the estimate, which stays unbiased.
    """

    def __init__(self, estimator: ODE, model: Any, run: Run, *, nodes: int | None) -> None:
        if run.cond is not None:
            raise ValueError(
                f"{estimator.name}: the pilot draws from the model, which here needs cond; name basis, control "
                "and nodes, and take allocation=uniform"
            )
        self.estimator, self.model = estimator, model
        self.run = replace(
            run, batch=PILOT_ITEMS, items=torch.arange(PILOT_ITEMS), key=0, differentiable=False
        )
        self.bases = _open(estimator, model)
        self.control: str = estimator.control or "none"
        with torch.no_grad():
            self._measure(nodes)

    def _measure(self, nodes: int | None) -> None:
        estimator, run = self.estimator, self.run
        finest = nodes or 65
        times = quadrature.angle_rule(finest, run.data_end)[0]
        loose = estimator
        if estimator.adaptive:
            loose = replace(
                estimator,
                rtol=max(estimator.rtol or 0.0, PILOT_TOLERANCE),
                atol=max(estimator.atol or 0.0, PILOT_TOLERANCE),
            )
        path = loose.states(self.model, run.source(), run, times.to(run.device))
        candidates = [Law(estimator, self.model, run, basis) for basis in self.bases]
        drawn = [law.draw(run, PILOT_PROBES, PILOT_STREAM) for law in candidates]
        probes = torch.cat(drawn, 1)
        control, squares = candidates[0].control, candidates[0].squares(probes)  # the same in every basis
        columns: dict[int, Tensor] = {}
        excess: dict[int, Tensor] = {}
        judged = [n for n in quadrature.LEVELS if quadrature.FIRST_JUDGED <= n <= finest]
        for level in [nodes] if nodes else judged:
            stride = quadrature.stride(level, finest)
            for j in range(0, finest, stride):
                if j in columns:
                    continue
                at = run.at(times[j])
                _, forms = hutchinson(
                    lambda y, at=at: run.velocity(self.model, y, at),  # type: ignore[misc]
                    path[j].to(run.dtype),
                    probes,
                )
                columns[j] = forms.double()
                if control is not None and squares is not None:
                    excess[j] = control.excess(squares, at[:1]).double()
            order = range(0, finest, stride)
            self.columns = torch.stack([columns[j] for j in order])
            self.excess = torch.stack([excess[j] for j in order]) if excess else None
            # fixed probes along the path: their forms are smooth in time, as fresh ones are not
            errors = quadrature.error_estimate(self.columns.mean(2).T, run.data_end)
            self.error = float(errors.square().mean().sqrt())
            if estimator.tol is not None and self.error <= estimator.tol:
                break

    def _choose(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best law for each combination (combinations, nodes) of the nodes."""

        def combined(forms: Tensor | None) -> Tensor | None:
            if forms is None:
                return None
            shaped = forms.reshape(len(forms), PILOT_ITEMS, len(self.bases), PILOT_PROBES)
            return torch.einsum("cn,nibp->cibp", weights.to(shaped), shaped)

        columns = combined(self.columns)
        assert columns is not None
        return quadrature.choose(columns, combined(self.excess), self.control)

    def of_the_whole_path(self) -> tuple[Basis, float]:
        """One basis and coefficient for a probe that is kept along the path."""
        weights = quadrature.angle_rule(len(self.columns), self.run.data_end)[1]
        basis, coefficient, _ = self._choose(weights[None, :])
        return self.bases[int(basis)], float(coefficient)

    def plan(self) -> list[Node]:
        """Law and number of probes of every node."""
        estimator = self.estimator
        assert estimator.probes is not None
        count = len(self.columns)
        basis, coefficient, variance = (c.tolist() for c in self._choose(torch.eye(count)))
        weights = quadrature.angle_rule(count, self.run.data_end)[1].abs().tolist()
        probes = [estimator.probes] * count
        if estimator.allocation == "neyman":
            most = math.prod(self.run.event_shape) if estimator.noise == "orthogonal" else None
            noisy = [w * math.sqrt(v) for w, v in zip(weights, variance, strict=True)]
            probes = quadrature.allocate(noisy, estimator.probes * count, most)
        return [
            Node(self.bases[b], c, n, v, self.error)
            for b, c, n, v in zip(basis, coefficient, probes, variance, strict=True)
        ]


def _open(estimator: ODE, model: Any) -> list[Basis]:
    """The bases that the options leave open and the model's events and moments allow."""
    assert estimator.basis is not None
    if estimator.basis != "auto":
        return [estimator.basis]
    rotated: tuple[Basis, ...] = ("dct", "pca") if estimator.noise != "gaussian" else ()
    return ["pixel", *(b for b in rotated if laws.refusal(estimator.noise, b, None, None, model) is None)]
