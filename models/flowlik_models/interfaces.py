"""What the suite asks of a model: small protocols that a plain ``nn.Module`` with these methods satisfies.

Time runs from noise (t = 0, the source N(0, I)) to data (t = 1). ``x`` is (batch, *event); ``t`` and ``s`` are (batch,)
and of x's dtype; ``cond`` is anything sliced along with x (class labels, a paired x_0). See docs/math.md section 1.

What a model can do is asked by `can`, and what it lacks said by `lacks`, both from the table `CAPABILITIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from flowlik_models.numerics.standard_normal import StandardNormal


@runtime_checkable
class VelocityField(Protocol):
    """A marginal velocity v(x, t); its ODE carries N(0, I) at t = 0 to the model's density at t = 1."""

    event_shape: tuple[int, ...]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity, (batch, *event)."""
        ...


@runtime_checkable
class HasDivergence(Protocol):
    """A field whose divergence is known without derivative products (closed forms).

    Where one evaluation gives both, a method ``velocity_and_divergence(x, t, *, cond=None)`` answers with the pair.
    """

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """div v(x, t), (batch,)."""
        ...


@runtime_checkable
class HasLogProb(Protocol):
    """A density known exactly at every time."""

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,)."""
        ...


@runtime_checkable
class FlowMap(Protocol):
    """A map between any two times, Phi(x, t, s) = x + (s - t) * average_velocity(x, t, s)."""

    event_shape: tuple[int, ...]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The velocity averaged along the trajectory through (x, t) up to time s, (batch, *event)."""
        ...


@runtime_checkable
class JointFlowMap(Protocol):
    """A flow map that also knows the average divergence, from one network evaluation."""

    event_shape: tuple[int, ...]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average velocity (batch, *event) and average divergence (batch,); at s = t the field and its divergence."""
        ...


@runtime_checkable
class Policy(Protocol):
    """A field that needs no network: what a policy flow leaves behind for one segment and one batch."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity, (batch, *event)."""
        ...

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """Its divergence at fixed policy, (batch,)."""
        ...


@runtime_checkable
class PolicyFlow(Protocol):
    """A network that answers with a policy for a whole segment.

    Three attributes may say more: ``segments: tuple[int, ...]``, the numbers of equal segments that it was trained for
    (absent: any); ``frozen_density = False`` where the divergence of its policies says nothing about the density; and,
    of the policy, ``usable(s) -> (batch,) bool``, whether it can be followed to time s.
    """

    event_shape: tuple[int, ...]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Policy:
        """The policy at (x, t), valid from t to s in either order."""
        ...


@runtime_checkable
class Generator(Protocol):
    """A square map of noise to data in one step, x = G(z), z ~ N(0, I).

    ``conditional = True`` says that it needs ``cond``, the x_0 that the data point belongs to.
    """

    event_shape: tuple[int, ...]

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """G(z), (batch, *event)."""
        ...


@runtime_checkable
class HasLogDensity(Protocol):
    """A network that answers with the log-density itself, at t = 1 - ``eps`` (0 where it has none)."""

    event_shape: tuple[int, ...]

    def log_density(self, x: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (batch,)."""
        ...


@runtime_checkable
class ExactFlow(Protocol):
    """An invertible network whose log-determinant is known: log p in one pass.

    A method ``from_noise(z, *, cond=None) -> x`` may stand beside, the other way round, with ``passes_to_sample: int``,
    how many passes through the network that takes (absent: one).
    """

    event_shape: tuple[int, ...]

    def inverse(self, x: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise z (batch, *event) of points x, and log |det dz/dx|, (batch,)."""
        ...


@runtime_checkable
class HasFakeFlow(Protocol):
    """A generator beside the field that was fitted to it; ``fake_is_flow = False`` where real data took part."""

    fake: VelocityField


@dataclass(frozen=True)
class Moments:
    """Mean and covariance ``V diag(eigenvalues) V^T + rest (I - V V^T)`` of a training split, as numpy float64.

    ``mean`` (d,), ``eigenvalues`` (k,), ``eigenvectors`` (d, k) with the eigenvectors V as columns; ``rest`` is the
    variance of every direction outside the columns, None where they span the space (k = d). ``data_hash`` names the
    split they were taken from. `flowlik_models.moments` makes, checks, saves and attaches them.
    """

    mean: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    data_hash: str
    rest: float | None = None


@runtime_checkable
class HasMoments(Protocol):
    """A model to which the task has attached the moments of its training split."""

    moments: Moments


@runtime_checkable
class Source(Protocol):
    """The law of a model's states at its noisy end, on the suite's clock: of ``t_0 x + (1 - t_0) n``.

    A method ``from_normal(z)``, which turns standard normal draws (n, *event) into draws of the law, may stand beside:
    it is faster, and keyed draws then need no generator a row.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, (batch,)."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws, (n, *event)."""
        ...


@runtime_checkable
class HasSource(Protocol):
    """A field that is known between two times only (docs/math.md section 10).

    ``noisy_end`` and ``clean_end``, 0 <= noisy_end < clean_end <= 1, are the times; ``source`` is the law at the noisy
    end. A model without them starts from N(0, I) at t = 0 and has its data at t = 1. An estimate of the model's density
    is ``log p_{t_1}(t_1 x) + d log t_1`` at the clean end t_1.
    """

    noisy_end: float
    clean_end: float
    source: Source


def attribute(model: Any, name: str) -> Any:
    """``getattr(model, name, None)``, without the time that a module takes to say that it has none."""
    kind = type(model)
    if getattr(kind, "__getattr__", None) is not nn.Module.__getattr__ or hasattr(kind, name):
        return getattr(model, name, None)
    state = model.__dict__
    for held in (state, state["_modules"], state["_buffers"], state["_parameters"]):
        if name in held:
            return held[name]
    return None


def ends_of(model: Any) -> HasSource | None:
    """The model, where its ends or its source are others than N(0, I) at t = 0 and data at t = 1; else None.

    Raises:
        ValueError: a model that says a part of it only, or ends that are no times in order.

    >>> from flowlik_models.synthetic import closed_form
    >>> ends_of(closed_form("gmm-2d")) is None
    True
    """
    noisy, clean = attribute(model, "noisy_end"), attribute(model, "clean_end")
    if noisy is None and clean is None:
        return None
    source = getattr(model, "source", None)
    if noisy is None or clean is None or source is None:
        lacking = [n for n in ("noisy_end", "clean_end", "source") if getattr(model, n, None) is None]
        raise ValueError(
            f"a model with ends of its own needs noisy_end, clean_end and source; missing: {lacking[0]}"
        )
    if not 0.0 <= noisy < clean <= 1.0:
        raise ValueError(f"ends must be times 0 <= noisy_end < clean_end <= 1, got {noisy} and {clean}")
    plain = noisy == 0.0 and clean == 1.0 and isinstance(source, StandardNormal)
    owner: HasSource = model
    return None if plain else owner


def source_of(model: Any) -> Source | None:
    """The law that a model starts from; None where that is N(0, I) at t = 0, wherever its clean end is."""
    ends = ends_of(model)
    if ends is None or (ends.noisy_end == 0.0 and isinstance(ends.source, StandardNormal)):
        return None
    return ends.source


def data_end_of(model: Any) -> float:
    """The time of a model's data: its clean end, or 1 - eps of a model without ends of its own."""
    ends = ends_of(model)
    return 1.0 - float(getattr(model, "eps", 0.0)) if ends is None else float(ends.clean_end)


Ability = Literal[
    "velocity",
    "divergence",
    "flow map",
    "joint flow map",
    "policy flow",
    "generator",
    "fake flow",
    "teacher",
    "scalar log-density",
    "exact inverse",
    "exact sampler",
    "moments",
    "log-density",
    "guidance",
]


@dataclass(frozen=True)
class Capability:
    """How an ability shows and what it is called.

    ``attributes``: any one of them is enough; ``fake.velocity`` is an attribute of an attribute. ``noun`` completes
    "needs ...". ``trial_times``: the times, halfway between noise and data or below, at which one evaluation of the
    network is tried; None for what evaluates no network.
    """

    attributes: tuple[str, ...]
    noun: str
    trial_times: tuple[float, ...] | None = None


CAPABILITIES: dict[Ability, Capability] = {
    "velocity": Capability(("velocity",), "a velocity field (a `velocity` method)", (0.5,)),
    "divergence": Capability(
        ("velocity_and_divergence", "divergence"),
        "a closed-form divergence (`velocity_and_divergence` or `divergence`)",
        (0.5,),
    ),
    "flow map": Capability(("average_velocity",), "a flow map (an `average_velocity` method)", (0.5, 0.5)),
    "joint flow map": Capability(("joint",), "a joint flow map (a `joint` method)", (0.5, 0.5)),
    "policy flow": Capability(("policy",), "a policy flow (a `policy` method)", (0.5, 0.25)),
    "generator": Capability(("generate",), "a one-step generator (a `generate` method)", ()),
    "fake flow": Capability(("fake.velocity",), "a fake model whose ODE starts from noise (`fake.velocity`)"),
    "teacher": Capability(("teacher.velocity",), "a velocity field as the model's `teacher`"),
    "scalar log-density": Capability(
        ("log_density",), "a scalar network of the log-density (a `log_density` method)", ()
    ),
    "exact inverse": Capability(
        ("inverse",), "an exact inverse with its log-determinant (an `inverse` method)", ()
    ),
    "exact sampler": Capability(("from_noise",), "a way from noise to data (a `from_noise` method)", ()),
    "moments": Capability(("moments",), "the moments of its training data (a `moments` attribute)"),
    "log-density": Capability(("log_prob",), "a density that is known exactly (a `log_prob` method)"),
    "guidance": Capability(
        ("guided",),
        "a conditional field that can be guided (a `guided` method, as flowlik.wrap's fields have)",
    ),
}
"""Ability -> how it shows in a model, and what to say where it is missing."""

EVALUATING_METHODS = tuple(
    method
    for capability in CAPABILITIES.values()
    if capability.trial_times is not None
    for method in capability.attributes
)
"""Methods of a model that evaluate its network."""


def can(model: object, *abilities: Ability) -> bool:
    """Whether the model has all of these abilities."""
    return all(any(_has(model, name) for name in CAPABILITIES[each].attributes) for each in abilities)


def lacks(model: object, ability: Ability) -> str | None:
    """None, or what the model needs and has not: "needs a flow map (an `average_velocity` method)"."""
    return None if can(model, ability) else f"needs {CAPABILITIES[ability].noun}"


def trial_call(model: Any, x: Tensor, ability: Ability, *, cond: Tensor | None = None) -> Callable[[], Any]:
    """One evaluation of the network at x (batch, *event) by a method of that ability, to be called when wanted."""
    capability = CAPABILITIES[ability]
    assert capability.trial_times is not None
    method = next(getattr(model, name) for name in capability.attributes if _has(model, name))
    given = {} if cond is None else {"cond": cond}
    return partial(method, x, *(x.new_full((len(x),), time) for time in capability.trial_times), **given)


def velocity_and_divergence(field: Any, x: Tensor, t: Tensor, **cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Velocity (batch, *event) and divergence (batch,), by one evaluation where the field offers both at once."""
    if _has(field, "velocity_and_divergence"):
        both: tuple[Tensor, Tensor] = field.velocity_and_divergence(x, t, **cond)
        return both
    return field.velocity(x, t, **cond), field.divergence(x, t, **cond)


def _has(model: object, path: str) -> bool:
    try:
        attrgetter(path)(model)
    except AttributeError:
        return False
    return True
