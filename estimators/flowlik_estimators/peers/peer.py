r"""What the adapters of public libraries have in common: docs/peers.md.

All of them solve ``d(x, l)/dt = (v, div v)`` from the data to the source as one augmented ODE (FFJORD, arXiv
1810.01367) and answer ``log N(x_0; 0, I) + l``. What differs is the solver, what its error control looks at,
and how the divergence is taken. None gives a standard error, and none of the answers can be differentiated.

The libraries are optional: without one, `supports` says how to get it. Events are handed over as rows of length d,
so event shapes of any rank work.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run
from flowlik_models.interfaces import lacks


@dataclass(frozen=True, kw_only=True)
class Peer(Estimator):
    """What they have in common: how the trace is taken, and a library that may be missing."""

    family = "peer"
    module: ClassVar[str]
    package: ClassVar[str]
    extra: ClassVar[str] = "peers"

    trace: Literal["exact", "hutchinson"] = "exact"

    def unavailable(self) -> str | None:
        """None, or one line how to get the library."""
        try:
            import_module(self.module)
        except Exception as error:  # a library that breaks on a newer torch is as good as absent
            why = " ".join(str(error).split()) or type(error).__name__
            return f"needs {self.package}: pip install 'flowlik[{self.extra}]' ({why})"
        return None

    def supports(self, model: object) -> str | None:
        """Needs a velocity, and the library."""
        return lacks(model, "velocity") or self.unavailable()

    def _check(self) -> None:
        self._at_least_one(*(option for option in ("steps", "max_nfe") if hasattr(self, option)))
        for option in ("rtol", "atol"):
            value = getattr(self, option)
            if value is not None and value <= 0.0:
                raise ValueError(f"{self.name}: {option} must be positive, got {value}")

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        if run.differentiable:
            raise ValueError(f"{self.name}: the answer cannot be differentiated")
        return self._solved(model, x.flatten(1), run)

    def _solved(self, model: Any, x: Tensor, run: Run) -> Estimate:
        raise NotImplementedError
