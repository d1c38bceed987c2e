"""A forced out-of-memory: the batch is halved until it fits, the numbers stay, and the memory comes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch

from flowlik.cells import Cell, Options
from flowlik.checks.device.cases import Case
from flowlik.checks.device.setting import Setting
from flowlik.evaluation.batching.batches import evaluate, is_out_of_memory
from flowlik_estimators import parse_spec

ITEMS: Final = 6400
TOO_MUCH: Final = 2**50
"""Bytes that no device has."""


class Greedy(torch.nn.Module):
    """A model that asks for more memory than there is whenever a batch has more than `most` rows."""

    def __init__(self, inner: Any, most: int) -> None:
        super().__init__()
        self.inner, self.most = inner, most
        self.event_shape = inner.event_shape
        self.refused = 0

    def joint(self, x: Any, t: Any, s: Any, *, cond: Any = None) -> Any:
        """The inner model's answer, where the rows are few."""
        if len(x) > self.most:
            self.refused += 1
            torch.empty(TOO_MUCH, dtype=torch.uint8, device=x.device)
        return self.inner.joint(x, t, s, cond=cond)


def memory(setting: Setting) -> Iterator[dict[str, Any]]:
    """How far the batch was halved, the gap to the same in small batches, and what stayed allocated.

    Raises:
        RuntimeError: the allocation was not refused, or what it raised is not known as an out-of-memory.
    """
    (estimator,) = parse_spec("f2d2[steps=2]")
    case = Case(setting.task("digits"), "direct-f2d2", estimator)
    n = setting.of(ITEMS)
    model = case.load(setting.device)
    yield {"raises": _raised(setting.device)}
    options = Options(n_items=n, batch_size=n, rounds=0)
    cell = Cell(task=case.task, model=case.model, estimator=estimator, options=options, device=setting.device)
    x, ids = case.points(n, "cpu")
    most = max(1, n // 5)
    plain = evaluate(cell.with_options(batch_size=most), model, x, ids)
    before = _allocated(setting.device)
    greedy = Greedy(model, most).eval()
    survived = evaluate(cell, greedy, x, ids)
    yield {
        "batch": n,
        "fits": most,
        "refused": greedy.refused,
        "batch_used": survived.batch_size,
        "gap_nats": float(abs(survived.log_prob - plain.log_prob).max()),
        "left_bytes": None if before is None else (_allocated(setting.device) or 0) - before,
    }


def _raised(device: str) -> str:
    """The name of what torch raises."""
    try:
        torch.empty(TOO_MUCH, dtype=torch.uint8, device=device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise RuntimeError(f"not known as an out-of-memory: {error}") from error
        return type(error).__name__
    raise RuntimeError(f"{device} gave {TOO_MUCH} bytes")


def _allocated(device: str) -> int | None:
    return int(torch.cuda.memory_allocated(device)) if torch.device(device).type == "cuda" else None
