"""A large cell is kept in pieces: a run that was stopped inside it goes on there, and the answer is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowlik.cells import Cell, Options
from flowlik.evaluation.batching import partial_results
from flowlik.evaluation.batching.batches import Evaluation, evaluate
from flowlik.records.journal import PARTIAL_RESULTS
from flowlik.running.executor import Setup
from flowlik.running.inline import Inline
from flowlik.running.run import run_cells
from flowlik.tasks.registry import get_task
from flowlik_estimators import get

PROBES = get("ode", solver="midpoint", steps=3, trace="hutchinson", probes=2)
MAP = get("f2d2", steps=2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_results, "ITEMS", 20)


def cell(estimator: Any = PROBES, **options: Any) -> Cell:
    chosen = Options(**({"n_items": 50, "batch_size": 8, "rounds": 0} | options))
    return Cell(task="gaussian-2d", model="closed-form", estimator=estimator, options=chosen)


def points(one: Cell) -> tuple[Any, Any, Any]:
    task = get_task(one.task)
    items = task.items("test", one.options.n_items)
    return task.load_model(one.model, "cpu")[0], items.x.float(), items.ids


def same(a: Evaluation, b: Evaluation) -> None:
    assert np.array_equal(a.log_prob, b.log_prob)
    assert np.array_equal(a.valid, b.valid)
    assert (a.stderr is None) == (b.stderr is None)
    assert a.stderr is None or np.array_equal(a.stderr, b.stderr)
    assert a.cost.keys() == b.cost.keys()
    assert all(np.array_equal(a.cost[name], b.cost[name]) for name in a.cost)
    assert a.extra.keys() == b.extra.keys()
    assert (a.batch_size, a.reason) == (b.batch_size, b.reason)


@pytest.mark.parametrize("estimator", [PROBES, MAP])
def test_partial_results_give_the_answer_of_one_go_and_are_read_as_they_were_written(
    estimator: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cell(estimator)
    known = points(one)
    whole = evaluate(one, *known)
    same(partial_results.with_partial_results(tmp_path)(one, *known), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "0-24-by-8.npz",
        "24-48-by-8.npz",
        "48-50-by-8.npz",
    ]
    assert capsys.readouterr().err.splitlines()[-1] == f"{one.title}: 50 of 50 items"
    monkeypatch.setattr(partial_results, "evaluate", None)  # nothing is computed again
    same(partial_results.with_partial_results(tmp_path)(one, *known), whole)


def test_a_damaged_piece_is_computed_again(tmp_path: Path) -> None:
    one = cell()
    known = points(one)
    whole = partial_results.with_partial_results(tmp_path)(one, *known)
    (tmp_path / "24-48-by-8.npz").write_bytes(b"torn")
    same(partial_results.with_partial_results(tmp_path)(one, *known), whole)


def test_small_cells_are_not_cut(tmp_path: Path) -> None:
    for one in (cell(n_items=20), cell(batch_size=50), cell(batch_size="auto")):
        partial_results.with_partial_results(tmp_path / "none")(one, *points(one))
    assert not (tmp_path / "none").exists()


def test_a_run_that_was_stopped_inside_a_cell_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = run_cells([cell()], tmp_path / "plain")
    asked: list[int] = []

    def stopped(one: Cell, model: Any, x: Any, ids: Any, cond: Any = None) -> Evaluation:
        asked.append(len(x))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate(one, model, x, ids, cond)

    monkeypatch.setattr(partial_results, "evaluate", stopped)
    out = tmp_path / "out"
    executor = Inline(Setup(partial_results=out / PARTIAL_RESULTS))
    with pytest.raises(KeyboardInterrupt):
        list(run_cells([cell()], out, executor=executor))
    (kept,) = (out / PARTIAL_RESULTS).iterdir()
    assert [path.name for path in kept.iterdir()] == ["0-24-by-8.npz"]
    (ended,) = run_cells([cell()], out, resume=True, executor=executor)
    assert asked == [24, 24, 24, 2]
    assert ended.row is not None
    assert plain.row is not None
    assert ended.row["bpd"] == plain.row["bpd"]
    assert ended.row["cell_id"] == plain.row["cell_id"] == kept.name
    assert not kept.exists()
