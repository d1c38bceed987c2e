"""Trainings that are interrupted on the way, for the tests of what resuming gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from flowlik_models.training import trainer


def train_interrupted(
    task: str, model: str, out: Path, *, steps: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Train, stop as Ctrl-C does after so many steps, and train again with the same call; the checkpoint's path."""
    update, calls = trainer._Training.update, []

    def interrupted(self: trainer._Training, loss: Tensor) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        update(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_SAVE_EVERY", 0.0)
        patch.setattr(trainer._Training, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(task, model, out=out, steps=steps)
    return trainer.train(task, model, out=out, steps=steps)
