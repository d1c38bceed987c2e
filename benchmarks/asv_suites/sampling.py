"""Samples of the digits maps: time, and Frechet distance to the test images in our own feature space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowlik.measures.frechet import frechet_distance
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models.features.classifier import load_extractor
from flowlik_models.zoo import load_model

SAMPLES = 360


class Sampling:
    """One call of `sample` of the digits joint map."""

    params = ([1, 4],)
    param_names = ("steps",)
    timeout = 120.0
    number = 1
    repeat = (3, 5, 3.0)
    rounds = 1
    warmup_time = 0.0

    def setup(self, steps: int) -> None:
        self.estimator = get("f2d2", steps=steps)
        self.model: Any = load_model("digits", "meanflow-f2d2")
        reason = self.estimator.supports(self.model)
        if reason is not None:
            raise NotImplementedError(reason)
        if torch.cuda.is_available():
            self.model = self.model.cuda()
        self.sample()  # warm-up, untimed

    def sample(self) -> Tensor:
        x = self.estimator.sample(self.model, SAMPLES).x
        if x.is_cuda:
            torch.cuda.synchronize()
        return x

    def time_sample(self, steps: int) -> None:
        self.sample()

    def track_frechet(self, steps: int) -> float:
        extractor = load_extractor("digits")
        if extractor is None:
            raise NotImplementedError("no feature network for digits")
        real = whole(get_task("digits").items("test", SAMPLES).x)
        return frechet_distance(extractor, real, self.sample().cpu())


Sampling.track_frechet.unit = "Frechet distance, digits classifier"  # type: ignore[attr-defined]
