"""Likelihood of fixed test points: time, peak memory, network evaluations and error, per task and estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flowlik.measures.accuracy import bits_per_dim
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import Estimate, parse_spec
from flowlik_models.zoo import load_model

TASKS = ["gmm-2d", "gmm-64d"]
ESTIMATORS = {  # what runs -> on which model
    "ode[rtol=1e-3,atol=1e-3,trace=exact]": "closed-form",
    "ode[rtol=1e-3,atol=1e-3,trace=hutchinson]": "closed-form",
    "f2d2[steps=4]": "meanflow-f2d2",
    "meanflow[steps=4]": "meanflow",
}
ITEMS = 64
EXACT_DIM = 8  # one product a dimension and node: above this many a single cell would take minutes


class Likelihood:
    """One call of `log_prob` on a batch of the task's first test points."""

    params = (TASKS, list(ESTIMATORS))
    param_names = ("task", "estimator")
    timeout = 120.0
    number = 1
    repeat = (3, 5, 3.0)
    rounds = 1
    warmup_time = 0.0

    def setup(self, task: str, estimator: str) -> None:
        (self.estimator,) = parse_spec(estimator)
        self.model: Any = load_model(task, ESTIMATORS[estimator])
        reason = self.estimator.supports(self.model)
        if reason is not None:
            raise NotImplementedError(reason)
        self.task = get_task(task)
        exact = self.estimator.name == "ode" and self.estimator.params()["trace"] == "exact"
        if exact and self.task.dim > EXACT_DIM:
            raise NotImplementedError("the exact trace is left out above eight dimensions")
        self.items = self.task.items("test", ITEMS)
        self.x = whole(self.items.x).float()
        if torch.cuda.is_available():
            self.model, self.x = self.model.cuda(), self.x.cuda()
        self.log_prob()  # warm-up, untimed

    def log_prob(self) -> Estimate:
        estimate = self.estimator.log_prob(self.model, self.x)
        if self.x.is_cuda:
            torch.cuda.synchronize()
        return estimate

    def time_log_prob(self, task: str, estimator: str) -> None:
        self.log_prob()

    def peakmem_log_prob(self, task: str, estimator: str) -> None:
        self.log_prob()

    def track_nfe(self, task: str, estimator: str) -> float:
        return float(torch.as_tensor(self.log_prob().cost.forwards, dtype=torch.float64).mean())

    def track_bpd_error(self, task: str, estimator: str) -> float:
        estimate = self.log_prob()
        reference = self.task.reference("test", self.items, self.estimator.data_end(self.model))
        error = estimate.log_prob.cpu().numpy() - reference.log_prob[0]
        return float(np.abs(bits_per_dim(error, self.task.dim)).mean())


Likelihood.track_nfe.unit = "forwards per sample"  # type: ignore[attr-defined]
Likelihood.track_bpd_error.unit = "bits/dim, mean |error|"  # type: ignore[attr-defined]
