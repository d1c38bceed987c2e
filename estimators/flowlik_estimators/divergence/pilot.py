"""The pilot: which law of the probes (`flowlik_estimators.divergence.law`) each node of a rule gets.

A pilot takes two vector-Jacobian products for every candidate basis on a few draws of the model itself;
`flowlik_estimators.divergence.probe_variance` says what follows from them. The draws are the same for every call: what
is chosen does not depend on the batch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.call import Run
from flowlik_estimators.divergence import probe_variance
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.law import Law, Node, ProbeOptions
from flowlik_estimators.divergence.probe_variance import Forms, Known
from flowlik_estimators.divergence.probes import Basis, Noise
from flowlik_estimators.divergence.products import vector_jacobian_products
from flowlik_estimators.integration import clenshaw_curtis
from flowlik_estimators.integration.torchdiffeq_solve import Solve
from flowlik_models.numerics.streams import PILOT_STREAM

PILOT_ITEMS = 8
"""Two probes on each give d squares of noise, so that few are enough; the cost is shared by all items of a call."""

PILOT_PROBES = 2
PILOT_TOLERANCE = 1e-3


class Pilot:
    """Quadratic forms of every candidate at the nodes, on draws of the model that are the same for every call.

    The draws do not depend on the batch, nor does what is chosen by them; the probes are others than those of
    the estimate, which stays unbiased.
    """

    def __init__(
        self,
        options: ProbeOptions,
        solve: Solve,
        model: Any,
        run: Run,
        *,
        nodes: int | None,
        tol: float | None = None,
    ) -> None:
        """``solve`` takes the draws along their path; ``nodes`` None doubles them until the rule's error is ``tol``."""
        self.options, self.model = options, model
        self.run = replace(
            run, batch=PILOT_ITEMS, items=torch.arange(PILOT_ITEMS), key=0, differentiable=False
        )
        self.bases = _open(options, model)
        with torch.no_grad():
            self._measure(solve.loosened(PILOT_TOLERANCE), nodes, tol)

    def _measure(self, solve: Solve, nodes: int | None, tol: float | None) -> None:
        run = self.run
        finest = nodes or 65
        times = clenshaw_curtis.angle_rule(finest, run.data_end, run.noise_end)[0]
        path = solve.states(self.model, run.source(), run, times)
        self._draw()
        probes = torch.cat(
            [law.rotation.apply(signs) for law, signs in zip(self.laws, self.signs, strict=True)], 1
        )
        shaped = probes.reshape(run.batch, probes.shape[1], *run.event_shape)
        measured: dict[int, Tensor] = {}
        judged = [n for n in clenshaw_curtis.LEVELS if clenshaw_curtis.FIRST_JUDGED <= n <= finest]
        for level in [nodes] if nodes else judged:
            stride = clenshaw_curtis.stride(level, finest)
            for j in range(0, finest, stride):
                if j not in measured:
                    at = run.at(times[j])
                    measured[j] = vector_jacobian_products(
                        lambda y, at=at: run.velocity(self.model, y, at),  # type: ignore[misc]
                        path[j].to(run.dtype),
                        shaped,
                    )
            order = range(0, finest, stride)
            self.products = torch.stack([measured[j] for j in order])
            # fixed probes along the path: their forms are smooth in time, as fresh ones are not
            forms = (self.products * probes).sum(3).mean(2).double()
            errors = clenshaw_curtis.error_estimate(forms.T, run.data_end, start=run.noise_end)
            self.error = float(errors.square().mean().sqrt())
            if tol is not None and self.error <= tol:
                break
        self.probes, self.times = probes, [float(times[j]) for j in order]

    def _draw(self) -> None:
        """Signs (items, 2, size) for every candidate; orthogonal probes differ from free signs by 1/d only."""
        run = self.run
        noise: Noise = "gaussian" if self.options.noise == "gaussian" else "rademacher"
        self.laws = [Law(self.options, self.model, run, basis) for basis in self.bases]
        self.signs = [law.coordinates(noise, run, PILOT_PROBES, PILOT_STREAM) for law in self.laws]

    def _forms(self, index: int) -> Forms:
        """What the two probes in one basis gave."""
        where = slice(PILOT_PROBES * index, PILOT_PROBES * (index + 1))
        probes, w = self.probes[:, where], self.products[:, :, where]
        pairs = (w[:, :, 0] * probes[:, 1]).sum(2) - (w[:, :, 1] * probes[:, 0]).sum(2)
        back = self.laws[index].rotation.back
        diagonal = self.options.noise != "gaussian"
        return Forms(self.signs[index], back(probes), back(w), pairs, diagonal)

    def _known(self, index: int) -> Known | None:
        """The control in one basis, None where there is none."""
        law, device = self.laws[index], self.run.device
        if law.control is None:
            return None
        spectrum = torch.stack([law.control.spectrum(torch.full((1,), t, device=device)) for t in self.times])
        axes = law.rotation.back(law.control.vectors.T)
        return Known(axes, spectrum)

    def _choose(self, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best law for each combination (combinations, nodes) of the nodes: basis, coefficient, variance, scale."""
        variances, coefficients, squares = [], [], []
        for index in range(len(self.bases)):
            forms = self._forms(index).combined(weights)
            coefficient = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
            known = None if self.options.control == "none" else self._known(index)
            if known is not None:
                known = known.combined(weights)
                coefficient = (
                    coefficient + 1.0
                    if self.options.control == "gaussian"
                    else probe_variance.coefficient(forms, known)
                )
                forms = probe_variance.less(forms, known, coefficient)
            variances.append(probe_variance.variance(forms))
            coefficients.append(coefficient)
            squares.append(probe_variance.squares(forms))
        basis, coefficient, variance = probe_variance.choose(
            torch.stack(variances), torch.stack(coefficients)
        )
        return basis, coefficient, variance, probe_variance.scale(variance, torch.stack(squares), basis)

    def _weights(self, nodes: int) -> Tensor:
        """Weights of the rule between the ends of the call, (nodes,)."""
        return clenshaw_curtis.angle_rule(nodes, self.run.data_end, self.run.noise_end)[1]

    def of_the_whole_path(self) -> tuple[Basis, float]:
        """One basis and coefficient for a probe that is fixed along the path."""
        weights = self._weights(len(self.products)).to(self.run.device)
        basis, coefficient, *_ = self._choose(weights[None, :])
        chosen, factor = torch.cat([basis.double(), coefficient.double()]).tolist()
        return self.bases[int(chosen)], factor

    def plan(self, *, neyman: bool) -> list[Node]:
        """Law and number of probes of every node: those of the options, or allocated by Neyman's rule."""
        options, count = self.options, len(self.products)
        chosen = self._choose(torch.eye(count, device=self.run.device))
        index, coefficient, variance, scale = torch.stack([each.double() for each in chosen]).tolist()
        basis = map(int, index)
        probes = self._neyman(variance) if neyman else [options.probes] * count
        return [
            Node(self.bases[b], c, n, v, s, self.error)
            for b, c, n, v, s in zip(basis, coefficient, probes, variance, scale, strict=True)
        ]

    def _neyman(self, variance: list[float]) -> list[int]:
        """As many probes in all, allocated to the nodes by the variances of one probe there."""
        count = len(variance)
        weights = self._weights(count).abs().tolist()
        most = math.prod(self.run.event_shape) if self.options.noise == "orthogonal" else None
        noisy = [w * math.sqrt(v) for w, v in zip(weights, variance, strict=True)]
        return clenshaw_curtis.allocate(noisy, self.options.probes * count, most)


def _open(options: ProbeOptions, model: Any) -> list[Basis]:
    """The bases that the options leave open and the model's events and moments allow."""
    if options.basis != "auto":
        return [options.basis]
    rotated: tuple[Basis, ...] = ("dct", "pca") if options.noise != "gaussian" else ()
    return ["pixel", *(b for b in rotated if laws.refusal(options.noise, b, None, None, model) is None)]
