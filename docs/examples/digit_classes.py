"""The class of a digit by Bayes' rule, from log p(x | c) of a field of each class, beside a classifier.

`python digit_classes.py [IMAGES]` takes the first test images (default: all 360). All classes are estimated with two
probes, which they share; where two are close, both are solved again with the exact trace and twice the steps.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

import flowlik
from flowlik.points import whole
from flowlik.scoring.classes import Classified
from flowlik.tasks import get_task
from flowlik_estimators import get
from flowlik_models.features import load_extractor
from flowlik_models.moments import attach
from flowlik_models.zoo import load_model

FIRST = "whitened-ode[clock=stretched,solver=rk4,steps=4,trace=hutchinson,probes=2,redraw=true]"
EXACT = get("whitened-ode", clock="stretched", solver="rk4", steps=8)
CLOSE = 5.0  # nats: nearly four times the noise of a difference


def said(right: np.ndarray) -> str:
    """An accuracy with its 95 % interval (Wilson)."""
    low, high = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return f"{right.mean():.4f} [{low:.4f}, {high:.4f}]"


def answered(model: Any, x: torch.Tensor) -> tuple[Classified, np.ndarray, np.ndarray, np.ndarray]:
    """What two probes say; the class of each image, and by how many nats it leads; by how many the close leads moved
    when they were solved again."""
    found = flowlik.classify(model, x, range(10), estimator=FIRST)
    label, lead = found.label.copy(), np.diff(np.sort(found.log_prob, 1)[:, -2:])[:, 0]
    close = np.flatnonzero(lead < CLOSE)
    if not len(close):
        return found, label, lead, np.zeros(0)
    pairs = found.log_prob[close].argsort(1)[:, -2:]
    rows = x[close].repeat_interleave(2, 0)
    exact = EXACT.log_prob(model, rows, cond=torch.tensor(pairs.flatten())).log_prob.view(-1, 2).numpy()
    signed = np.diff(exact)[:, 0]
    moved = signed - lead[close]
    label[close], lead[close] = pairs[range(len(close)), exact.argmax(1)], abs(signed)
    return found, label, lead, moved


def report(images: int = 360) -> Iterator[str]:
    """Both accuracies on the first test images, and where the field is wrong, line by line."""
    task, model = get_task("digits"), load_model("digits", "teacher-classes")
    items = task.for_model(attach(model, task.data_moments())).items("test", images)
    x, truth = whole(items.x), items.cond.numpy()
    found, label, lead, moved = answered(model, x)
    with torch.no_grad():
        other = load_extractor("digits").logits(x).argmax(1).numpy()
    own = found.log_prob[np.arange(len(x)), truth]
    bits = np.log2(17 / 2) - own.mean() / (64 * np.log(2))
    yield f"{len(x)} images, {found.nfe:g} evaluations each, {bits:.3f} bits/dim given the true class"
    yield f"by Bayes' rule  {said(label == truth)}"
    yield f"classifier      {said(other == truth)}"
    yield f"lead of the first class: median {np.median(lead):.0f} nats, below {CLOSE:g} for {len(moved)} images"
    if len(moved):
        yield f"solved again exactly these move by {np.sqrt((moved**2).mean()):.2f} nats (root mean square)"
    for image in np.flatnonzero(label != truth):
        yield f"image {image}: a {truth[image]} taken for a {label[image]}, {lead[image]:.1f} nats likelier"


if __name__ == "__main__":
    for line in report(*map(int, sys.argv[1:])):
        sys.stdout.write(line + "\n")
