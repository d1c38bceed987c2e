"""diffrax (JAX) on the closed forms whose fields are written here in jax.numpy: docs/peers.md.

A solve is compiled by XLA for each shape of points, dtype, solver, trace and limit; the first call pays for that.
The model is not called: its parameters are handed over as arrays. Evaluations follow from the steps that diffrax
reports: the first stage once, then each step the stages that it does not take from the step before.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Estimate, Run
from flowlik_estimators.peers.peer import Peer
from flowlik_estimators.registry import register
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.interfaces import lacks

_SOLVERS = {"dopri5": ("Dopri5", 6, 1), "tsit5": ("Tsit5", 6, 1), "heun": ("Heun", 2, 0)}
"""Class in diffrax, evaluations a step, and evaluations before the first step."""

_FIRST_STEP = 0.01
"""The first step that diffrax takes where it is to choose one; named, so that no version spends evaluations on it."""

Field = Callable[[Any, dict[str, Any], Any, Any], Any]
"""Namespace (jax.numpy), parameters, one point (d,), a time () -> its velocity (d,)."""


def gaussian(np: Any, p: dict[str, Any], x: Any, t: Any) -> Any:
    """The field of `Gaussian`."""
    w = (1 - t) ** 2 + t**2 * p["eigenvalues"]
    y = (x - t * p["mean"]) @ p["eigenvectors"]
    return p["mean"] + p["eigenvectors"] @ ((t * p["eigenvalues"] - (1 - t)) / w * y)


def mixture(np: Any, p: dict[str, Any], x: Any, t: Any) -> Any:
    """The field of `GaussianMixture`, by two products of a (d, K d) matrix as there."""
    k, d = p["means"].shape
    centre = np.einsum("kde,kd->ke", p["rotations"], p["means"])
    y = (x @ p["rotations"].transpose(1, 0, 2).reshape(d, k * d)).reshape(k, d) - t * centre
    w = (1 - t) ** 2 + t**2 * p["stds"] ** 2
    log_joint = np.log(p["weights"]) - 0.5 * (y**2 / w + np.log(w)).sum(1)
    shares = np.exp(log_joint - log_joint.max())
    r = shares / shares.sum()
    along = r[:, None] * (t * p["stds"] ** 2 - (1 - t)) / w * y
    return r @ p["means"] + along.reshape(k * d) @ p["rotations"].transpose(0, 2, 1).reshape(k * d, d)


FIELDS: dict[type, tuple[Field, tuple[str, ...]]] = {
    Gaussian: (gaussian, ("mean", "eigenvalues", "eigenvectors")),
    GaussianMixture: (mixture, ("weights", "means", "stds", "rotations")),
}
"""Closed form -> its field and the buffers that are its parameters."""


@register("peer-diffrax")
@dataclass(frozen=True, kw_only=True)
class Diffrax(Peer):
    """`diffrax.diffeqsolve` (arXiv 2202.02435) in JAX, compiled, on Gaussians and mixtures in closed form.

    ``solver`` with diffrax's PIDController at ``rtol``, ``atol`` (1e-5 each) and its default coefficients, on the root
    mean square of all numbers of the batch, the log-determinants among them. The right-hand side is that of diffrax's
    own example of a continuous flow: a vector-Jacobian product for each of the d axes (exact) or of one Rademacher
    probe keyed by item (hutchinson). No step is begun that would pass ``max_nfe``.
    """

    module = "diffrax"
    package = "diffrax"
    extra = "jax"

    solver: Literal["dopri5", "tsit5", "heun"] = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    max_nfe: int = 10_000

    def supports(self, model: object) -> str | None:
        """Needs a closed form whose field is written here, and the library."""
        if (why := lacks(model, "velocity")) is not None:
            return why
        if type(model) not in FIELDS:
            return f"needs a closed form whose field is written in JAX ({' or '.join(k.__name__ for k in FIELDS)})"
        return self.unavailable()

    def _solved(self, model: Any, x: Tensor, run: Run) -> Estimate:
        field, names = next(held for held in FIELDS.values() if all(hasattr(model, n) for n in held[1]))
        _, stages, before = _SOLVERS[self.solver]
        parameters = {name: _array(getattr(model, name), run) for name in names}
        hutchinson = self.trace == "hutchinson"
        probe = _array(run.probes(1, "rademacher").flatten(1), run) if hutchinson else None
        most = max(1, (self.max_nfe - before) // stages)
        solve = _compiled(field, self.solver, most)
        ends, tolerances = (run.data_end, run.noise_end), (self.rtol, self.atol)
        x0, log_det, steps, accepted, done = solve(_array(x, run), parameters, probe, ends, tolerances)
        forwards = run.batch * (before + stages * steps)
        run.counts.forwards += forwards
        run.counts.vjps += forwards * (1 if hutchinson else x.shape[1])
        run.counts.accepted_steps += run.batch * accepted
        run.counts.rejected_steps += run.batch * (steps - accepted)
        if not done:
            limit = f"stopped within max_nfe = {self.max_nfe} evaluations" if steps >= most else "gave up"
            raise Diverged(f"{self.solver} {limit}")
        x0, log_det = (torch.as_tensor(part, device=run.device) for part in (x0, log_det))
        return Estimate(log_prob=run.source_log_prob(x0) + log_det.double())


def _array(value: Tensor, run: Run) -> Any:
    return value.detach().to("cpu", run.dtype).numpy()


@lru_cache(maxsize=64)
def _compiled(field: Field, solver: str, most: int) -> Callable[..., tuple[Any, Any, int, int, bool]]:
    """Points, parameters, probe or None, ends and tolerances, all numpy -> x_0, log-determinant, steps, ..., done."""
    one_thread = torch.get_num_threads() == 1
    if one_thread:  # read by XLA when it starts, once in a process
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    jax, diffrax = import_module("jax"), import_module("diffrax")
    np = jax.numpy

    def of_one(t: Any, x: Any, probe: Any, parameters: Any) -> Any:
        v, product = jax.vjp(lambda x: field(np, parameters, x, t), x)
        if probe is None:
            (rows,) = jax.vmap(product)(np.eye(len(x), dtype=x.dtype))
            return v, np.trace(rows)
        return v, product(probe)[0] @ probe

    def right_hand_side(t: Any, state: Any, given: Any) -> Any:
        probe, parameters = given
        return jax.vmap(of_one, (None, 0, None if probe is None else 0, None))(t, state[0], probe, parameters)

    def solve(x: Any, parameters: Any, probe: Any, ends: Any, tolerances: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(right_hand_side),
            getattr(diffrax, _SOLVERS[solver][0])(),
            *ends,
            np.where(ends[0] < ends[1], _FIRST_STEP, -_FIRST_STEP),
            (x, np.zeros(len(x), x.dtype)),
            args=(probe, parameters),
            stepsize_controller=diffrax.PIDController(rtol=tolerances[0], atol=tolerances[1]),
            max_steps=most,
            throw=False,
        )
        (x0, log_det), stats = solution.ys, solution.stats
        done = solution.result == diffrax.RESULTS.successful
        return x0[0], log_det[0], stats["num_steps"], stats["num_accepted_steps"], done

    solve_compiled = jax.jit(solve)

    def call(x: Any, parameters: Any, probe: Any, ends: Any, tolerances: Any) -> Any:
        # 64 bits are a setting of JAX, off by default
        with jax.enable_x64(x.dtype == "float64"), jax.default_device(jax.devices("cpu")[0]):
            cast = [tuple(x.dtype.type(value) for value in pair) for pair in (ends, tolerances)]
            x0, log_det, steps, accepted, done = solve_compiled(x, parameters, probe, *cast)
            array = import_module("numpy").array
            return array(x0), array(log_det), int(steps), int(accepted), bool(done)

    return call
