"""The estimators that the parts run, each on a model that fits it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from flowlik.checks.device.setting import Setting
from flowlik.evaluation.models import load
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import available, get, parse_spec


@dataclass(frozen=True)
class Case:
    """An estimator on a model of a task."""

    task: str
    model: str
    estimator: Any

    @property
    def title(self) -> str:
        """One line."""
        return f"{self.task} · {self.model} · {self.estimator.label}"

    def load(self, device: str, dtype: str = "float32") -> Any:
        """The model on the device."""
        return load(self.task, self.model, device, dtype)[0]

    def points(self, n: int, device: str, dtype: str = "float32") -> tuple[Tensor, Tensor]:
        """Test points (n, *event), repeated where there are fewer, and their numbers (n,), on the CPU."""
        x = whole(get_task(self.task).items("test", n).x)
        ids = torch.arange(n)
        return x[ids % len(x)].to(device, getattr(torch, dtype)), ids

    def log_prob(self, device: str, n: int, dtype: str = "float32") -> Any:
        """The estimate of `n` points."""
        x, ids = self.points(n, device, dtype)
        return self.estimator.log_prob(self.load(device, dtype), x, items=ids)


CASES: Final = (
    ("digits", "teacher", "ode[solver=euler,{steps},trace=exact]"),
    ("digits", "teacher", "ode[{tolerance},trace=hutchinson,probes=2]"),
    ("digits", "teacher", "ode[solver=rk4,{steps},trace=hutchinson,{probes}]"),
    ("digits", "teacher", "whitened-ode[solver=rk4,{steps},clock=stretched,trace=hutchinson]"),
    ("digits", "teacher", "elbo"),
    ("digits", "direct-f2d2", "f2d2[{steps}]"),
    ("digits", "direct-f2d2", "f2d2-corrected[{steps}]"),
    ("digits", "direct-f2d2", "self-guidance[{steps}]"),
    ("digits", "meanflow", "meanflow[{steps},trace=hutchinson]"),
    ("gmm-64d", "direct-f2d2", "flow-map-exact[{steps}]"),
    ("digits", "pi-flow", "pi-flow[segments=1]"),
    ("gmm-2d", "{generator}", "generator[{route}]"),
    ("gmm-64d", "energy", "energy"),
    ("gmm-2d", "exact-flow", "exact-flow"),
)
"""Networks that come with the package, so that the kernels are those of real work."""

FULL: Final = {
    "steps": "steps=8",
    "tolerance": "rtol=1e-5,atol=1e-5",
    "probes": "basis=auto,control=auto",
    "generator": "realuid",
    "route": "starts=32",
}
SMALL: Final = {
    "steps": "steps=1",
    "tolerance": "rtol=0.3,atol=0.3",
    "probes": "basis=pca",
    "generator": "realuid-f2d2",
    "route": "route=head",
}

CLOSED_FORMS: Final = ("gmm-2d", "gaussian-2d")
"""Of the estimators that no row of `CASES` names, such as another package's: the first that fits."""


def cases(setting: Setting) -> Iterator[Case | tuple[str, str]]:
    """Every registered estimator at least once; one that cannot run as its name with the reason."""
    words = FULL if setting.full else SMALL
    for task, model, spec in CASES:
        (estimator,) = parse_spec(spec.format(**words))
        yield Case(setting.task(task), model.format(**words), estimator)
    named = {spec.partition("[")[0] for _, _, spec in CASES}
    for name in sorted(set(available()) - named):
        estimator = get(name)
        why = estimator.unavailable()
        fitting = [
            task for task in CLOSED_FORMS if why is None and estimator.supports(_closed_form(task)) is None
        ]
        if fitting:
            yield Case(fitting[0], "closed-form", estimator)
        else:
            yield name, why or f"fits none of the closed forms of {', '.join(CLOSED_FORMS)}"


def _closed_form(task: str) -> Any:
    return load(task, "closed-form", "cpu", "float32")[0]
