"""`flowlik.wrap`: any network as a velocity field on the suite's clock."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import torch

from flowlik_models.adapters import azula, diffusers, flow_matching, torchcfm, zuko
from flowlik_models.adapters import source as sources
from flowlik_models.adapters.exact_flow import WrappedFlow
from flowlik_models.adapters.field import Call, WrappedField, _Network
from flowlik_models.adapters.paths import Path, as_path, prediction_of
from flowlik_models.adapters.predictions import PREDICTIONS
from flowlik_models.adapters.source import GaussianSource, SourceWarning
from flowlik_models.interfaces import Source
from flowlik_models.moments import attach
from flowlik_models.names import unknown
from flowlik_models.numerics.standard_normal import StandardNormal

RECOGNISERS: tuple[Callable[[Any], dict[str, Any] | None], ...] = (
    flow_matching.options,
    torchcfm.options,
    zuko.options,
    azula.options,
    diffusers.options,
)
"""Each answers with what it knows of an object of its library, None for any other; none imports the library."""

GAP_POINTS, GAP_NUMBERS = 1024, 2**19
"""Points, and points x dimensions, of which the network is asked how far the source is off; at least 8 points."""


def wrap(
    net: Any,
    event_shape: Sequence[int] | None = None,
    *,
    predicts: str | None = None,
    path: Any = None,
    moments: Any = None,
    source: Source | None = None,
    call: Call | None = None,
    guidance: float | None = None,
    null: Any = None,
) -> Any:
    """A network as a field on the suite's clock, a `WrappedField`: t = 0 noise, t = 1 data.

    An exact flow of zuko's, which is no field, is taken for the family ``exact-flow`` as it is, a `WrappedFlow`.

    Args:
        net: called as ``net(z, u)``, or ``net(z, u, cond)`` where there is a condition: z (batch, *event) on its own
            path, u (batch,) on its own clock, whose straight one is ``x_t = (1 - t) x_0 + t x_1``. An object of
            flow_matching, torchcfm, zuko (a flow over N(0, I)), azula (Denoiser) or diffusers (UNet2DModel,
            DiTTransformer2DModel) says most of the rest itself.
        event_shape: of one sample.
        predicts: velocity (dz/du), noise, data (a denoiser), v (``a n - s x``) or score; by default what the scheduler
            says, and velocity on the straight path and its reverse.
        path: straight (default), reversed (t = 1 is noise, velocity is noise - data), vp, cosine, ddpm (steps 0..999),
            edm, ve; `flowlik_models.adapters` makes them with other constants; a diffusers scheduler; or ``(alpha,
            sigma, clock)``: callables on (batch,) float64, clock = (u at the noisiest end, u at the cleanest).
        moments: training data (n, *event), or `Moments`: for the source where the noisy end is not N(0, I), and for
            estimators that whiten.
        source: the law at the noisy end itself, on the suite's clock: ``log_prob(x)`` and ``sample(n, generator)``.
        call: ``(net, z, u, cond)`` -> output, for networks of another signature.
        guidance: w in ``(1 + w) v(cond) - w v(null)``; two evaluations.
        null: condition of the second one, a number or a tensor; None calls the network without a condition.

    Raises:
        ValueError: what is unknown or does not go together, in one line.

    A `SourceWarning` says where the source is not known well enough, and by how many nats.

    >>> import torch
    >>> from flowlik_models.synthetic import closed_form
    >>> exact = closed_form("gmm-2d")
    >>> backwards = wrap(lambda z, u: -exact.velocity(z, 1 - u), (2,), predicts="velocity", path="reversed")
    >>> x, t = torch.zeros(3, 2), torch.full((3,), 0.5)
    >>> bool(torch.allclose(backwards.velocity(x, t), exact.velocity(x, t)))
    True
    >>> wrap(lambda z, u: z, (2,), predicts="noise", path="ddpm")
    WrappedField(
      predicts=noise, t from 0.006313 to 0.9901
      (network): _Network()
    )
    """
    known = _recognised(net)
    if "exact" in known:
        given = {"predicts": predicts, "path": path, "moments": moments, "source": source, "call": call}
        return _exact(net, known["exact"], event_shape, given | {"guidance": guidance, "null": null})
    event_shape = known.get("event_shape") if event_shape is None else event_shape
    told = known.get("path", "straight") if path is None else path
    path = as_path(told)
    model = WrappedField(
        _Network(net, call or known.get("call")),
        _shape(event_shape),
        predicts=_prediction(predicts or known.get("predicts"), told, path),
        path=path,
        guidance=None if guidance is None else _number(guidance),
        null=null,
    )
    if moments is not None:
        attach(model, sources.moments_of(moments, model.event_shape))
    if source is not None:
        model.source = source
    elif model.noisy_end == 0.0:
        model.source = StandardNormal(model.event_shape)
    else:
        _give_source(model, moments)
    return model


def _recognised(net: Any) -> dict[str, Any]:
    for options in RECOGNISERS:
        if (known := options(net)) is not None:
            return known
    if not callable(net):
        raise ValueError(f"wrap: a network is called as net(z, u); a {type(net).__name__} cannot be called")
    return {}


def _exact(net: Any, model: WrappedFlow, event_shape: Any, given: Mapping[str, Any]) -> WrappedFlow:
    """The model of an exact flow, to which nothing is to be said."""
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise ValueError(f"wrap: a {type(net).__name__} is an exact flow, of which {named[0]} has no meaning")
    if event_shape is not None and _shape(event_shape) != model.event_shape:
        raise ValueError(f"wrap: the flow is one of {model.event_shape}, not of {_shape(event_shape)}")
    return model


def _shape(event_shape: Any) -> tuple[int, ...]:
    if event_shape is None:
        raise ValueError("wrap: give event_shape, the shape of one sample, such as (2,) or (3, 32, 32)")
    try:
        shape = tuple(index(size) for size in event_shape)
    except TypeError:
        raise ValueError(
            f"wrap: event_shape must be a tuple such as (3, 32, 32), got {event_shape!r}"
        ) from None
    if any(size < 1 for size in shape):
        raise ValueError(f"wrap: event_shape must have positive sizes, got {shape}")
    return shape


def _number(guidance: Any) -> float:
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
        raise ValueError(f"wrap: guidance must be a finite number, got {guidance!r}")
    return float(guidance)


def _prediction(predicts: str | None, told: Any, path: Path) -> str:
    if predicts is None:
        predicts = prediction_of(told)
    if predicts is None and (
        told in ("straight", "reversed") if isinstance(told, str) else path.velocity_is_w
    ):
        predicts = "velocity"
    if predicts is None:
        raise ValueError(f"wrap: say what the network predicts: predicts= one of {', '.join(PREDICTIONS)}")
    if predicts not in PREDICTIONS:
        raise ValueError(f"wrap: {unknown('prediction', predicts, PREDICTIONS)}")
    if predicts == "velocity" and path.steps is not None:
        raise ValueError(
            "wrap: predicts=velocity has no meaning on integer steps; use noise, data, v or score"
        )
    return predicts


def _give_source(model: WrappedField, moments: Any) -> None:
    """The Gaussian source at the noisy end; a warning where it is not known well enough."""
    t = model.noisy_end
    law = GaussianSource(model.event_shape, t, getattr(model, "moments", None))
    model.source = law
    if not sources.matters(t):
        return
    dim = math.prod(model.event_shape)
    if moments is None:
        model.source_gap = sources.worst(t, dim)
        text = (
            f"the network's noisy end is t = {t:.3g}, where the source still holds the data: taken as mean 0, variance "
            f"1; log p is {model.source_gap:.3g} nats off for data of mean 1. Give moments=train_x, or source="
        )
    else:
        text = _gap(model, law)
    warnings.warn(text, SourceWarning, stacklevel=3)


def _gap(model: WrappedField, law: GaussianSource) -> str:
    """How far the source is from the law that the network's own score says."""
    t = model.noisy_end
    normal = law.divergence_from(GaussianSource(model.event_shape, 0.0, None))
    model.source_gap = _mean_gap(model, law)
    off = "an unknown number of" if model.source_gap is None else f"{model.source_gap:.2g}"
    return (
        f"the network's noisy end is t = {t:.3g}: the source is the Gaussian with the data's moments, {normal:.2g} "
        f"nats from N(0, I); by the network's score there log p is {off} nats off, on average over the data. Give "
        "source= where the law is known"
    )


def _mean_gap(model: WrappedField, law: GaussianSource) -> float | None:
    """E |log p/G| over the data in nats; None where the network cannot be asked without a condition."""
    t, dim = model.noisy_end, math.prod(model.event_shape)
    like = next(model.parameters(), torch.zeros((), dtype=torch.float64))
    points = law.sample(max(8, min(GAP_POINTS, GAP_NUMBERS // dim)), torch.Generator().manual_seed(0))

    def score(y: torch.Tensor) -> torch.Tensor:
        y = y.to(like.dtype)
        value: torch.Tensor = (t * model.velocity(y, y.new_full((len(y),), t)) - y) / (1 - t)
        return value

    try:
        with torch.no_grad():
            ratio = law.log_ratio(points.to(like.device), score)
    except Exception:  # a network that wants a condition, whatever it raises then: nothing is known
        return None
    gap = float((ratio.exp() * ratio.abs()).mean())
    return gap if math.isfinite(gap) else None
