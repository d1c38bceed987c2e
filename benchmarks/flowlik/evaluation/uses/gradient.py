"""Is the estimate's gradient that of the likelihood? What an estimate is worth as a loss.

In x: the gradient of the estimate against the exact score of the task's closed form, point by point. In the weights of
a network in up to `WIDEST` dimensions: the gradient of the mean estimate against that of the converged likelihood of
the network's own field. The two can differ: a joint map's divergence head is not tied to its field, and a loss can pull
at the head alone.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowlik.evaluation.batching.batches import on_device
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.arrays import Array
from flowlik.tasks.points import whole
from flowlik.tasks.task import UnavailableError
from flowlik_estimators import parse_spec

ITEMS = 256
WEIGHT_ITEMS = 64
WIDEST = 8
EXACT = "ode[solver=rk4,steps=24,grid=logsnr,trace=exact]"


def gradients(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """Cosine and relative error of the estimate's gradient.

    Measures: `cosine` (mean over points), `cosine_p05` (the 5th percentile), `error` (median of |g - g*|/|g*|), all in
    x; `weight_cosine` and `weight_error` in a network's weights.
    """
    cell, task, items, model = prepared.cell, prepared.task, prepared.items, prepared.model
    assert items is not None
    truth = getattr(task, "truth", None)
    if truth is None:
        raise UnavailableError(f"gradient needs a closed form, and {task.id} has none; choose -t gmm-2d")
    n = min(items.n, ITEMS)
    points = whole(items.x[:n])
    x = on_device(cell, points)
    end = float(cell.estimator.data_end(model))
    exact = score(truth, points.double(), end)
    found = estimate_score(cell.estimator, model, x, cell.options.seed)
    measured = compared(found, exact)
    if task.dim <= WIDEST and isinstance(model, nn.Module) and any(True for _ in model.parameters()):
        measured |= _in_weights(cell.estimator, model, x[:WEIGHT_ITEMS], cell.options.seed)
    return measured, {"estimated": found.numpy(), "exact": exact.numpy()}


def score(truth: Any, x: Tensor, end: float) -> Tensor:
    """Exact gradient of log p_end in x, (n, d) float64."""
    x = x.detach().cpu().requires_grad_()
    (gradient,) = torch.autograd.grad(truth.log_prob(x, end).sum(), x)
    return gradient


def estimate_score(estimator: Any, model: Any, x: Tensor, seed: int = 0) -> Tensor:
    """Gradient of the estimate in x, (n, d) float64; NaN where the estimate does not depend on x by a graph."""
    x = x.detach().requires_grad_()
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(seed), differentiable=True)
    if not out.log_prob.requires_grad:
        return torch.full(x.shape, math.nan, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out.log_prob.sum(), x)
    return gradient.detach().double().cpu()


def compared(found: Tensor, exact: Tensor) -> dict[str, float]:
    """Mean and 5th percentile of the cosines, and the median relative error, of rows of two (n, d) tables."""
    cosine = torch.nn.functional.cosine_similarity(found, exact, dim=1)
    error = (found - exact).norm(dim=1) / exact.norm(dim=1)
    known = torch.isfinite(cosine) & torch.isfinite(error)
    if not bool(known.any()):
        return {"cosine": math.nan, "cosine_p05": math.nan, "error": math.nan}
    return {
        "cosine": float(cosine[known].mean()),
        "cosine_p05": float(np.quantile(cosine[known].numpy(), 0.05)),
        "error": float(error[known].median()),
    }


def _in_weights(estimator: Any, model: nn.Module, x: Tensor, seed: int) -> dict[str, float]:
    (reference,) = parse_spec(EXACT)
    exact = weight_gradient(reference, model, x, seed)
    measured = compared(weight_gradient(estimator, model, x, seed)[None], exact[None])
    return {"weight_cosine": measured["cosine"], "weight_error": measured["error"]}


def weight_gradient(estimator: Any, model: nn.Module, x: Tensor, seed: int = 0) -> Tensor:
    """Gradient of the mean estimate in all weights, (weights,) float64; zero where a weight has no part in it."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(seed), differentiable=True)
    found = torch.autograd.grad(out.log_prob.mean(), weights, allow_unused=True)
    parts = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, found, strict=True)]
    return torch.cat([part.detach().double().flatten().cpu() for part in parts])
