"""Cells become rows whatever happens in them, and a resumed run does exactly what is missing."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import flowlik
from flowlik.cells import CONTROLS, Cell, Options, cell_id
from flowlik.commands.progress import one_line
from flowlik.evaluation import models
from flowlik.evaluation.batching import batches, timing
from flowlik.measures.frechet import frechet, frechet_distance, normal_of
from flowlik.planning import suites
from flowlik.records.columns import COLUMNS
from flowlik.records.writing import append_line, read_arrays
from flowlik.running import run as runs
from flowlik.running.run_folder import Outcome, RunFolder
from flowlik_estimators import get, parse_spec
from flowlik_models import zoo
from flowlik_models.checkpoints import save_checkpoint
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.recipes.table import RECIPES

SMALL = Options(n_items=50, batch_size=20, rounds=0)


def cell(
    estimator: Any = None, task: str = "gaussian-2d", model: str = "closed-form", **options: Any
) -> Cell:
    chosen = get("f2d2", steps=2) if estimator is None else estimator
    return Cell(task=task, model=model, estimator=chosen, options=dataclasses.replace(SMALL, **options))


def run(chosen: Cell) -> dict[str, Any]:
    return runs.run_cell(chosen)[0]


# --- what a row holds ---------------------------------------------------------------------------------------


def test_an_exact_estimator_has_no_error_and_counted_cost() -> None:
    row = run(cell(dtype="float64", density=True))
    assert set(row) == set(COLUMNS)
    assert row["status"] == "ok"
    assert row["extra"]["abs_nats_max"] < 1e-9
    assert (row["nfe_mean"], row["nfe_max"], row["work"], row["steps"]) == (2.0, 2.0, 2.0, 2)
    assert row["mass"] == pytest.approx(1.0, abs=1e-4)
    assert row["cycle_error"] < 1e-9
    assert row["spearman"] == pytest.approx(1.0)
    assert (row["eps"], row["ref_id"], row["ref_se"], row["n_items"]) == (0.0, "closed-form", 0.0, 50)
    assert row["bpd_error_lo"] <= row["bpd_error"] <= row["bpd_error_hi"]


def test_density_of_the_estimator_lies_beside_that_of_the_truth() -> None:
    _, arrays = runs.run_cell(cell(density=True))
    assert arrays["density"].shape == (len(arrays["grid_y"]), len(arrays["grid_x"]))
    assert np.abs(arrays["density"] - arrays["density_ref"]).max() < 1e-3
    assert {"log_prob", "ref", "valid"} <= set(arrays)


def test_batches_of_any_size_give_the_same_answer() -> None:
    estimator = parse_spec("ode[solver=heun,steps=4,trace=hutchinson,probes=2]")[0]
    whole, parts = (
        runs.run_cell(cell(estimator, task="gmm-2d", batch_size=size, dtype="float64"))[1] for size in (50, 7)
    )
    assert whole["log_prob"] == pytest.approx(parts["log_prob"], abs=1e-9)
    assert whole["stderr"] == pytest.approx(parts["stderr"], abs=1e-9)


def test_seeds_change_probes_and_leave_the_items_alone() -> None:
    estimator = parse_spec("ode[solver=heun,steps=4,trace=hutchinson]")[0]
    (_, one), (_, other) = (runs.run_cell(cell(estimator, task="gmm-2d", seed=seed)) for seed in (0, 1))
    assert np.array_equal(one["ref"], other["ref"])
    assert not np.array_equal(one["log_prob"], other["log_prob"])


def test_several_probes_have_error_bars_that_are_judged() -> None:
    estimator = parse_spec("ode[solver=rk4,steps=16,grid=logsnr,trace=hutchinson,probes=4]")[0]
    row = run(cell(estimator, n_items=200, batch_size=200))
    assert row["stderr_mean"] > 0
    assert 0.85 <= row["coverage95"] <= 1.0


def test_an_estimators_own_eps_moves_the_reference_with_it() -> None:
    row = run(cell(get("f2d2", steps=1, eps=0.1), dtype="float64"))
    assert row["eps"] == pytest.approx(0.1)
    assert row["extra"]["abs_nats_max"] < 1e-9


def test_timing_fills_its_columns_and_counts_forwards() -> None:
    row = run(cell(get("f2d2", steps=8), n_items=400, batch_size=400, rounds=3))
    assert row["rounds"] == 3
    assert row["wall_s_median"] > 0
    assert row["wall_s_iqr"] >= 0
    assert row["items_per_s"] > 0
    assert row["peak_bytes"] > 1e6
    assert 2 < row["forward_equivalents"] < 80


def test_timing_interleaves_estimate_and_forward() -> None:
    calls: list[str] = []
    measured = timing.measure(
        lambda: calls.append("estimate") or time.sleep(0.001),
        lambda: calls.append("forward") or time.sleep(0.02),
        items=10,
        rounds=3,
        device=torch.device("cpu"),
    )
    assert calls[2:] == ["estimate", *["estimate", "forward"] * 3]
    assert measured.rounds == 3
    assert measured.items_per_s == pytest.approx(10 / measured.wall_s_median)


def test_controls_cost_nothing() -> None:
    row = run(Cell(task="gmm-2d", model="closed-form", estimator="control-mean", options=SMALL))
    assert (row["family"], row["nfe_mean"], row["steps"], row["estimator"]) == (
        "control",
        0.0,
        None,
        "control-mean",
    )
    assert row["bpd_error"] == pytest.approx(0.0, abs=1e-12)


class Abstaining(NamedTuple):
    """Knows the truth to 0.3 nats, and answers only where the density is largest."""

    share: float
    name, family, label, version = "abstaining", "ode", "abstaining", 1

    def params(self) -> dict[str, Any]:
        return {}

    def unavailable(self) -> str | None:
        return None

    def data_end(self, model: object) -> float:
        return 1.0

    def log_prob(self, model: Any, x: torch.Tensor, **options: Any) -> Any:
        out = get("f2d2", steps=1).log_prob(model, x, **options)
        value = out.log_prob + 0.3 * torch.linspace(-1, 2, len(x)).square()
        easy = out.log_prob >= out.log_prob.quantile(1 - self.share)
        return dataclasses.replace(out, log_prob=value, valid=easy)


def test_answering_only_what_is_easy_does_not_pay() -> None:
    options = {"n_items": 200, "batch_size": 200}
    whole, some = (run(cell(Abstaining(share), **options)) for share in (1.0, 0.6))
    worst = max(
        run(cell(name, **options))["bpd_mae"]
        for name in CONTROLS
        if name != "control-component"  # a Gaussian has none
    )
    for part in ("", "_lo", "_hi"):
        assert whole[f"bpd_mae_all{part}"] == pytest.approx(whole[f"bpd_mae{part}"], rel=1e-12)
    assert some["invalid_share"] == pytest.approx(0.4, abs=0.01)
    answered = 1 - some["invalid_share"]
    expected = answered * some["bpd_mae"] + (1 - answered) * worst
    assert some["bpd_mae_all"] == pytest.approx(expected)
    assert some["bpd_mae_all"] > whole["bpd_mae_all"]
    assert some["bpd_mae_all_lo"] < some["bpd_mae_all"] < some["bpd_mae_all_hi"]


def test_the_progress_line_shows_the_error_of_all_items() -> None:
    chosen = cell(Abstaining(0.6), n_items=200, batch_size=200)
    row = run(chosen)
    line = one_line(Outcome(cell=chosen, row=row, seconds=0.1))
    assert f"|error| {row['bpd_mae_all']:.4g}" in line


def test_ids_of_cells_stay_when_there_are_new_controls() -> None:
    options = Options(n_items=50, split="train")
    made = Cell(task="gmm-2d", model="closed-form", estimator=get("f2d2", steps=2), options=options)
    assert cell_id(made, "model", "data", "reference") == "ffef81384ab1bc6b"
    control = Cell(task="gmm-2d", model="closed-form", estimator="control-mean", options=options)
    assert cell_id(control, "", "data", "reference") == "28cac307cb05e2e0"


# --- what goes wrong ----------------------------------------------------------------------------------------


class Broken:
    """An estimator that does what a test tells it to, and otherwise is f2d2."""

    name, family, label, version = "broken", "ode", "broken", 1

    def __init__(self, act: Any) -> None:
        self.act = act

    def params(self) -> dict[str, Any]:
        return {}

    def unavailable(self) -> str | None:
        return None

    def data_end(self, model: object) -> float:
        return 1.0

    def log_prob(self, model: Any, x: torch.Tensor, **options: Any) -> Any:
        self.act(x)
        return get("f2d2", steps=1).log_prob(model, x, **options)


def test_a_field_that_is_not_the_reference_has_no_error_columns() -> None:
    estimator = get("ode", solver="euler", steps=2, trace="hutchinson", probes=2)
    row = run(cell(estimator, task="digits", model="teacher-early", n_items=4))
    assert row["status"] == "ok"
    assert "another network" in row["reason"]


def test_what_another_teacher_taught_is_not_judged_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = cell(task="digits", model="direct-f2d2", n_items=4)
    assert run(chosen)["bpd_mae"] is not None
    other = RECIPES["digits"]["direct-f2d2"].with_options(teacher="teacher-early")
    monkeypatch.setitem(RECIPES["digits"], "direct-f2d2", other)
    row = run(chosen)
    assert row["bpd"] is not None
    assert row["bpd_mae"] is None
    assert row["reason"] == "the reference is the likelihood of teacher, another network"
    assert row["bpd"] is not None
    assert row["bpd_mae"] is None


def test_a_missing_library_is_a_skipped_row_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = get("peer-zuko")
    monkeypatch.setattr(type(estimator), "module", "no_such_library")
    row = run(cell(estimator))
    assert row["status"] == "skipped"
    assert "pip install" in row["reason"]


def raising(error: BaseException) -> Broken:
    def act(x: torch.Tensor) -> None:
        raise error

    return Broken(act)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("something\n odd"), "error", "RuntimeError: something odd"),
        (KeyError("weights"), "error", "KeyError: 'weights'"),
        (MemoryError(), "oom", "MemoryError"),
        (RuntimeError("CUDA out of memory. Tried"), "oom", "CUDA out of memory. Tried"),
    ],
)
def test_an_exception_becomes_status_and_reason(error: BaseException, status: str, reason: str) -> None:
    row = run(cell(raising(error)))
    assert (row["status"], row["reason"]) == (status, reason)
    assert row["bpd"] is None


def test_an_interrupt_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(cell(raising(KeyboardInterrupt())))


def test_a_model_that_does_not_fit_is_refused() -> None:
    row = run(cell(get("f2d2"), task="gmm-2d"))
    assert row["status"] == "refused"
    assert "joint" in row["reason"]


def test_a_solve_that_gives_up_is_diverged() -> None:
    row = run(cell(get("ode", max_nfe=3), task="gmm-2d"))
    assert row["status"] == "diverged"
    assert "max_nfe" in row["reason"]
    assert row["invalid_share"] == 1.0


def test_a_cell_that_takes_too_long_is_a_timeout() -> None:
    row, _ = runs.run_cell(cell(Broken(lambda x: time.sleep(5))), timeout=0.1)
    assert row["status"] == "timeout"
    assert "0.1 s" in row["reason"]


def test_the_batch_is_halved_when_memory_runs_out_and_no_item_is_lost() -> None:
    def small_memory(x: torch.Tensor) -> None:
        if len(x) > 6:
            raise torch.OutOfMemoryError("out of memory")

    row, arrays = runs.run_cell(cell(Broken(small_memory), dtype="float64"))
    assert row["status"] == "ok"
    assert row["extra"]["batch_size_used"] == 5
    assert np.abs(arrays["log_prob"] - arrays["ref"]).max() < 1e-9


def test_stream_covers_every_index_once() -> None:
    seen: list[int] = []

    def call(where: slice) -> None:
        if where.stop - where.start > 3:
            raise MemoryError
        seen.extend(range(where.start, where.stop))

    _, left = batches.stream(call, 20, 11)
    assert seen == list(range(20))
    assert left == 3
    with pytest.raises(MemoryError):
        batches.stream(lambda where: (_ for _ in ()).throw(MemoryError()), 4, 4)


def test_a_missing_checkpoint_is_skipped_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path)
    models.load.cache_clear()
    row = run(cell(task="gmm-2d", model="meanflow-f2d2"))
    assert row["status"] == "skipped"
    assert "flowlik train gmm-2d meanflow-f2d2" in row["reason"]


def test_checkpoints_of_ones_own_come_before_the_shipped_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped, _ = models.load("gmm-2d", "meanflow", "cpu", "float32")
    with torch.no_grad():
        shipped.shift.bias += 1
    save_checkpoint(
        tmp_path / "gmm-2d" / "meanflow.safetensors", shipped, {"task": "gmm-2d", "model": "meanflow"}
    )
    save_checkpoint(tmp_path / "gmm-2d" / "esd.safetensors", shipped, {"task": "gmm-2d", "model": "esd"})
    assert "esd" not in zoo.available_models("gmm-2d")
    monkeypatch.setenv(zoo.CHECKPOINTS_VARIABLE, str(tmp_path))
    models.load.cache_clear()
    own, _ = models.load("gmm-2d", "meanflow", "cpu", "float32")
    assert torch.equal(own.shift.bias, shipped.shift.bias)
    assert {"meanflow", "meanflow-f2d2", "esd"} <= set(zoo.available_models("gmm-2d"))
    models.load.cache_clear()


def test_a_damaged_checkpoint_is_an_error_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path)
    models.load.cache_clear()
    (tmp_path / "gmm-2d").mkdir()
    (tmp_path / "gmm-2d" / "meanflow-f2d2.safetensors").write_bytes(b"\x10\0\0\0")
    row = run(cell(task="gmm-2d", model="meanflow-f2d2"))
    assert row["status"] == "error"
    assert "meanflow-f2d2.safetensors" in row["reason"]


def test_off_the_data_a_stiff_field_cannot_take_the_run() -> None:
    row = run(cell(parse_spec("ode[trace=closed]")[0], task="thin-2d", n_items=20, density=True))
    assert row["status"] == "ok"
    assert row["mass"] is None
    assert "max_nfe" in row["extra"]["density"]


# --- runs ---------------------------------------------------------------------------------------------------


def some_cells() -> list[Cell]:
    estimators = parse_spec("f2d2[steps=1|2]")
    return [*(cell(estimator) for estimator in estimators), *suites.control_cells([cell()])]


def test_rows_are_on_disk_before_the_next_cell_begins(tmp_path: Path) -> None:
    for number, outcome in enumerate(runs.run_cells(some_cells(), tmp_path), start=1):
        frame = flowlik.read_records(tmp_path)
        assert len(frame) == number
        assert outcome.row is not None
        assert (tmp_path / "items" / f"{outcome.row['cell_id']}.npz").exists()
    assert (tmp_path / "environments.jsonl").exists()
    assert frame["env_id"].nunique() == 1
    assert set(frame["status"]) == {"ok"}


def test_per_item_arrays_give_the_row_again(tmp_path: Path) -> None:
    (outcome,) = runs.run_cells([cell(parse_spec("ode[solver=euler,steps=4]")[0], task="gmm-2d")], tmp_path)
    assert outcome.row is not None
    arrays = read_arrays(tmp_path / "items" / f"{outcome.row['cell_id']}.npz")
    error = (arrays["ref"] - arrays["log_prob"]) / (2 * math.log(2))
    assert error.mean() == pytest.approx(outcome.row["bpd_error"])


def test_resume_does_exactly_what_is_missing(tmp_path: Path) -> None:
    cells = some_cells()
    list(runs.run_cells(cells[:2], tmp_path))
    with (tmp_path / "records.jsonl").open("ab") as stream:
        stream.write(b'{"cell_id": "torn')
    outcomes = list(runs.run_cells(cells, tmp_path, resume=True))
    assert [outcome.row is None for outcome in outcomes] == [True, True, False, False, False]
    frame = flowlik.read_records(tmp_path)
    assert frame["estimator_label"].tolist() == [chosen.label for chosen in cells]


def test_resume_tries_again_what_failed(tmp_path: Path) -> None:
    flaky = {"broken": True}

    def act(x: torch.Tensor) -> None:
        if flaky["broken"]:
            raise RuntimeError("the disk was unplugged")

    cells = [cell(Broken(act)), cell(get("f2d2"), task="gmm-2d")]
    assert [o.row["status"] for o in runs.run_cells(cells, tmp_path) if o.row] == ["error", "refused"]
    flaky["broken"] = False
    outcomes = list(runs.run_cells(cells, tmp_path, resume=True))
    assert [outcome.row is None for outcome in outcomes] == [False, True]
    assert sorted(flowlik.read_records(tmp_path)["status"]) == ["ok", "refused"]


def test_the_id_of_a_cell_follows_everything_that_determines_the_answer() -> None:
    base = cell()
    known = ("model", "data", "reference")
    changes = {
        "n_items": 51, "batch_size": 10, "dtype": "float64", "seed": 1, "repeat": 1, "split": "train",
        "draws": 2, "density": True, "samples": 8,
    }  # fmt: skip
    others = [base.with_options(**{name: value}) for name, value in changes.items()]
    others += [
        cell(get("f2d2", steps=3)),
        cell(task="gmm-2d"),
        cell(model="x"),
        dataclasses.replace(base, device="cuda"),
    ]
    ids = [cell_id(other, *known) for other in [base, *others]]
    ids += [
        cell_id(base, *(name + "'" if i == k else name for i, name in enumerate(known))) for k in range(3)
    ]
    assert len(set(ids)) == len(ids)
    assert cell_id(base.with_options(rounds=9, timing_batch=3), *known) == ids[0]
    assert cell_id(dataclasses.replace(base, device="cuda:1"), *known) == cell_id(others[-1], *known)


# --- samples ------------------------------------------------------------------------------------------------


class Flat(torch.nn.Module):
    """Features that are the image itself."""

    name = "flat"
    num_features = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 1, 2, 2, generator=generator)
    shift = torch.tensor([1.0, 0.0, 2.0, 0.0]).reshape(1, 2, 2)
    assert frechet_distance(Flat(), real, real + shift) == pytest.approx(5.0, abs=1e-3)
    assert frechet_distance(Flat(), real, real) == pytest.approx(0.0, abs=1e-3)
    found = frechet(normal_of(real.flatten(1)), torch.randn(4000, 4, generator=generator))
    assert found.frechet < 0.05
    assert 0 < found.frechet_se < 0.05


def test_samples_that_are_not_finite_have_no_frechet_distance() -> None:
    broken = torch.full((4, 1, 2, 2), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(Flat(), torch.zeros(4, 1, 2, 2), broken)


def test_samples_do_not_depend_on_the_batch_size() -> None:
    model = closed_form("gaussian-2d")
    whole, parts = (batches.sample(cell(batch_size=size, dtype="float64"), model, 40) for size in (40, 7))
    assert torch.allclose(whole[0], parts[0], atol=1e-12)
    for cost in (whole[1], parts[1]):
        assert cost["forwards"].tolist() == [2.0] * 40


def test_what_may_come_out_differently_is_tried_again(tmp_path: Path) -> None:
    statuses = ("ok", "refused", "diverged", "skipped", "timeout", "oom", "error")
    ids = {status: f"{number:016x}" for number, status in enumerate(statuses)}
    for status, hexadecimal in ids.items():
        append_line(
            tmp_path / "records.jsonl", {"cell_id": hexadecimal, "status": status, "model": "meanflow"}
        )
    folder = RunFolder(tmp_path, resume=True)
    assert [s for s in statuses if folder.claim(ids[s]) == "done"] == ["ok", "refused", "diverged"]
    folder.close()
