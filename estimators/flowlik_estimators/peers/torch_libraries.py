"""The likelihood routes of three public libraries in torch, each run by its own code on the suite's models.

Their evaluations are counted outside, as for every estimator.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Estimate, Run
from flowlik_estimators.integration.torchdiffeq_solve import (
    GAVE_UP,
    SOLVERS,
    Adaptive,
    OneStep,
    torchdiffeq_name,
)
from flowlik_estimators.peers.peer import Peer
from flowlik_estimators.registry import register

_TORCHODE = {"dopri5": "Dopri5", "tsit5": "Tsit5", "heun": "Heun"}
_LOOK_EVERY = 50
_LOCK = threading.RLock()

Field = Callable[[Tensor, Tensor], Tensor]
"""Rows (batch, d) and a time, () or (batch,) -> velocities (batch, d)."""


@dataclass(frozen=True, kw_only=True)
class TorchPeer(Peer):
    """A library that calls the model itself."""

    def _solved(self, model: Any, x: Tensor, run: Run) -> Estimate:
        with _globals(run):
            return self._answer(_field(model, run, getattr(self, "max_nfe", None)), x, run)

    def _answer(self, field: Field, x: Tensor, run: Run) -> Estimate:
        raise NotImplementedError


@register("peer-flow-matching")
@dataclass(frozen=True, kw_only=True)
class FlowMatching(TorchPeer):
    """`flow_matching.solver.ODESolver.compute_likelihood` (Meta, arXiv 2412.06264).

    ``solver`` adaptive with ``rtol``, ``atol`` (1e-5 each) and ``max_nfe`` (10,000), or fixed-step with
    ``steps`` on a uniform grid; torchdiffeq underneath, with the overall error norm of `ode`. ``trace``:
    hutchinson is one Rademacher probe, drawn by the library. Cost of an evaluation as for `ode`.
    """

    module = "flow_matching.solver"
    package = "flow-matching"

    solver: Literal[Adaptive, OneStep] = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    max_nfe: int | None = None

    def implied(self) -> dict[str, object]:
        """Tolerances and limit of an adaptive solver."""
        return {"rtol": 1e-5, "atol": 1e-5, "max_nfe": 10_000} if SOLVERS[self.solver].adaptive else {}

    def _check(self) -> None:
        super()._check()
        if SOLVERS[self.solver].adaptive:
            self._no_effect(f"with the adaptive solver {self.solver}", "steps")
            return
        self._no_effect(f"with the fixed-step solver {self.solver}", "rtol", "atol", "max_nfe")
        if self.steps is None:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs steps")

    def _answer(self, field: Field, x: Tensor, run: Run) -> Estimate:
        end, start = run.data_end, run.noise_end
        solver = import_module(self.module).ODESolver(_between_0_and_1(field, start, end))
        tolerances = {} if self.rtol is None else {"rtol": self.rtol, "atol": self.atol}
        try:
            _, log_prob = solver.compute_likelihood(
                x_1=x,
                log_p0=run.source_log_prob,
                step_size=None,
                method=torchdiffeq_name(self.solver),
                time_grid=torch.linspace(1.0, 0.0, (self.steps or 1) + 1, dtype=x.dtype, device=x.device),
                exact_divergence=self.trace == "exact",
                **tolerances,
            )
        except AssertionError as error:
            if not str(error).startswith(GAVE_UP):
                raise
            raise Diverged(f"{self.solver} gave up: {str(error).partition(':')[0]}") from error
        return Estimate(log_prob=log_prob)


@register("peer-zuko")
@dataclass(frozen=True, kw_only=True)
class Zuko(TorchPeer):
    """`zuko.transforms.FreeFormJacobianTransform`, the transform of zuko's continuous flows.

    Its own Dormand-Prince pair, without reuse of the last stage, on the largest error of any coordinate of any
    row; the log-determinant enters at a hundredth, so its tolerances are a hundred times ``rtol`` and ``atol``
    (1e-5 each; zuko's own are 1e-5 and 1e-6). ``trace``: exact is one batch of d gradients, hutchinson one
    Gaussian probe, drawn by the library. It retries a step for ever; ``max_nfe`` ends that.
    """

    module = "zuko.transforms"
    package = "zuko"

    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000

    def _answer(self, field: Field, x: Tensor, run: Run) -> Estimate:
        transform = import_module(self.module).FreeFormJacobianTransform(
            f=lambda t, x: field(x, t),
            t0=run.data_end,
            t1=run.noise_end,
            atol=self.atol,
            rtol=self.rtol,
            exact=self.trace == "exact",
        )
        x0, log_det = transform.call_and_ladj(x)
        return Estimate(log_prob=run.source_log_prob(x0) + log_det.double())


@register("peer-torchode")
@dataclass(frozen=True, kw_only=True)
class Torchode(TorchPeer):
    """torchode (arXiv 2210.12375), which gives each row its own steps; `extra` holds their number.

    The library solves ODEs and has no likelihood, so the augmented right-hand side is the one its users write:
    torch.autograd, d vector-Jacobian products in a loop (exact) or one Rademacher probe keyed by item (hutchinson).
    ``solver`` with torchode's integral controller at ``rtol``, ``atol`` (1e-5 each), on the root mean square of a
    row's d + 1 numbers. A step evaluates the whole batch, finished rows too.
    """

    module = "torchode"
    package = "torchode"

    solver: Literal["dopri5", "tsit5", "heun"] = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000

    def _answer(self, field: Field, x: Tensor, run: Run) -> Estimate:
        torchode = import_module(self.module)
        term = torchode.ODETerm(_augmented(field, self._divergence(run)))
        controller = torchode.IntegralController(atol=self.atol, rtol=self.rtol, term=term)
        method = getattr(torchode, _TORCHODE[self.solver])(term=term)
        solver = torchode.AutoDiffAdjoint(method, controller).to(run.device)
        state = torch.cat([x, x.new_zeros(run.batch, 1)], 1)
        problem = torchode.InitialValueProblem(
            state, t_start=run.at(run.data_end), t_end=run.at(run.noise_end)
        )
        solution = solver.solve(problem)
        steps, accepted = solution.stats["n_steps"], solution.stats["n_accepted"]
        run.counts.accepted_steps += int(accepted.sum())
        run.counts.rejected_steps += int((steps - accepted).sum())
        if bool(solution.status.any()):  # it stops all rows where one fails
            worst = torchode.Status(int(solution.status.max())).name.lower().replace("_", " ")
            raise Diverged(f"{self.solver} gave up: {worst}")
        x0, log_det = solution.ys[:, -1, :-1], solution.ys[:, -1, -1]
        return Estimate(log_prob=run.source_log_prob(x0) + log_det.double(), extra={"solver_steps": steps})

    def _divergence(self, run: Run) -> Callable[[Tensor, Tensor], Tensor]:
        if self.trace == "exact":
            return _exact
        probe = run.probes(1, "rademacher").flatten(1)
        return lambda v, x: (torch.autograd.grad(v, x, probe)[0] * probe).sum(1)


def _augmented(field: Field, divergence: Callable[[Tensor, Tensor], Tensor]) -> Field:
    def right_hand_side(t: Tensor, state: Tensor) -> Tensor:
        with torch.enable_grad():
            x = state[:, :-1].detach().requires_grad_()
            v = field(x, t)
            div = divergence(v, x)
        return torch.cat([v.detach(), div[:, None]], 1)

    return right_hand_side


def _exact(v: Tensor, x: Tensor) -> Tensor:
    d = x.shape[1]
    return sum(
        (torch.autograd.grad(v[:, i].sum(), x, retain_graph=i < d - 1)[0][:, i] for i in range(d)),
        start=x.new_zeros(len(x)),
    )


def _field(model: Any, run: Run, max_nfe: int | None) -> Field:
    """The model in rows; ends a solve at ``max_nfe``, and soon after the velocity is no longer finite."""
    calls = 0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if max_nfe is not None and calls > max_nfe:
            raise Diverged(f"stopped at t = {_latest(t):.6g} after max_nfe = {max_nfe} evaluations")
        value = run.event(
            model.velocity(x.view(-1, *run.event_shape), run.at(t), cond=run.cond), "velocity"
        ).flatten(1)
        # seldom, since a look at the values costs time that the library would not spend
        if calls % _LOOK_EVERY == 0 and not bool(torch.isfinite(value).all()):
            bad = ~torch.isfinite(value).all(1)
            raise Diverged(f"the velocity is not finite near t = {_latest(t):.6g}", rows=bad)
        return value

    return velocity


def _between_0_and_1(field: Field, start: float, end: float) -> Field:
    """The field in a time that runs from 0 to 1 where ours runs from ``start`` to ``end``: flow_matching insists."""
    return lambda x, t: (end - start) * field(x, start + (end - start) * t)


def _latest(t: Tensor) -> float:
    return float(t.detach().max())


@contextmanager
def _globals(run: Run) -> Iterator[None]:
    """torch's global generator on a seed of this call, and x's dtype as default; both as before afterwards.

    The libraries draw their probe for the whole batch from that generator, and flow_matching makes it in the
    default dtype. The seed takes in the items, or every batch of a stream would draw alike. Both belong to the whole
    process: one call at a time has them.
    """
    items = run.items.detach().cpu().numpy().tobytes()
    digest = hashlib.blake2b(items, digest_size=7, salt=run.key.to_bytes(8, "little")).digest()
    on_gpu = run.device.type == "cuda"
    generator = torch.cuda.default_generators[run.device.index] if on_gpu else torch.default_generator
    with _LOCK:
        state, dtype = generator.get_state(), torch.get_default_dtype()
        generator.manual_seed(int.from_bytes(digest, "little"))
        torch.set_default_dtype(run.dtype)
        try:
            yield
        finally:
            generator.set_state(state)
            torch.set_default_dtype(dtype)
