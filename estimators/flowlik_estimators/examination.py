"""The examination of a model: checks that need more than one call, at most 20 forwards of one batch of 64.

What a wrong wrapper gives away: two calls that differ, a row that depends on its neighbours or on their times, a
derivative that is not that of the values, latents of the data that are not of size one. At t = 0 the field of an
independent coupling is ``mean - y``, of slope -1 in every direction, and its velocities are conditional expectations of
displacements: ``E[(x - n) . v] = E[v^2]``. Other couplings (optimal transport, reflow) have another slope and another
share, so that there only what no coupling can have is a finding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_estimators.integration.adams import adams_pec
from flowlik_estimators.model_checks import examined
from flowlik_estimators.model_checks.answers import mapped
from flowlik_estimators.model_checks.guards import DTYPES, check_points
from flowlik_models.interfaces import CAPABILITIES, can, data_end_of, ends_of
from flowlik_models.numerics import random
from flowlik_models.numerics.float32 import full_float32
from flowlik_models.numerics.reparametrised_time import ReparametrisedTime
from flowlik_models.numerics.streams import EXAMINATION_STREAMS

ROWS = 64
FEWEST_ROWS = 16
"""Below so many, chance alone may say that data and noise are joined otherwise than by the field."""

HALFWAY, EARLIER = 0.5, 0.2
"""The times at which rows and derivatives are looked at."""

SAME = 1e-3
"""Answers that should be equal may differ by this share of their size: other batches are summed in another order."""

DERIVATIVE = 0.1
"""Share by which finite differences of steps `STEPS` may differ from the derivative."""

STEPS = (1e-2, 1e-3)
SOLVE = 6
"""Steps of the solve from the data to the latents, of one evaluation each and one more."""

NEAR_DATA, NEAR_NOISE = 0.05, 0.5
"""What is resolved near the data, where the solve begins, and near the noise."""

LATEST_START = 0.05
"""Of a field that begins later than this the slope there is not that at t = 0."""

SLOPE_STEP = 0.1
SLOPE = 0.15
"""How near to -1 the slope at t = 0 is taken for that of an independent coupling."""

SHARE, SIGMAS = 0.25, 5.0
"""With such a coupling displacements over velocities are 1 up to this, and up to so many standard errors."""

SMALLEST_SHARE = 0.6
ABOVE_OPTIMAL_TRANSPORT = 0.5
"""Optimal transport of data of standard deviation s has a slope of about s - 1 at t = 0 and a share above 1 halfway."""

LATENTS, LATENTS_OF_A_FACTOR = 2.5, 1.4
"""Factors from 1 of the latents' mean square: beyond any doubt, and where slope and share point to a factor already."""

OFFSET = 0.1
"""Mean square of the latents' mean per dimension that no random rows of the data have where the field is right."""

LARGE = 100.0
"""Root mean square of data that no network has been trained on as they are."""

WIDE, AWAY = 3.0, 3.0
"""Ratio to the training data's standard deviation, and distance from their mean in it, of other data than these."""

Ask = Callable[[Tensor, float | Tensor], Tensor]


@dataclass(frozen=True)
class Finding:
    """What an examination found: the check's ``name``, ``text`` with the number that shows it, the ``likely`` slip."""

    name: str
    text: str
    likely: str

    def __str__(self) -> str:
        return f"{self.text}; likely {self.likely}"


@full_float32()
def examine(model: Any, x: Tensor, cond: Any = None, levels: int | None = None) -> list[Finding]:
    """What is wrong with a model as far as its answers on data x (batch, *event) show it; empty: nothing was found.

    ``cond`` are the conditions of the rows, ``levels`` the number of levels where the data are dequantised ones.

    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gmm-2d")
    >>> x = model.sample(64, generator=torch.Generator().manual_seed(0))
    >>> examine(model, x)
    []
    >>> model.velocity = lambda x, t, cond=None: -type(model).velocity(model, x, t)
    >>> [finding.name for finding in examine(model, x)]
    ['path']
    """
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or len(x) == 0:
        check_points(x, None)
    if not any(can(model, ability) for ability in CAPABILITIES):
        raise ValueError(
            f"a {type(model).__name__} has no velocity(x, t) or the like: wrap it, flowlik.wrap(net, ...)"
        )
    rows = min(len(x), ROWS)
    x = x[:rows].detach().clone()
    condition = mapped(cond, lambda value: value[:rows])
    ask = _asked(model, condition)
    if ask is None or (cond is None and getattr(model, "conditional", False)):
        return []
    with torch.inference_mode(False), torch.no_grad(), _evaluating(model) as training:
        try:
            look = _Look(model, ask, x, cond is not None, levels, training)
        except ValueError as error:  # ends that are said in part only, or are no times in order
            said = ", ".join(f"{name} = {getattr(model, name, None)}" for name in ("noisy_end", "clean_end"))
            likely = "a part of noisy_end, clean_end and source that was forgotten"
            return [Finding("source", f"{error} ({said})", likely)]
        with examined.tables_asked(model) as asked:
            found = look.findings()
        if cond is None and not any(each.name in ("error", "condition") for each in found):
            found += _finding("condition", examined.of_tables(asked))
        return found


def _finding(name: str, found: examined.Found | None) -> list[Finding]:
    return [] if found is None else [Finding(name, *found)]


def _asked(model: Any, cond: Any) -> Ask | None:
    """The field at (x, t), a map from t to the noise, or a generator at x; None where the model has none of them."""
    for name, times in (("velocity", 1), ("average_velocity", 2), ("joint", 2), ("generate", 0)):
        if hasattr(model, name):
            return partial(_answer, getattr(model, name), times, cond)
    return None


def _answer(method: Callable[..., Any], times: int, cond: Any, x: Tensor, t: float | Tensor) -> Tensor:
    time = t if isinstance(t, Tensor) else x.new_full((len(x),), t)
    answer = method(x, *(time, torch.zeros_like(time))[:times], cond=cond)
    value = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"it answers {got} to points of shape {tuple(x.shape)}")
    return value


class _Found(Exception):  # noqa: N818 - a finding on the way
    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class _Look:
    def __init__(
        self,
        model: Any,
        ask: Ask,
        x: Tensor,
        conditioned: bool,
        levels: int | None,
        training: list[nn.Module],
    ) -> None:
        self.model, self.ask, self.x = model, ask, x
        self.conditioned, self.levels = conditioned, levels
        self.is_field = can(model, "velocity")
        self.has_times = self.is_field or can(model, "flow map") or can(model, "joint flow map")
        self.ends = ends = ends_of(model)
        self.start = 0.0 if ends is None else float(ends.noisy_end)
        self.end = data_end_of(model)
        self.training = training
        items = torch.arange(len(x))
        draw = partial(random.gaussian, 0, items, tuple(x.shape[1:]), dtype=x.dtype, device=x.device)
        self.noise, self.direction, self.other = (draw(stream=stream) for stream in EXAMINATION_STREAMS)
        self.y = HALFWAY * (x + self.noise)

    def findings(self) -> list[Finding]:
        """All of them, those first that explain others."""
        found = [*self._data()]
        try:
            self.value = self.ask(self.y, HALFWAY)
            if (finding := self._not_finite(self.value, HALFWAY)) is not None:
                return [*found, finding]
            checks = [self._rows, self._derivative, self._mode, self._source]
            checks += [self._times] if self.has_times and self.start <= EARLIER else []
            if self.is_field and self.start <= LATEST_START and len(self.x) >= FEWEST_ROWS:
                checks.append(self._path)
            for check in checks:
                found += check()
            found += [] if found or not self.has_times else self._steps()
        except _Found as one:
            found.append(one.finding)
        except Exception as error:  # whatever a model of somebody's own raises is a finding
            text = f"a call raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if not self.conditioned and examined.lacks_condition(error):
                likely = (
                    "an unconditional call of a conditional network: give labels, or fix the label in call="
                )
                return [*found, Finding("condition", text, likely)]
            found.append(Finding("error", text, examined.likely_of(error, conditioned=self.conditioned)))
        return found

    # --- one check each ---

    def _data(self) -> Iterator[Finding]:
        yield from (levels := _finding("range", examined.of_levels(self.x, self.levels)))
        moments = getattr(self.model, "moments", None)
        size = _rms(self.x)
        if levels:
            return
        if moments is None:
            if not 1e-3 < size < LARGE:
                text = f"root mean square of x is {size:.3g}"
                yield Finding(
                    "range", text, "data that were not scaled as in training, such as images of 0 to 255"
                )
            return
        x = self.x.double().cpu().flatten(1)
        total = float(moments.eigenvalues.sum()) + (moments.rest or 0.0) * (
            x.shape[1] - len(moments.eigenvalues)
        )
        spread = math.sqrt(total / x.shape[1])
        wide = _rms(x - x.mean(0)) / spread
        away = _rms(x.mean(0) - torch.as_tensor(moments.mean, dtype=torch.float64).flatten()) / spread
        if away > AWAY or (len(x) >= ROWS and not 1 / WIDE < wide < WIDE):
            text = f"x has {wide:.3g} times the training data's standard deviation, and a mean {away:.3g} of these away"
            yield Finding("range", text, "another scaling of the data than in training")

    def _not_finite(self, value: Tensor, t: float) -> Finding | None:
        bad = int((~torch.isfinite(value)).flatten(1).any(1).sum())
        if not bad:
            return None
        text = f"not finite in {bad} of {len(value)} rows at t = {t:g}"
        return Finding("not finite", text, "a division by zero or an overflow in the network or its wrapper")

    def _repeated(self) -> list[Finding]:
        gap = _apart(self.ask(self.y, HALFWAY), self.value)
        if gap <= SAME:
            return []
        text = f"two calls on the same input differ by {gap:.3g} of their size"
        return [Finding("repeatability", text, "noise drawn inside the model, or dropout outside of modules")]

    def _rows(self) -> list[Finding]:
        """Whether other rows or another call change a row's answer; which of them, where one does."""
        half = len(self.y) // 2
        if half == 0:
            return self._repeated()
        mixed = torch.cat((self.y[:half], 3.0 * self.other[half:]))
        gap = _apart(self.ask(mixed, HALFWAY)[:half], self.value[:half])
        if gap <= SAME:
            return []
        if found := self._repeated():
            return found
        text = f"with other rows beside it a row's answer differs by {gap:.3g} of its size"
        return [Finding("rows", text, "statistics over the batch, or rows mixed by a reshape")]

    def _times(self) -> list[Finding]:
        y = EARLIER * self.x + (1 - EARLIER) * self.noise
        self.early = self.ask(y, EARLIER)
        if len(y) < 4:
            return []
        flags = torch.arange(len(y), device=y.device) % 4 == 0
        flags[-1] = True
        columns = flags.view(-1, *[1] * (y.ndim - 1))
        t = torch.where(flags, EARLIER, HALFWAY).to(y.dtype)
        together = self.ask(torch.where(columns, y, self.y), t)
        gap = _apart(together, torch.where(columns, self.early, self.value))
        if gap <= SAME:
            return []
        text = f"with other times beside it a row's answer differs by {gap:.3g} of its size"
        likely = "one time read for the whole batch, such as t[0]: use all of t, or set scalar_time = True"
        return [Finding("times", text, likely)]

    def _derivative(self) -> list[Finding]:
        with torch.enable_grad():
            y = self.y.clone().requires_grad_()
            value = self.ask(y, HALFWAY)
            slope = None
            if value.requires_grad:
                (slope,) = torch.autograd.grad((value * self.other).sum(), y, allow_unused=True)
        by_graph = torch.zeros(len(y), dtype=torch.float64, device=y.device)
        if slope is not None:
            by_graph = (slope * self.direction).flatten(1).sum(1).double()
        gaps = []
        for step in STEPS:
            h = step * max(_rms(self.y), 1e-3)
            up, down = (self.ask(self.y + sign * h * self.direction, HALFWAY) for sign in (1, -1))
            by_difference = ((up.double() - down.double()) / (2 * h) * self.other).flatten(1).sum(1)
            gaps.append(_apart(by_graph, by_difference) if bool(by_difference.any()) else _rms(by_graph))
            if gaps[-1] <= DERIVATIVE:
                return []
        if slope is None:
            text = f"the answer has no graph to x, and changes with it by {_rms(by_difference):.3g} per unit"
        else:
            text = f"derivatives by the graph differ by {min(gaps):.3g} of their size from finite differences"
        likely = "no_grad, inference_mode or detach in the wrapper, or an operation without a derivative"
        return [Finding("derivative", text, likely)]

    def _source(self) -> list[Finding]:
        if self.ends is None:
            return []
        return _finding("source", examined.of_source(self.ends, self.x))

    def _steps(self) -> list[Finding]:
        """Whether the answer to one point changes with the time as a smooth field's does; asked last."""
        if len(self.x) < ROWS or self.conditioned:
            return []
        times = examined.times_to_ask(self.y[:1].flatten(), self.start, self.end)
        values = self.ask(self.y[:1].expand_as(self.y).contiguous(), times)
        return _finding("discrete steps", examined.of_times(values, self.ends is not None))

    def _mode(self) -> list[Finding]:
        if not self.training:
            return []
        buffers = [(b, b.clone()) for module in self.training for b in module.buffers(recurse=False)]
        devices = [self.x.device] if self.x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for module in self.training:
                module.training = True
            try:
                gap = _apart(self.ask(self.y, HALFWAY), self.value)
            finally:
                for module in self.training:
                    module.training = False
                for buffer, before in buffers:
                    buffer.copy_(before)
        if gap <= SAME:
            return []
        text = f"in training mode, in which it is, the model answers otherwise by {gap:.3g} of its size"
        return [Finding("training mode", text, "a forgotten model.eval()")]

    def _path(self) -> list[Finding]:
        """Whether the field carries the data to the noise, and not otherwise."""
        slope, z = self._slope(), self._latents()
        latents, offset = float(z.square().mean()), _offset(z)
        halfway = _share(self.x - self.noise, self.value)
        early = _share(self.x - self.noise, self.early)
        likely = _slip(slope, latents, halfway, early, self.x)
        if likely is None and offset > OFFSET:
            likely = "time turned round, a factor, or data moved from where they were in training"
        if likely is None:
            return []
        text = (
            f"slope at t = 0 is {slope:.3g} (-1 for an independent coupling), displacements over velocities "
            f"{halfway[0]:.3g} at t = {HALFWAY:g} and {early[0]:.3g} at t = {EARLIER:g} (1), mean square of the "
            f"data's latents per dimension {latents:.3g} (1), of their mean {offset:.2g} beyond chance (0)"
        )
        return [Finding("path", text, likely)]

    def _latents(self) -> Tensor:
        """Where the solve carries the data, (rows, d) float64."""
        start = min(self.end, 1.0 - NEAR_DATA)
        state = (start * self.x + (1 - start) * self.noise,)
        z = state[0]
        for at in adams_pec(lambda t, at: (self._seen(at[0], float(t)),), state, _grid(start, self.start)):
            z = at[0]
        return z.double().flatten(1)

    def _seen(self, x: Tensor, t: float) -> Tensor:
        """The field's answer to finite x, which is to be finite."""
        value = self.ask(x, t)
        if bool(torch.isfinite(x).all()) and (finding := self._not_finite(value, t)) is not None:
            raise _Found(finding)
        return value

    def _slope(self) -> float:
        """Of the field at t = 0 along one direction a row, the median over rows."""
        up, down = (
            self._seen(self.noise + sign * SLOPE_STEP * self.direction, self.start) for sign in (1, -1)
        )
        along = ((up - down) * self.direction).flatten(1).sum(1) / (2 * SLOPE_STEP)
        return float((along / self.direction.square().flatten(1).sum(1)).median())


def _offset(z: Tensor) -> float:
    """Mean square of the mean of latents (rows, d) per dimension, beyond what so few rows leave to chance."""
    rows, d = z.shape
    chance = float(z.var(0, unbiased=False).mean()) / rows
    return float(z.mean(0).square().mean()) - chance * (1.0 + SIGMAS * math.sqrt(2.0 / d))


def _share(displacement: Tensor, velocity: Tensor) -> tuple[float, float]:
    """E[displacement . velocity] over E[velocity^2], and its standard error: 1 for a conditional expectation."""
    d, v = displacement.double().flatten(1), velocity.double().flatten(1)
    size = max(float(v.square().sum()), 1e-30)
    share = float((d * v).sum()) / size
    rest = ((d - share * v) * v).sum(1)
    return share, float(rest.square().sum().sqrt()) / size


def _slip(
    slope: float, latents: float, halfway: tuple[float, float], early: tuple[float, float], x: Tensor
) -> str | None:
    """What explains these numbers, None where they may be right, whatever the coupling."""
    if not math.isfinite(slope + latents + halfway[0] + early[0]):
        return "a factor that is wrong, so that the solve leaves all bounds"
    off = max(latents, 1 / max(latents, 1e-30))
    spread = float((x - x.mean(0)).double().square().mean().sqrt())
    independent = abs(slope + 1) <= SLOPE
    if halfway[0] + SIGMAS * halfway[1] < 0:
        return "the sign: the answer is noise minus data, with or without time turned round"
    if slope > spread - 1 + ABOVE_OPTIMAL_TRANSPORT:
        return "time turned round (t = 0 is its data), or another prediction than the velocity"
    for share, error in (halfway, early):
        if share and independent and abs(share - 1) > max(SHARE, SIGMAS * error):
            return f"a factor of about {1 / share:.2g}, or time or data scaled otherwise than in training"
    if not independent and halfway[0] + SIGMAS * halfway[1] < SMALLEST_SHARE:
        return f"a factor of about {-slope:.2g} on the velocity"
    if not independent and abs(halfway[0] * slope + 1) < SHARE and off > LATENTS_OF_A_FACTOR:
        return f"a factor of about {-slope:.2g} on the velocity"
    return "data scaled otherwise than in training, or a wrong time" if off > LATENTS else None


def _grid(start: float, end: float) -> Tensor:
    """Times from ``start`` to ``end``, equal steps of a time that is slow near the data."""
    slow = ReparametrisedTime(NEAR_DATA, NEAR_NOISE)
    times: Tensor = slow.time(torch.linspace(slow.at(start), slow.at(end), SOLVE + 1, dtype=torch.float64))
    times[0], times[-1] = start, end
    return times


# --- helpers ---


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _apart(value: Tensor, other: Tensor) -> float:
    """Root mean square of the difference over that of ``other``."""
    return _rms(value.double() - other.double()) / max(_rms(other), 1e-12)


@contextmanager
def _evaluating(model: Any) -> Iterator[list[nn.Module]]:
    """All modules in eval mode; yields those in training mode, which they are in again afterwards."""
    training = [module for module in examined.modules_of(model) if module.training]
    for module in training:
        module.training = False
    try:
        yield training
    finally:
        for module in training:
            module.training = True
