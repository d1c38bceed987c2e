"""Compilation, memory format and the batch that fits: what changes is the time, never the answer or the count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field, points

from flowlik.cells import Cell, Options, cell_id
from flowlik.evaluation import compilation, models
from flowlik.evaluation.batching import batch_size
from flowlik.planning.selection import with_run_options
from flowlik.planning.suites import options_of
from flowlik.running import run
from flowlik_estimators import get, parse_spec


class Net(nn.Module):
    """A small network with convolutions."""

    event_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        value: Tensor = self.layers(x) * t.view(-1, 1, 1, 1)
        return value


def cell(**options: Any) -> Cell:
    estimator = get("ode", solver="euler", steps=2)
    return Cell(task="gmm-2d", model="closed-form", estimator=estimator, options=Options(**options))


def test_compiled_network_gives_the_same_values_and_counts() -> None:
    plain, fast = Net(), Net()
    assert compilation.compiled(fast, "cpu", torch.float32, backend="eager") is None
    assert "velocity" in fast.__dict__
    x = points(3, 1, 4, 4, dtype=torch.float32)
    for spec in ("ode[solver=midpoint,steps=2]", "ode[solver=euler,steps=2,trace=hutchinson,probes=2]"):
        (estimator,) = parse_spec(spec)
        slow, quick = (estimator.log_prob(net, x) for net in (plain, fast))
        assert slow.cost == quick.cost
        torch.testing.assert_close(slow.log_prob, quick.log_prob)


def test_network_that_cannot_be_compiled_stays_as_it_is_and_says_why() -> None:
    net = Net()
    net.generate = net.velocity  # an instance's own method, which must come back
    reason = compilation.compiled(net, "cpu", torch.float32, backend="no-such-backend")
    assert reason is not None
    assert reason.startswith("torch.compile failed: ")
    assert "\n" not in reason
    assert "velocity" not in net.__dict__
    assert net.generate == net.velocity
    guided = Field(lambda x, t: x, networks=("inner",), inner=Net())
    assert "several networks" in str(compilation.compiled(guided, "cpu", torch.float32))


def test_row_says_that_the_network_was_not_compiled_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "compiled", lambda *_: "no compiler")
    models.load_compiled.cache_clear()
    row, _ = run.run_cell(cell(compile=True, n_items=4, rounds=0))
    models.load_compiled.cache_clear()
    assert row["status"] == "ok"
    assert row["compiled"] is False
    assert row["extra"]["not_compiled"] == "no compiler"


def test_channels_last_changes_rounding_only() -> None:
    plain, laid_out = Net(), compilation.laid_out(Net(), "cpu")
    weight = laid_out.layers[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    x = points(3, 1, 4, 4, dtype=torch.float32)
    estimator = get("ode", solver="rk4", steps=2)
    torch.testing.assert_close(
        estimator.log_prob(plain, x).log_prob, estimator.log_prob(laid_out, x).log_prob
    )


@pytest.mark.parametrize(
    ("per_item", "available", "n", "batch"),
    [
        (1e6, 10**9, 10_000, 500),
        (1e6, 10**9, 100, 100),
        (1e10, 10**9, 100, 1),
        (0.0, 10**9, 10**6, batch_size.MOST),
    ],
)
def test_batch_takes_at_most_half_of_the_memory(per_item: float, available: int, n: int, batch: int) -> None:
    assert batch_size.batch_for(per_item, available, n) == batch


def test_trial_sees_what_an_item_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    item = 2_000_000
    monkeypatch.setattr(batch_size, "available_bytes", lambda device: 200 * item)

    def call(where: slice) -> None:
        torch.ones((where.stop - where.start) * item // 4).sum()

    if batch_size.held(torch.device("cpu")) is None or not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not tell the memory of a process")
    assert 80 <= batch_size.fitting_batch(call, 1000, torch.device("cpu")) <= 125
    # freed below a piece that is still held, these stay with the C library, which would serve the trial from them
    pieces = [torch.ones(20_000) for _ in range(3000)]
    last = torch.ones(20_000)
    del pieces
    assert last.sum() == 20_000
    assert 80 <= batch_size.fitting_batch(call, 1000, torch.device("cpu")) <= 125


def test_row_of_an_automatic_batch_holds_the_size_used() -> None:
    row, _ = run.run_cell(cell(batch_size="auto", n_items=40, rounds=0))
    assert row["status"] == "ok"
    assert 1 <= row["batch_size"] <= 40
    assert row["extra"]["batch_size_asked"] == "auto"


def test_what_is_asked_is_part_of_the_cell() -> None:
    ids = {cell_id(changed, "", "", "") for changed in (cell(), cell(compile=True), cell(batch_size="auto"))}
    assert len(ids) == 3
    assert options_of({"batch_size": "auto"}, Options()).batch_size == "auto"
    assert with_run_options([cell()], True, "64")[0].options == Options(compile=True, batch_size=64)
    for wrong in ("0", "many"):
        with pytest.raises(ValueError, match="expected a number above 0, or auto"):
            with_run_options([cell()], False, wrong)
    with pytest.raises(ValueError, match="batch_size"):
        options_of({"batch_size": "many"}, Options())
