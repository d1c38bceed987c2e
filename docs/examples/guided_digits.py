"""Does self-guidance help, or does it please one feature network? Judged in networks that know nothing of digits.

`python guided_digits.py [SAMPLES]` (default: 1024) draws digits by two steps of the shipped joint map, plain, guided by
its likelihood, and, as control, with its noise shrunk as far. The step size is chosen by the digits classifier on the
first 180 test images; the other 180 judge, in the classifier, in pixels, and in three unrelated networks: a classifier
of clothes, one of photographs (where `flowlik[features]` is installed), and one whose weights are random.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowlik.measures.frechet import features_of, frechet, normal_of
from flowlik.points import whole
from flowlik.tasks import get_task
from flowlik_estimators import get
from flowlik_models.features.classifier import extractor_for, load_extractor
from flowlik_models.features.efficientnet import load_efficientnet, why_no_efficientnet
from flowlik_models.zoo import load_model

STEP_SIZES = (0.02, 0.05, 0.1)
HALF = 180


def networks() -> dict[str, Callable[[Tensor], Tensor]]:
    """What gives features (n, f) of digits (n, 1, 8, 8) in [-1, 1]."""
    torch.manual_seed(0)
    digits, clothes, untrained = (
        load_extractor("digits"),
        load_extractor("fashion-mnist"),
        extractor_for("digits"),
    )
    assert digits is not None
    assert clothes is not None
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "classifier of digits": lambda x: features_of(digits, x),
        "pixels": lambda x: x.flatten(1),
        "classifier of clothes": lambda x: features_of(
            clothes, F.interpolate(x, (28, 28), mode="bilinear", align_corners=False)
        ),
        "random weights": lambda x: features_of(untrained.eval(), x),
    }
    if why_no_efficientnet() is None:
        photographs = load_efficientnet()
        found["classifier of photographs"] = lambda x: features_of(photographs, x)
    return found


def drawn(n: int, step_size: float | None = None, direction: str = "likelihood") -> Tensor:
    """Samples of two steps from the same noise each time."""
    guided = {"step_size": step_size, "direction": direction}
    estimator = get("self-guidance", steps=2, **guided) if step_size else get("f2d2", steps=2)
    model, generator = load_model("digits", "direct-f2d2"), torch.Generator().manual_seed(0)
    return estimator.sample(model, n, generator=generator, log_prob=False).x


def report(n: int = 1024) -> Iterator[str]:
    """The table, line by line."""
    real = whole(get_task("digits").items("test", 2 * HALF).x).float()
    every = networks()
    plain, choose = drawn(n), every["classifier of digits"]
    reached = {
        size: frechet(normal_of(choose(real[:HALF])), choose(drawn(n, size))).frechet for size in STEP_SIZES
    }
    best = min(reached, key=lambda size: reached[size])
    yield f"step size {best:g}, of {', '.join(f'{size:g}: {value:.2f}' for size, value in reached.items())}"
    guided, shrunk = drawn(n, best), drawn(n, best, "prior")
    yield f"{'distance, and gain [95 %], in':28}{'plain':>8}{'guided':>28}{'noise shrunk':>28}"
    for name, features in every.items():
        held = normal_of(features(real[HALF:]))
        before, *after = (frechet(held, features(x)) for x in (plain, guided, shrunk))
        cells = []
        for one in after:
            low, high = np.quantile(before.resampled - one.resampled, (0.025, 0.975))
            cells.append(f"{before.frechet - one.frechet:+.3g} [{low:.3g}, {high:.3g}]")
        yield f"{name:28}{before.frechet:8.3g}" + "".join(f" {cell:>27}" for cell in cells)


if __name__ == "__main__":
    for line in report(*map(int, sys.argv[1:])):
        sys.stdout.write(line + "\n")
