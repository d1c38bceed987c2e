"""What an examination looks at besides the field's values: the data's range, the source, steps of the time, tables.

Every function answers with the text of a finding, which holds the number that shows it, and the likely slip.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_estimators.counting.networks import reachable
from flowlik_models.interfaces import HasSource
from flowlik_models.numerics.standard_normal import LOG_2PI

Found = tuple[str, str]

EDGE = 1e-3
"""By which levels' data may lie outside [-1, 1]."""

DARK, BRIGHT = 0.1, 0.9
"""Data whose least number is below and whose largest is above these, and none outside [0, 1], fill [0, 1]."""

MOST_VALUES, REPEATED = 256, 4
"""Data that take no more values than this, each so often on average, are discrete."""

SOURCE_GAP, SIGMAS, FEWEST, DRAWS = 0.005, 4.0, 16, 16
"""Nats a dimension by which a source may be worse than a normal with the data's moments, and standard errors; the
fewest rows, and draws of noise a row."""

ASSUMED_GAP = 0.003
"""The same of a source that stands in for one that nobody gave."""

FINE, COARSE, EARLY = 56, 3, 5
"""Rows of one call that sees the time in steps of `STEP` about halfway, from `FAR`, and from the start to `NEAR`."""

STEP, FAR, NEAR = 2.5e-4, (0.2, 0.8), 0.04
ROUGH, SMALLEST_JUMP, FLAT, VARIED = 0.5, 5e-5, 1e-6, 1e-2
"""Of the largest change, by how much neighbours may differ; of the answer's size, what is a jump, nothing, much."""

LACKING = re.compile(r"NoneType|missing \d+ required|\bcond|\bclass|label|\by\b", re.IGNORECASE)
"""What an error says where a condition is lacking."""


def of_levels(x: Tensor, levels: int | None) -> Found | None:
    """Whether x (batch, *event) lies where levels mean it, and is continuous without them."""
    low, high = float(x.min()), float(x.max())
    unit = 0.0 <= low < DARK and BRIGHT < high <= 1.0
    if levels is not None:
        if unit:
            text = (
                f"x lies from {low:.3g} to {high:.3g}, and levels mean -1 to 1: bits/dim are off by 1 exactly"
            )
            return text, "data scaled to [0, 1]: z = 2 x - 1"
        if low < -1.0 - EDGE or high > 1.0 + EDGE:
            text = f"x lies from {low:.3g} to {high:.3g}, and {levels} levels mean -1 to 1"
            return text, "data that were not scaled, such as images of 0 to 255"
        return None
    values = torch.unique(x)
    if 1 < len(values) <= MOST_VALUES and x.numel() >= REPEATED * len(values):
        text = f"x takes {len(values)} values only, from {low:.3g} to {high:.3g}, and has no density"
        return text, "discrete data given as continuous: whole numbers with levels= say how many there are"
    if unit and x.ndim == 4:
        text = f"images lie from {low:.3g} to {high:.3g}, not -1 to 1 as levels mean: bits/dim are off by 1 exactly"
        return text, "data scaled to [0, 1]: whole numbers with levels=, or z = 2 x - 1"
    return None


def of_source(model: HasSource, x: Tensor) -> Found | None:
    """Whether the source at the noisy end fits the data there at least as well as a normal with their moments does."""
    t, d = float(model.noisy_end), x[0].numel()
    if t <= 0.0 or len(x) < FEWEST or not hasattr(model.source, "log_prob"):
        return None
    data = x.double().flatten(1)
    mean, variance = t * data.mean(0), t**2 * data.var(0, unbiased=False) + (1 - t) ** 2
    if getattr(model.source, "assumed", False):
        return _of_assumed(t, len(x), mean, variance)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(DRAWS):
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64).to(data)
        y = t * data + (1 - t) * noise
        normal = -0.5 * ((y - mean).square() / variance + variance.log() + LOG_2PI).sum(1)
        gaps.append((normal - model.source.log_prob(y.view_as(x).to(x.dtype)).to(normal)) / d)
    gap = torch.stack(gaps).mean(0)
    worse, error = float(gap.mean()), float(gap.std()) / len(x) ** 0.5
    if not worse > max(SOURCE_GAP, SIGMAS * error):
        return None
    text = f"at the noisy end t = {t:.3g} the source is {worse:.3g} nats a dimension worse than the data's own moments"
    return text, "an unsaid source: moments=train_x, or source= where the law is known"


def _of_assumed(t: float, rows: int, mean: Tensor, variance: Tensor) -> Found | None:
    """Whether the data's own normal (d,) is another one than that of mean 0 and variance 1, for which it was taken."""
    taken = t**2 + (1 - t) ** 2
    chance = (variance - (1 - t) ** 2) / (2 * rows * taken)  # of the mean of so few rows
    apart = (mean.square() + variance) / taken - 1.0 - (variance / taken).log()
    gap = float((0.5 * apart - chance).mean())
    if gap <= ASSUMED_GAP:
        return None
    text = f"at the noisy end t = {t:.3g} mean 0 and variance 1 were taken, {gap:.2g} nats a dimension off the data's"
    return text, "an unsaid source: moments=train_x, or source= where the law is known"


def times_to_ask(like: Tensor, start: float, end: float) -> Tensor:
    """The times (64,) of the one call that `of_times` judges."""
    fine = 0.5 + STEP * (torch.arange(FINE, dtype=torch.float64) - FINE / 2)
    coarse = torch.linspace(*FAR, COARSE, dtype=torch.float64)
    early = start + torch.linspace(0.0, NEAR, EARLY, dtype=torch.float64)
    return torch.cat((fine, coarse, early)).clamp(start, end).to(like)


def of_times(values: Tensor, has_ends: bool) -> Found | None:
    """Whether answers (64, *event) to one point at `times_to_ask` change with the time as a smooth field's do."""
    answers = values.double().flatten(1)
    size = max(float(answers.square().mean().sqrt()), 1e-12)
    fine, coarse, early = (
        part.diff(dim=0).square().mean(1).sqrt() / size
        for part in torch.split(answers, [FINE, COARSE, EARLY])
    )
    largest, varied = float(fine.max()), float(coarse.max()) > VARIED
    rough = float(fine.diff().abs().max()) / max(largest, 1e-30)
    likely = (
        "steps of the time rounded inside the network: ask it at fractional ones, or take a fixed-step solver"
    )
    if largest > SMALLEST_JUMP and rough > ROUGH:
        least = float(fine.min())
        text = (
            f"between times {STEP:g} apart the answer changes by {largest:.2g} of its size, or by {least:.2g}"
        )
        return text, likely
    if varied and largest < FLAT:
        return f"the answer is the same at {FINE} times {STEP:g} apart, and another at t = {FAR[0]:g}", likely
    if varied and not has_ends and float(early.max()) < FLAT:
        later = float(coarse.max())
        text = f"the answer does not change from t = 0 to {NEAR:g}, and by {later:.2g} of its size further on"
        return (
            text,
            "a noisy end that is not said: noisy_end, clean_end and source, as flowlik.wrap sets them",
        )
    return None


def lacks_condition(error: Exception) -> bool:
    """Whether an error is likely that of a conditional network asked without a condition."""
    return LACKING.search(str(error)) is not None


def likely_of(error: Exception, *, conditioned: bool) -> str:
    """The likely slip behind an error that a call raised."""
    if conditioned and isinstance(error, IndexError):
        return "a label outside the classes that the network knows"
    if isinstance(error, TypeError) and "positional argument" in str(error):
        return "a network of another signature: say call=lambda net, z, u, cond: ..."
    return "a wrapper that does not fit batches of rows and times"


def modules_of(model: Any) -> list[nn.Module]:
    """All modules in a model and in what it holds, each once."""
    parts = [model, *reachable(model).parts]
    return [*dict.fromkeys(m for part in parts if isinstance(part, nn.Module) for m in part.modules())]


@contextmanager
def tables_asked(model: Any) -> Iterator[dict[nn.Embedding, int]]:
    """Tables of classes (`nn.Embedding`) in a model, and how often each is asked meanwhile."""
    asked = {module: 0 for module in modules_of(model) if type(module) is nn.Embedding}

    def count(module: nn.Embedding, _inputs: Any, _output: Any) -> None:
        asked[module] += 1

    hooks = [module.register_forward_hook(count) for module in asked]
    try:
        yield asked
    finally:
        for hook in hooks:
            hook.remove()


def of_tables(asked: dict[nn.Embedding, int]) -> Found | None:
    """Whether a table of classes was never asked."""
    for module, times in asked.items():
        if not times:
            text = f"a table of {module.num_embeddings} classes in the network was asked 0 times"
            return text, "an unconditional call of a conditional network: give labels"
    return None
