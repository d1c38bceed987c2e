"""Whatever precision the caller allows, models of float32 are evaluated in float32, and the caller's settings stay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowlik.cells import Cell, Options
from flowlik.evaluation.evaluate_cell import run_prepared
from flowlik.evaluation.prepare import prepare
from flowlik.references import make
from flowlik.scoring import distill
from flowlik_estimators import available, examine, get
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.numerics.float32 import _parts, _settings, full_float32
from flowlik_models.training import trainer

PRECISIONS = ["highest", "high", "medium"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    for part in _parts():
        part.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")


def assert_full() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32
    assert {part.fp32_precision for part in _parts()} <= {"none", "ieee"}


class Looks:
    """A model that looks at the settings whenever it is asked."""

    event_shape = (2,)

    def __init__(self) -> None:
        self.asked = 0

    def _seen(self, *values: Any) -> Any:
        self.asked += 1
        assert_full()
        return values if len(values) > 1 else values[0]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self._seen(-x)  # type: ignore[no-any-return]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self._seen(-x)  # type: ignore[no-any-return]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._seen(-x, -2.0 * torch.ones(len(x)))  # type: ignore[no-any-return]

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self._seen(2.0 * z)  # type: ignore[no-any-return]


@pytest.mark.parametrize("products", PRECISIONS)
@pytest.mark.parametrize("convolutions", [True, False])
def test_inside_it_is_full_and_afterwards_as_before(products: str, convolutions: bool) -> None:
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions
    before = _settings()
    with full_float32():
        assert_full()
        with full_float32():
            assert_full()
        assert_full()
    assert _settings() == before


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="this torch has no setting for all parts"
)
def test_tf32_allowed_for_all_parts_is_put_back() -> None:
    torch.backends.fp32_precision = "tf32"
    try:
        before = _settings()
        with full_float32():
            assert_full()
        assert _settings() == before
    finally:
        torch.backends.fp32_precision = "none"


@pytest.mark.parametrize("name", [name for name in available() if not name.startswith("peer-")])
@pytest.mark.parametrize("products", PRECISIONS)
def test_every_estimator_evaluates_in_float32(name: str, products: str) -> None:
    estimator, model = get(name), Looks()
    if (why := estimator.supports(model)) is not None:
        pytest.skip(why)
    torch.set_float32_matmul_precision(products)
    estimator.log_prob(model, torch.ones(3, 2))
    estimator.sample(model, 3, log_prob=False)
    assert model.asked
    assert torch.get_float32_matmul_precision() == products


def test_an_examination_evaluates_in_float32() -> None:
    torch.set_float32_matmul_precision("medium")
    model = Looks()
    assert "error" not in [finding.name for finding in examine(model, torch.randn(8, 2))]
    assert model.asked


class _ReachedError(Exception):
    pass


def _look_and_leave(*_: Any, **__: Any) -> Any:
    assert_full()
    raise _ReachedError


@pytest.mark.parametrize(
    ("module", "inside", "call"),
    [
        (trainer, "prepared", lambda: trainer.train("gmm-2d", "teacher", out=Path("nowhere"), steps=1)),
        (distill, "moments_of", lambda: distill.distill(closed_form("gmm-2d"), torch.randn(300, 2), steps=1)),
        (make, "get_task", lambda: make.make_reference("gmm-2d", Path("nowhere"))),
    ],
)
def test_what_trains_and_makes_references_does_so_in_float32(
    module: Any, inside: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.setattr(module, inside, _look_and_leave)
    with pytest.raises(_ReachedError):
        call()
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.allow_tf32


def test_a_cell_evaluates_in_float32() -> None:
    torch.set_float32_matmul_precision("medium")
    options = Options(n_items=4, rounds=1, timing_batch=2, samples=4, density=True)
    cell = Cell(task="gmm-2d", model="closed-form", estimator=get("f2d2", steps=1), options=options)
    model = Looks()
    row, _ = run_prepared(replace(prepare(cell), model=model))
    assert row.get("status", "ok") == "ok", row
    assert row["forward_equivalents"] > 0
    assert model.asked
    assert torch.get_float32_matmul_precision() == "medium"


def test_an_error_inside_leaves_the_callers_settings() -> None:
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "medium"


def test_of_two_threads_neither_takes_the_precision_of_the_other() -> None:
    torch.set_float32_matmul_precision("high")
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with full_float32():
            entered.set()
            left.wait()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait()
    with full_float32():
        left.set()
        thread.join()
        assert_full()
    assert torch.get_float32_matmul_precision() == "high"
