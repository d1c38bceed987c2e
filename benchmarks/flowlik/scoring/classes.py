"""`flowlik.classify`: log p(x | c) for every class, and the class by Bayes' rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik_estimators import Estimator, parse_spec

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Classified:
    """What the classes' likelihoods say of n items.

    ``log_prob`` (n, C) log p(x | c) in nats, ``posterior`` (n, C) p(c | x), ``label`` (n,) the likeliest class,
    ``valid`` (n,): False, and NaN and -1 for the others, where a class has no value. ``nfe``: evaluations an item,
    those of all classes together.
    """

    classes: tuple[int, ...]
    log_prob: Array
    posterior: Array
    label: NDArray[np.int64]
    valid: NDArray[np.bool_]
    nfe: float


def classify(
    model: Any,
    x: Tensor,
    classes: Sequence[int],
    *,
    estimator: str | Estimator = "ode",
    prior: Sequence[float] | None = None,
    batch_size: int = BATCH,
    seed: int = 0,
) -> Classified:
    """The class of every item by Bayes' rule, p(c | x) proportional to p(c) p(x | c), from a conditional model.

    Every class sees the same draws of an estimator that draws, so that their noise cancels in part.

    Args:
        model: a conditional model, whose ``cond`` is a label (batch,) int64.
        x: (n, *event), float32 or float64.
        classes: the C labels.
        estimator: of log p(x | c), as it is spelled on the command line, or from `flowlik_estimators.get`.
        prior: p(c), (C,) numbers above 0 of any sum; None: all classes alike.
        batch_size: items at once.
        seed: of the draws.

    Raises:
        ValueError: no items, classes or a prior that do not fit, a label that the model does not know, an estimator
            that does not fit the model; one line.

    >>> class Shifted(torch.nn.Module):  # class c: N(4 c, I)
    ...     event_shape = (2,)
    ...     def velocity(self, x, t, *, cond):
    ...         mean = 4.0 * cond[:, None]
    ...         t = t[:, None]
    ...         return mean + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - t * mean)
    >>> found = classify(Shifted(), torch.tensor([[0.1, 0.0], [3.8, 4.1]]), classes=[0, 1])
    >>> found.label.tolist(), bool(found.posterior[0, 0] > 0.999)
    ([0, 1], True)
    """
    try:
        classes = [index(label) for label in classes]
    except TypeError:
        raise ValueError(f"classify: classes={list(classes)}: expected whole numbers, the labels") from None
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise ValueError(f"classify: classes={list(classes)}: expected two or more different labels")
    if len(x) == 0:
        raise ValueError("classify: x has no rows, expected one item or more")
    weights = np.ones(len(classes)) if prior is None else np.asarray(prior, dtype=np.float64)
    if weights.shape != (len(classes),) or not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(f"classify: prior: expected {len(classes)} numbers above 0, one a class")
    chosen = one_estimator(estimator, "classify")
    work, columns = 0.0, []
    for label in classes:
        log_prob, forwards = _given(model, x, label, chosen, batch_size, seed)
        columns.append(log_prob)
        work += forwards
    return _judged(tuple(classes), np.stack(columns, 1), np.log(weights / weights.sum()), work)


def one_estimator(estimator: str | Estimator, caller: str) -> Estimator:
    """An estimator, or the one that a line spells.

    Raises:
        ValueError: a line that spells none, or several.
    """
    if not isinstance(estimator, str):
        return estimator
    found = parse_spec(estimator)
    if len(found) != 1:
        raise ValueError(f"{caller}: estimator {estimator!r} names {len(found)}, expected one")
    return found[0]


def _given(
    model: Any, x: Tensor, label: int, estimator: Estimator, size: int, seed: int
) -> tuple[Array, float]:
    """log p(x | label), (n,), NaN where there is no value, and evaluations an item."""
    parts, forwards = [], 0.0
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        cond = torch.full((len(rows),), label, device=rows.device)
        ids, generator = torch.arange(start, start + len(rows)), torch.Generator().manual_seed(seed)
        try:
            out = estimator.log_prob(model, rows, cond=cond, generator=generator, items=ids)
        except (IndexError, KeyError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"classify: the model knows no class {label} ({said})") from error
        if out.status == "refused":
            raise ValueError(f"classify: {estimator.label}: {out.reason}")
        parts.append(torch.where(out.valid, out.log_prob, math.nan).cpu().numpy())
        forwards += float(torch.as_tensor(out.cost.forwards, dtype=torch.float64).mean()) * len(rows)
    return np.concatenate(parts), forwards / len(x)


def _judged(classes: tuple[int, ...], log_prob: Array, log_prior: Array, work: float) -> Classified:
    joint = log_prob + log_prior
    valid = np.asarray(np.isfinite(joint).all(1))
    shares = np.exp(joint - joint.max(1, keepdims=True))
    best = np.where(valid, np.asarray(classes)[np.nan_to_num(joint, nan=-np.inf).argmax(1)], -1)
    return Classified(
        classes=classes,
        log_prob=log_prob,
        posterior=shares / shares.sum(1, keepdims=True),
        label=best,
        valid=valid,
        nfe=work,
    )
