r"""Likelihood by the probability-flow ODE in moment-whitened coordinates (docs/math.md section 5).

With the data's mean m and covariance V diag(lam) V^T, ``w_i(t) = (1 - t)^2 + t^2 lam_i`` and

    y = V diag(w)^{-1/2} V^T (x - t m),
    dy/dt = V diag(w)^{-1/2} V^T (v - m) - V diag(w'/2w) V^T y,    div_y = div v - sum_i w_i'/(2 w_i),

the Gaussian with these moments stands still, so the solver integrates only what is not Gaussian. The rest is
closed form: ``log p_t(x) = log q_t(y) - 1/2 sum_i log w_i(t)``, and y = x at t = 0. y keeps the orientation
of x: a pixel of y belongs to the pixel of x. Any positive lam gives a valid change of variables.

Vector-Jacobian products are those of the field in the coordinates of the data: the residual's own Jacobian,
``W^{-1/2} J_v W^{1/2} - V diag(w'/2w) V^T`` with W = V diag(w) V^T, is similar to ``J_v - V diag(w'/2w) V^T`` and so
of the same trace, but of a larger norm, and would make noisier probes.

Cost: that of `ode`, and up to seven matrix products with V an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.divergence.ode_options import ODEOptions
from flowlik_estimators.ode import ODE
from flowlik_estimators.registry import register
from flowlik_models.interfaces import CAPABILITIES, Moments, velocity_and_divergence
from flowlik_models.moments import moments as moment_files
from flowlik_models.numerics.device_arrays import device_array, variances
from flowlik_models.numerics.reparametrised_time import ReparametrisedTime

Derivative = Literal["own", "data", "residual"]
"""Which Jacobian the vector-Jacobian products of the residual field are of, all of one trace: its own; ``J_v - c I``,
c the mean of w'/2w; or ``J_v - V diag(w'/2w) V^T``."""


@register("whitened-ode")
@dataclass(frozen=True, kw_only=True)
class WhitenedODE(ODEOptions):
    """The ODE estimator on the residual field; the options of `ode`, and two of its own.

    ``clock``: what the solver steps in, t itself (time) or, scaled to the same interval, ``log((t + 1/2)/(1 - t +
    b))`` with b the smallest standard deviation of the data (stretched): few steps then resolve the last stretch to
    the data, ``1 - t`` about b, where a field is stiff. ``grid`` divides what the solver steps in. ``floor``: the
    smallest variance used; small ones magnify a network's own error near the data by ``1/sqrt(lam)``. Tolerances of an
    adaptive solver are those of y.

    With probes, ``control`` (gaussian) says which Jacobian they see: gaussian, the model's minus the Gaussian's; none,
    the model's, the Gaussian's trace being taken off; auto (on clock=time), whichever has the smaller variance in a
    pilot. Where a graph stays (differentiable) they see the residual's own Jacobian, as unbiased and noisier.
    """

    clock: Literal["time", "stretched"] = "time"
    floor: float | None = None

    def implied(self) -> dict[str, object]:
        """As in `ode`, with the Gaussian control where there are probes."""
        return {
            **super().implied(),
            **({"control": "gaussian"} if self.stochastic and not self.deflated else {}),
        }

    def _check(self) -> None:
        super()._check()
        if self.floor is not None and self.floor <= 0.0:
            raise ValueError(f"{self.name}: floor must be positive, got {self.floor}")
        if self.control == "auto" and self.clock != "time":
            raise ValueError(f"{self.name}: control=auto needs clock=time")

    def supports(self, model: object) -> str | None:
        """Needs what `ode` needs, and the moments of the training data."""
        moments = getattr(model, "moments", None)
        if not isinstance(moments, Moments):
            return super().supports(model) or f"needs {CAPABILITIES['moments'].noun}"
        try:
            moment_files.check(moments, getattr(model, "event_shape", None))
        except ValueError as error:
            return str(error)
        return super().supports(model)

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        self._check_condition(run)
        field, t = self._field(model, run), _data_end(run)
        estimate = self._ode()._log_prob(field, field.whiten(x.double(), t), field.whitened(run))
        return replace(estimate, log_prob=estimate.log_prob - field.log_volume(t))

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if log_prob:
            self._check_condition(run)
        field, t = self._field(model, run), _data_end(run)
        inside = field.whitened(run)
        if run.law is not None:
            x0 = field.whiten(x0, run.at(run.noise_end))
        samples = self._ode()._sample(field, x0, inside, log_prob=log_prob)
        x = field.unwhiten(samples.x.double(), t).to(run.dtype)
        if samples.log_prob is None:
            return replace(samples, x=x)
        return replace(samples, x=x, log_prob=samples.log_prob - field.log_volume(t))

    def _field(self, model: Any, run: Run) -> ResidualField:
        least = self.floor or 0.0
        values = variances(model.moments, run.device).clamp(min=least)
        time = None
        if self.clock == "stretched":
            smallest = max(float(variances(model.moments, torch.device("cpu")).min()), least)
            time = SolverTime(smallest**0.5, run.data_end, run.noise_end)
        derivative: Derivative = "residual" if self.control == "gaussian" else "data"
        if run.differentiable:
            derivative = "own"
        return ResidualField(model, run, values, time, derivative)

    def _ode(self) -> ODE:
        """The estimator that solves the residual field, which has taken off the Gaussian itself."""
        options = {option.name: getattr(self, option.name) for option in fields(ODE)}
        if self.control == "gaussian":
            options["control"] = "none"
        return ODE(**options)


def _data_end(run: Run) -> Tensor:
    """The time of the data for every row, (batch,) float64."""
    return torch.full((run.batch,), run.data_end, dtype=torch.float64, device=run.device)


class SolverTime:
    """u on [start, end] in which the time ``log((t + 1/2)/(1 - t + width))`` is linear, with the same ends as t.

    1/2: towards the noise nothing is stiff, and it resolves that end as a uniform grid does. Measured, docs/math.md
    section 5.
    """

    NEAR_NOISE = 0.5

    def __init__(self, width: float, end: float, start: float = 0.0) -> None:
        self.start, self.end, self._time = start, end, ReparametrisedTime(width, self.NEAR_NOISE)
        self.first = self._time.at(start)
        self.rate = (self._time.at(end) - self.first) / (end - start)

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t and dt/du at u (batch,), in u's dtype."""
        t, slope = self._time.time_and_slope(self.first + self.rate * (u.double() - self.start), self.rate)
        return t.clamp(self.start, self.end).to(u.dtype), slope.to(u.dtype)


class ResidualField:
    """A velocity field in whitened coordinates and in the solver's time; every evaluation is one of the model's."""

    def __init__(
        self,
        model: Any,
        run: Run,
        variances: Tensor,
        time: SolverTime | None,
        derivative: Derivative,
    ) -> None:
        self.event_shape = run.event_shape
        self.moments: Moments = model.moments
        self._model, self._solver_time, self._derivative = model, time, derivative
        self._spaces = {dtype: _Space(self.moments, variances, dtype) for dtype in {run.dtype, torch.float64}}

    def velocity(self, y: Tensor, u: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """dy/du, (batch, *event)."""
        t, speed = self._time(u)
        x = self.unwhiten(y, t)
        traced = y.requires_grad and self._derivative != "own"
        if traced:
            x = _with_derivative_of(x, y)
        v = _shaped(self._model.velocity(x, t, cond=cond), y.shape, "velocity").to(y.dtype)
        residual = self._residual(v, y, t)
        if traced:
            residual = _with_derivative_of(residual, v - self._gaussian(y, t))
        return residual if speed is None else _scaled(residual, speed)

    def velocity_and_divergence(
        self, y: Tensor, u: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """dy/du and its divergence (batch,), where the model has a closed form."""
        t, speed = self._time(u)
        x = self.unwhiten(y, t)
        v, divergence = velocity_and_divergence(self._model, x, t, cond=cond)
        v = _shaped(v, y.shape, "velocity").to(y.dtype)
        divergence = _shaped(divergence, y.shape[:1], "divergence").double()
        space = self._spaces[torch.float64]
        residual = self._residual(v, y, t)
        divergence = divergence - space.total(space.rates(t.double()))
        return (residual, divergence) if speed is None else (_scaled(residual, speed), divergence * speed)

    def whiten(self, x: Tensor, t: Tensor) -> Tensor:
        """y of x at the times t (batch,), in x's dtype."""
        space = self._spaces[x.dtype]
        centred = x.flatten(1) - t[:, None] * space.mean
        return space.combine((centred, space.variances(t).rsqrt())).view_as(x)

    def unwhiten(self, y: Tensor, t: Tensor) -> Tensor:
        """x of y at the times t (batch,), in y's dtype."""
        space = self._spaces[y.dtype]
        scaled = space.combine((y.flatten(1), space.variances(t).sqrt()))
        return (t[:, None] * space.mean + scaled).view_as(y)

    def whitened(self, run: Run) -> Run:
        """The same call in these coordinates: a source of the model's own is whitened too; at t = 0 nothing changes."""
        if run.law is None:
            return run
        return replace(run, law=_WhitenedSource(self, run))

    def log_volume(self, t: Tensor) -> Tensor:
        """log |det dx/dy| = 1/2 sum_i log w_i at the times t, (batch,) float64."""
        space = self._spaces[torch.float64]
        return 0.5 * space.total(space.variances(t).log())

    def _time(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        return (u, None) if self._solver_time is None else self._solver_time(u)

    def _gaussian(self, y: Tensor, t: Tensor) -> Tensor:
        """What is taken off v for its Jacobian, of the trace of V diag(w'/2w) V^T."""
        space = self._spaces[y.dtype]
        rates = space.rates(t)
        if self._derivative == "residual":
            return space.combine((y.flatten(1), rates)).view_as(y)
        return _scaled(y, space.total(rates) / len(space.mean))

    def _residual(self, v: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """dy/dt."""
        space = self._spaces[y.dtype]
        moving = (v.flatten(1) - space.mean, space.variances(t).rsqrt())
        standing = (y.flatten(1), -space.rates(t))
        return space.combine(moving, standing).view_as(y)


class _WhitenedSource:
    """The law of y at the noise end of a call."""

    def __init__(self, field: ResidualField, run: Run) -> None:
        self._field, self._run = field, run
        if hasattr(run.law, "from_normal"):
            self.from_normal = self._from_normal

    def log_prob(self, y: Tensor) -> Tensor:
        """log-density of x plus log |det dx/dy|, (batch,) float64."""
        t = torch.full(y.shape[:1], self._run.noise_end, dtype=y.dtype, device=y.device)
        return self._run.source_log_prob(self._field.unwhiten(y, t)) + self._field.log_volume(t.double())

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws of y."""
        assert self._run.law is not None
        x = self._run.law.sample(n, generator)
        return self._field.whiten(x, x.new_full((n,), self._run.noise_end))

    def _from_normal(self, z: Tensor) -> Tensor:
        law: Any = self._run.law
        x: Tensor = law.from_normal(z)
        return self._field.whiten(x, x.new_full(x.shape[:1], self._run.noise_end))


class _Space:
    """Moments as tensors; functions of the variances are (batch, k), with one column more for the rest."""

    def __init__(self, moments: Moments, variances: Tensor, dtype: torch.dtype) -> None:
        device = variances.device
        self.values = variances.to(dtype)
        self.mean = device_array(moments.mean, dtype, device)
        self.vectors = device_array(moments.eigenvectors, dtype, device)
        self.rank = self.vectors.shape[1]
        self.rest = moments.rest is not None

    def variances(self, t: Tensor) -> Tensor:
        """w = (1 - t)^2 + t^2 lam."""
        return (1 - t[:, None]).square() + t[:, None].square() * self.values

    def rates(self, t: Tensor) -> Tensor:
        """w'/(2 w)."""
        return (t[:, None] * self.values - (1 - t[:, None])) / self.variances(t)

    def total(self, f: Tensor) -> Tensor:
        """The trace of the matrix with eigenvalues f, (batch,)."""
        total = f[:, : self.rank].sum(1)
        return total + (len(self.mean) - self.rank) * f[:, -1] if self.rest else total

    def combine(self, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """The sum of V diag(f) V^T z over pairs z (batch, d) and f, the rest directions included."""
        along = [f[:, : self.rank] - f[:, -1:] if self.rest else f for _, f in terms]
        parts = [(z @ self.vectors) * g for (z, _), g in zip(terms, along, strict=True)]
        combined = torch.stack(parts).sum(0) @ self.vectors.T
        return combined + sum(z * f[:, -1:] for z, f in terms) if self.rest else combined


def _with_derivative_of(value: Tensor, other: Tensor) -> Tensor:
    """``value``, which differentiates as ``other``."""
    return value.detach() + (other - other.detach())


def _scaled(value: Tensor, factor: Tensor) -> Tensor:
    return value * factor.view(-1, *[1] * (value.ndim - 1))


def _shaped(value: Tensor, shape: torch.Size, what: str) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"the model's {what} has shape {tuple(value.shape)}, expected {tuple(shape)}")
    return value
