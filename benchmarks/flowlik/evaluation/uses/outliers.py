"""Does the estimator's likelihood detect images that are out of distribution?

Out-of-distribution sets for the digits, dequantised as they are: the test images moved by two pixels, with grey levels
inverted, with their pixels in another order (the same histogram), and levels drawn at random; MNIST and Fashion-MNIST
reduced to the digits' size by the digits' own procedure (sums over 4 x 4 blocks), where their files are at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.batching.batches import evaluate
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import FEWEST
from flowlik.measures.ranks import ranks
from flowlik.tasks.digits import DigitsTask
from flowlik.tasks.task import UnavailableError
from flowlik_models.images import MissingDataError, evaluation_order, open_images
from flowlik_models.numerics.random import uniform

_KEY = 4_711
SHIFT = 2
SYNTHETIC = ("shifted", "inverted", "shuffled", "noise")
FILES = ("mnist", "fashion-mnist")


def outlier_detection(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """AUROC of log p as a score, test images against each out-of-distribution set of the same size.

    Measures, per set: `auroc` with a 95 % interval (DeLong), `bpd` the set's mean bits/dim as the estimator sees it.
    A set whose file is missing has only a `reason`.
    """
    task, items, cell = prepared.task, prepared.items, prepared.cell
    if not isinstance(task, DigitsTask):
        raise UnavailableError(
            f"outliers are defined for the task digits, not for {task.id}; choose -t digits"
        )
    assert items is not None
    levels = task.images(cell.options.split)[: items.n]
    own = evaluate(cell, prepared.model, items.x[: items.n], items.ids[: items.n]).log_prob
    measured: dict[str, Any] = {}
    arrays = {"own": own}
    for name in (*SYNTHETIC, *FILES):
        try:
            images = out_of_distribution(name, levels)
        except UnavailableError as error:
            measured[name] = {"reason": str(error)}
            continue
        x = task.dequantise(images, cell.options.split, 0)
        scores = evaluate(cell, prepared.model, x.to(items.x.dtype), torch.arange(len(x))).log_prob
        value, low, high = auroc(own, scores)
        measured[name] = {"auroc": value, "auroc_lo": low, "auroc_hi": high}
        arrays[name.replace("-", "_")] = scores
    return measured, arrays


def auroc(inside: Array, outside: Array) -> tuple[float, float, float]:
    """P(a point inside scores higher than one outside), ties half, and its 95 % interval (DeLong et al. 1988).

    There is none, NaN, where a set has fewer than `FEWEST` points.

    Values that are not finite count as the lowest score: an estimator that gives up on a point calls it foreign.
    """
    inside, outside = (np.where(np.isfinite(s), s, -np.inf) for s in (inside, outside))
    m, n = len(inside), len(outside)
    joint = ranks(np.concatenate([inside, outside]))
    # how many of the other set lie below each point, as a share: ranks in both sets minus ranks in its own
    above = (joint[:m] - ranks(inside)) / n
    below = 1 - (joint[m:] - ranks(outside)) / m
    value = float(above.mean())
    if min(m, n) < FEWEST:
        return value, float("nan"), float("nan")
    spread = 1.96 * float(np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n))
    return value, max(value - spread, 0.0), min(value + spread, 1.0)


def out_of_distribution(name: str, levels: Tensor) -> Tensor:
    """An out-of-distribution set of as many images as `levels` (n, 1, 8, 8), grey levels 0..16, uint8.

    Raises:
        UnavailableError: its file is not there; the line says where it is looked for.
    """
    if name in FILES:
        return reduced(_pixels(name, len(levels)))
    return _SYNTHETIC[name](levels)


def _shifted(levels: Tensor) -> Tensor:
    moved = torch.zeros_like(levels)
    moved[..., SHIFT:] = levels[..., :-SHIFT]
    return moved


def _shuffled(levels: Tensor) -> Tensor:
    flat = levels.flatten(1)
    order = uniform(_KEY, torch.tensor([0]), (flat.shape[1],), dtype=torch.float64)[0].argsort()
    return flat[:, order].reshape(levels.shape)


def _noise(levels: Tensor) -> Tensor:
    draw = uniform(_KEY, torch.arange(len(levels)), tuple(levels.shape[1:]), stream=1, dtype=torch.float64)
    return (draw * 17).to(torch.uint8)


_SYNTHETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": _shifted,
    "inverted": lambda levels: 16 - levels,
    "shuffled": _shuffled,
    "noise": _noise,
}


def _pixels(name: str, n: int) -> Tensor:
    """The first n test images of a data set in the suite's order, (n, 1, 28, 28) uint8."""
    try:
        images = open_images(name, "test")
    except MissingDataError as error:
        raise UnavailableError(str(error)) from None
    return images.pixels(evaluation_order(len(images))[:n])


def reduced(images: Tensor) -> Tensor:
    """Grey images (n, 1, 28, 28) in 0..255 as the digits were made: padded to 32 x 32, 4 x 4 blocks averaged to 0..16,
    (n, 1, 8, 8) uint8.
    """
    blocks = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images.double(), (2, 2, 2, 2)), 4)
    return (blocks / 255 * 16).round().to(torch.uint8)
