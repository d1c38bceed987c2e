"""The options that `ode` and `whitened-ode` share, what they imply, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Run
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.along_a_path import Quadrature
from flowlik_estimators.divergence.law import ProbeOptions
from flowlik_estimators.divergence.probes import Noise
from flowlik_estimators.divergence.products import Traced
from flowlik_estimators.grids import Grid
from flowlik_estimators.integration import clenshaw_curtis
from flowlik_estimators.integration.torchdiffeq_solve import ALIASES, ONE_STEP, SOLVERS, Solve, Solver
from flowlik_models.interfaces import lacks

FINER, FINEST_TOLERANCE = 1e-2, 1e-7
"""Share of the tolerances of the solve that shows the error of another one, and where single precision ends."""


@dataclass(frozen=True, kw_only=True)
class ODEOptions(Traced):
    """Options of an ODE solve with the divergence along it; `flowlik_estimators.ode.ODE` says what they mean."""

    family = "ode"

    solver: Solver = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    grid: Grid | None = None
    richardson: bool = False
    trace: Literal["exact", "hutchinson", "closed"] = "exact"  # type: ignore[assignment]
    noise: Noise | None = None  # type: ignore[assignment]
    basis: Literal["pixel", "dct", "pca", "auto"] | None = None
    control: Literal["none", "gaussian", "auto"] | None = None
    redraw: bool = False
    divergence: Literal["augmented", "quadrature"] = "augmented"
    nodes: int | None = None
    tol: float | None = None
    allocation: Literal["uniform", "neyman"] | None = None
    max_nfe: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        """Fold torchdiffeq's aliases, then check."""
        object.__setattr__(self, "solver", ALIASES.get(self.solver, self.solver))
        super().__post_init__()
        if self.stochastic and self.adaptive and self.divergence == "augmented":
            # of its error control; what other options answer is as it was
            object.__setattr__(self, "version", 2)

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return SOLVERS[self.solver].adaptive

    @property
    def stochastic(self) -> bool:
        """Whether the trace is estimated by probes."""
        return self.trace == "hutchinson"

    @property
    def deflated(self) -> bool:
        """Whether a third of the products look for the head of the Jacobian."""
        return self.noise == "hutch++"

    @property
    def columns(self) -> int:
        """Number of divergence columns."""
        return super().columns // 3 if self.deflated else super().columns

    @property
    def solve(self) -> Solve:
        """The solver with its tolerances, or with its steps."""
        return Solve(
            solver=self.solver,
            rtol=self.rtol,
            atol=self.atol,
            max_nfe=self.max_nfe,
            steps=self.steps,
            grid=self.grid,
            probed=self.stochastic,
        )

    @property
    def quadrature(self) -> Quadrature:
        """The rule along the path."""
        return Quadrature(nodes=self.nodes, tol=self.tol)

    @property
    def probe_options(self) -> ProbeOptions:
        """The law of the probes, as far as the options name it."""
        assert self.noise is not None
        assert self.basis is not None
        assert self.control is not None
        assert self.probes is not None
        return ProbeOptions(noise=self.noise, basis=self.basis, control=self.control, probes=self.probes)

    @property
    def needs_pilot(self) -> bool:
        """Whether draws of the model choose the law of the probes, their allocation or the number of nodes."""
        if not self.stochastic:
            return False
        chosen = self.allocation == "neyman" or (self.divergence == "quadrature" and self.nodes is None)
        return chosen or self.probe_options.automatic

    def finer(self, dtype: torch.dtype) -> tuple[Estimator, float] | None:
        """Tolerances of a hundredth (in single precision at least 1e-7), or twice as many steps and node intervals."""
        if self.redraw:  # other steps are other probes
            return None
        changed: dict[str, object] = {}
        if not self.stochastic and self.nodes is not None:
            changed["nodes"] = min(2 * self.nodes - 1, clenshaw_curtis.FINEST)
        if not self.stochastic and self.tol is not None:
            changed["tol"] = self.tol / 10.0
        if not self.adaptive:
            assert self.steps is not None
            order = (SOLVERS[self.solver].order or 3) + self.richardson
            return replace(self, steps=2 * self.steps, **changed), 1.0 / (1.0 - 0.5**order)  # type: ignore[arg-type]
        assert self.rtol is not None
        assert self.atol is not None
        least = FINEST_TOLERANCE if dtype == torch.float32 else 0.0
        rtol, atol = (max(FINER * tolerance, least) for tolerance in (self.rtol, self.atol))
        if max(rtol / self.rtol, atol / self.atol) > 0.2:
            return None
        return replace(self, rtol=rtol, atol=atol, max_nfe=None, **changed), 1.0  # type: ignore[arg-type]

    def implied(self) -> dict[str, object]:
        """Tolerances and limit of an adaptive solver, the grid of a fixed-step one; the plain probes; the rule."""
        own: dict[str, object] = (
            {"rtol": 1e-5, "atol": 1e-5, "max_nfe": 10_000}
            if self.adaptive
            else {"grid": SOLVERS[self.solver].grid}
        )
        if self.stochastic:
            own |= {"basis": "pixel", "control": "none"} | ({"probes": 3} if self.deflated else {})
        if self.divergence == "quadrature":
            own |= {"probes": 2, "allocation": "neyman"} if self.stochastic else {}
            own |= {"tol": 0.05 if self.stochastic else 3e-3} if self.nodes is None else {}
        return {**super().implied(), **own}

    def _check(self) -> None:
        super()._check()
        self._at_least_one("steps", "max_nfe")
        self._check_solver()
        one_path = self.stochastic and not self.adaptive and self.divergence == "augmented"
        if self.redraw and (self.richardson or not one_path):
            raise ValueError(
                f"{self.name}: redraw needs trace=hutchinson, divergence=augmented and a fixed-step solver without "
                "richardson: an error controller chases the noise, and a quadrature's probes are fresh already"
            )
        if not self.stochastic:
            self._no_effect(f"with trace={self.trace}", "basis", "control", "allocation")
        if self.noise == "gaussian" and self.basis not in (None, "pixel"):
            raise ValueError(f"{self.name}: basis has no effect with noise=gaussian, whose law has no axes")
        if self.deflated:
            self._check_deflated()
        if SOLVERS[self.solver].equal_steps and "auto" in (self.basis, self.control):
            raise ValueError(
                f"{self.name}: the multistep solver {self.solver} needs a named basis and control: the nodes of a "
                "pilot would make its steps unequal"
            )
        if self.divergence == "augmented":
            self._no_effect("with divergence=augmented", "nodes", "tol", "allocation")
            return
        if self.nodes is not None:
            if self.nodes not in clenshaw_curtis.LEVELS:
                valid = ", ".join(map(str, clenshaw_curtis.LEVELS))
                raise ValueError(f"{self.name}: nodes must be one of {valid}, got {self.nodes}")
            self._no_effect("with a given number of nodes", "tol")
        elif not self.adaptive:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs nodes")
        if SOLVERS[self.solver].equal_steps:
            raise ValueError(f"{self.name}: the multistep solver {self.solver} needs divergence=augmented")

    def _check_deflated(self) -> None:
        controlled = self.control not in (None, "none")
        if self.divergence != "augmented" or self.redraw or controlled or self.basis == "auto":
            raise ValueError(
                f"{self.name}: noise=hutch++ needs divergence=augmented, control=none, a named basis and no redraw"
            )
        if self.probes is not None and self.probes % 3:
            raise ValueError(
                f"{self.name}: probes must be a multiple of 3 with noise=hutch++, got {self.probes}: a third finds the "
                "head, a third goes along it, a third is for the rest"
            )

    def _check_solver(self) -> None:
        for option in ("rtol", "atol", "tol"):
            value = getattr(self, option)
            if value is not None and value <= 0.0:
                raise ValueError(f"{self.name}: {option} must be positive, got {value}")
        if self.richardson and (self.solver not in ONE_STEP or self.divergence != "augmented"):
            one_step = ", ".join(ONE_STEP)
            raise ValueError(f"{self.name}: richardson needs divergence=augmented and one of {one_step}")
        if self.adaptive:
            self._no_effect(f"with the adaptive solver {self.solver}", "steps", "grid")
            return
        self._no_effect(f"with the fixed-step solver {self.solver}", "rtol", "atol", "max_nfe")
        if self.steps is None:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs steps")
        if SOLVERS[self.solver].equal_steps and self.grid not in (None, "uniform"):
            raise ValueError(f"{self.name}: the multistep solver {self.solver} needs grid=uniform")

    def adapted(self, model: Any) -> Any:
        """The guided field, where a guidance scale is given."""
        return model if self.guidance is None else model.guided(self.guidance)

    def supports(self, model: object) -> str | None:
        """Needs a velocity; for trace=closed a divergence; for a basis or control the events or moments they fit; for
        a guidance a field that can be guided."""
        if self.guidance is not None:
            if why := lacks(model, "guidance"):
                return f"guidance={self.guidance:g} {why}"
            model = self.adapted(model)
        if why := lacks(model, "velocity"):
            return why
        if self.trace == "closed" and (why := lacks(model, "divergence")):
            return f"trace=closed {why}"
        return laws.refusal(self.noise, self.basis, self.control, self.probes, model)

    def _check_condition(self, run: Run) -> None:
        """Raise ValueError where a pilot would have to draw from a conditional model, and guidance has no condition."""
        if run.cond is None and self.guidance is not None:
            raise ValueError(
                f"{self.name}: guidance={self.guidance:g} guides to cond, the label of each row, and there is none"
            )
        if run.cond is not None and self.needs_pilot:
            raise ValueError(
                f"{self.name}: the pilot draws from the model, which here needs cond; name basis, control "
                "and nodes, and take allocation=uniform"
            )
