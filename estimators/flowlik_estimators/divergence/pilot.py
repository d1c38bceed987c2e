"""Which probes a trace is worth: the law of the probes at a node, and the pilot that chooses it.

A pilot takes two products for every candidate basis on a few draws of the model itself;
`flowlik_estimators.divergence.probe_variance` says what follows from them. The draws are the same for every call: what
is chosen does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowlik_estimators.call import Run
from flowlik_estimators.divergence import probe_variance
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.probe_variance import Forms, Known
from flowlik_estimators.divergence.probes import Basis, GaussianControl, Noise
from flowlik_estimators.divergence.products import hutchinson, products
from flowlik_estimators.integration import clenshaw_curtis

if TYPE_CHECKING:
    from flowlik_estimators.ode import ODE

STEP_ENDS = 17
"""Without probes, the adaptive solve of x ends a step at the nodes of this rule; it interpolates between its steps."""

PILOT_STREAM = 2**17
PILOT_ITEMS = 8
"""Two probes on each give d squares of noise, so that few are enough; the cost is shared by all items of a call."""

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
        times = clenshaw_curtis.angle_rule(finest, run.data_end)[0]
        loose = estimator
        if estimator.adaptive:
            loose = replace(
                estimator,
                rtol=max(estimator.rtol or 0.0, PILOT_TOLERANCE),
                atol=max(estimator.atol or 0.0, PILOT_TOLERANCE),
            )
        path = loose.states(self.model, run.source(), run, times.to(run.device))
        self._draw()
        probes = torch.cat(
            [law.rotation.apply(signs) for law, signs in zip(self.laws, self.signs, strict=True)], 1
        )
        shaped = probes.reshape(run.batch, probes.shape[1], *run.event_shape)
        found: dict[int, Tensor] = {}
        judged = [n for n in clenshaw_curtis.LEVELS if clenshaw_curtis.FIRST_JUDGED <= n <= finest]
        for level in [nodes] if nodes else judged:
            stride = clenshaw_curtis.stride(level, finest)
            for j in range(0, finest, stride):
                if j not in found:
                    at = run.at(times[j])
                    found[j] = products(
                        lambda y, at=at: run.velocity(self.model, y, at),  # type: ignore[misc]
                        path[j].to(run.dtype),
                        shaped,
                    )
            order = range(0, finest, stride)
            self.products = torch.stack([found[j] for j in order])
            # fixed probes along the path: their forms are smooth in time, as fresh ones are not
            forms = (self.products * probes).sum(3).mean(2).double()
            errors = clenshaw_curtis.error_estimate(forms.T, run.data_end)
            self.error = float(errors.square().mean().sqrt())
            if estimator.tol is not None and self.error <= estimator.tol:
                break
        self.probes, self.times = probes, [float(times[j]) for j in order]

    def _draw(self) -> None:
        """Signs (items, 2, size) for every candidate; orthogonal probes differ from free signs by 1/d only."""
        run = self.run
        noise: Noise = "gaussian" if self.estimator.noise == "gaussian" else "rademacher"
        self.laws = [Law(self.estimator, self.model, run, basis) for basis in self.bases]
        self.signs = [law.coordinates(noise, run, PILOT_PROBES, PILOT_STREAM) for law in self.laws]

    def _forms(self, index: int) -> Forms:
        """What the two probes in one basis gave."""
        where = slice(PILOT_PROBES * index, PILOT_PROBES * (index + 1))
        probes, w = self.probes[:, where], self.products[:, :, where]
        pairs = (w[:, :, 0] * probes[:, 1]).sum(2) - (w[:, :, 1] * probes[:, 0]).sum(2)
        back = self.laws[index].rotation.back
        diagonal = self.estimator.noise != "gaussian"
        return Forms(self.signs[index], back(probes), back(w), pairs, diagonal)

    def _known(self, index: int) -> Known | None:
        """The control in one basis, None where there is none."""
        law = self.laws[index]
        if law.control is None:
            return None
        spectrum = torch.stack([law.control.spectrum(torch.tensor([t])) for t in self.times])
        axes = law.rotation.back(law.control.vectors.T)
        return Known(axes, spectrum)

    def _choose(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best law for each combination (combinations, nodes) of the nodes."""
        variances, coefficients = [], []
        for index in range(len(self.bases)):
            forms = self._forms(index).combined(weights)
            coefficient = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
            known = None if self.control == "none" else self._known(index)
            if known is not None:
                known = known.combined(weights)
                coefficient = (
                    coefficient + 1.0
                    if self.control == "gaussian"
                    else probe_variance.coefficient(forms, known)
                )
                forms = probe_variance.less(forms, known, coefficient)
            variances.append(probe_variance.variance(forms))
            coefficients.append(coefficient)
        return probe_variance.choose(torch.stack(variances), torch.stack(coefficients))

    def of_the_whole_path(self) -> tuple[Basis, float]:
        """One basis and coefficient for a probe that is kept along the path."""
        weights = clenshaw_curtis.angle_rule(len(self.products), self.run.data_end)[1]
        basis, coefficient, _ = self._choose(weights[None, :])
        return self.bases[int(basis)], float(coefficient)

    def plan(self) -> list[Node]:
        """Law and number of probes of every node."""
        estimator = self.estimator
        assert estimator.probes is not None
        count = len(self.products)
        basis, coefficient, variance = (c.tolist() for c in self._choose(torch.eye(count)))
        weights = clenshaw_curtis.angle_rule(count, self.run.data_end)[1].abs().tolist()
        probes = [estimator.probes] * count
        if estimator.allocation == "neyman":
            most = math.prod(self.run.event_shape) if estimator.noise == "orthogonal" else None
            noisy = [w * math.sqrt(v) for w, v in zip(weights, variance, strict=True)]
            probes = clenshaw_curtis.allocate(noisy, estimator.probes * count, most)
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
