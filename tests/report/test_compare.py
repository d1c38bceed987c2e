"""Two runs beside each other, item by item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import record, write_fake_run, write_rows

from flowlik.records.reading import read_rows
from flowlik.report.compare import COLUMNS, compare_methods, compare_runs, summary
from flowlik.report.frame import averaged, load


def _run(folder: Path, offset: float, *, n: int = 400, noise_seed: int = 1, **known: object) -> Path:
    """One 2-D cell whose bits/dim are off by `offset` plus a little noise shared between runs."""
    rng = np.random.default_rng(0)
    ref = rng.standard_normal(n)
    noise = 0.01 * np.random.default_rng(noise_seed).standard_normal(n)
    log_prob = ref - (offset + noise) * 2 * math.log(2)
    write_rows(folder, [record(cell_id="c", bpd=1.0, bpd_mae=np.abs(offset + noise).mean(), **known)])
    (folder / "items").mkdir(exist_ok=True)
    np.savez(folder / "items" / "c.npz", log_prob=log_prob, ref=ref, valid=np.ones(n, dtype=bool))
    return folder


def test_a_run_differs_from_itself_by_nothing(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path, tasks=("gmm-2d",), n=50)
    frame = compare_runs(run_dir, run_dir)
    assert tuple(frame.columns) == COLUMNS
    paired = frame[frame["n_paired"] > 0]
    assert len(paired) > 20
    for column in ("bpd_diff", "bpd_diff_lo", "bpd_diff_hi", "mae_diff", "mae_diff_lo", "mae_diff_hi"):
        assert (paired[column] == 0).all()
    assert not frame["significant"].any()


def test_a_larger_error_is_found_with_its_size_and_interval(tmp_path: Path) -> None:
    base, new = _run(tmp_path / "a", 0.1), _run(tmp_path / "b", 0.15, noise_seed=2)
    row = compare_runs(base, new).iloc[0]
    assert row["mae_diff"] == pytest.approx(0.05, abs=0.003)
    assert row["mae_diff_lo"] < row["mae_diff"] < row["mae_diff_hi"]
    assert row["bpd_diff"] == pytest.approx(0.05, abs=0.003)
    assert row["significant"]
    assert "worse" in summary(compare_runs(base, new))
    assert "better" in summary(compare_runs(new, base))


def test_noise_of_the_same_size_is_not_significant(tmp_path: Path) -> None:
    base, new = _run(tmp_path / "a", 0.0, noise_seed=1), _run(tmp_path / "b", 0.0, noise_seed=3)
    row = compare_runs(base, new).iloc[0]
    assert row["mae_diff_lo"] < 0 < row["mae_diff_hi"]
    assert not row["significant"]


def test_other_items_are_never_paired(tmp_path: Path) -> None:
    base = _run(tmp_path / "a", 0.1, data_hash="one")
    moved = _run(tmp_path / "c", 0.1, data_hash="one")
    stored = dict(np.load(moved / "items" / "c.npz"))
    np.savez(moved / "items" / "c.npz", **stored | {"ref": stored["ref"] + 1})
    for name, new in {
        "other items (data hash)": _run(tmp_path / "b", 0.1, data_hash="two"),
        "other references": moved,
    }.items():
        row = compare_runs(base, new).iloc[0]
        assert row["note"] == name
        assert row["n_paired"] == 0
        assert math.isnan(row["mae_diff"])
        assert not row["significant"]


def test_the_items_that_both_have_are_paired_although_one_run_took_fewer(tmp_path: Path) -> None:
    base = _run(tmp_path / "a", 0.1, data_hash="one")
    new = _run(tmp_path / "b", 0.15, n=300, noise_seed=2, data_hash="one")
    for first, second, sign in ((base, new, 1), (new, base, -1)):
        row = compare_runs(first, second).iloc[0]
        assert (row["n_paired"], row["note"]) == (300, "")
        assert row["mae_diff"] == pytest.approx(sign * 0.05, abs=0.003)


def test_a_difference_names_the_items_whose_errors_are_known(tmp_path: Path) -> None:
    runs = (_run(tmp_path / "a", 0.1), _run(tmp_path / "b", 0.15, noise_seed=2))
    for run_dir in runs:
        stored = dict(np.load(run_dir / "items" / "c.npz"))
        stored["ref"][60:] = np.nan  # a solved reference of the first items alone
        np.savez(run_dir / "items" / "c.npz", **stored)
        (known,) = read_rows(run_dir)
        errors = np.abs(stored["log_prob"] - stored["ref"])[:60] / 2 / math.log(2)
        write_rows(run_dir, [known | {"bpd_mae": errors.mean(), "bpd_error": errors.mean()}])
    row = compare_runs(*runs).iloc[0]
    assert row["note"] == ""
    assert row["n_paired"] == 60
    assert row["mae_diff"] == pytest.approx(0.05, abs=0.003)


def test_two_methods_of_one_run_are_compared_item_by_item(tmp_path: Path) -> None:
    ref = np.random.default_rng(0).standard_normal(200)
    (tmp_path / "items").mkdir()
    rows = []
    for name, model, offset in (
        ("f2d2[steps=1]", "a", 0.3),
        ("f2d2[steps=8]", "a", 0.1),
        ("f2d2[steps=8]", "b", 0.2),
    ):
        cell = f"{name}-{model}"
        rows.append(record(cell_id=cell, estimator_label=name, model=model, bpd=1.0, bpd_mae=offset))
        np.savez(tmp_path / "items" / f"{cell}.npz", log_prob=ref - 2 * math.log(2) * offset, ref=ref)
    write_rows(tmp_path, rows)
    frame = compare_methods(tmp_path, "f2d2[steps=1]", "f2d2[steps=8]@b")
    (row,) = frame.to_dict("records")
    assert (row["estimator_label"], row["model"]) == ("f2d2[steps=1] -> f2d2[steps=8]", "a -> b")
    assert row["mae_diff"] == pytest.approx(-0.1)
    assert len(compare_methods(tmp_path, "f2d2[steps=8]", "f2d2[steps=8]")) == 2
    with pytest.raises(ValueError, match="f2d2\\[steps=8\\]"):
        compare_methods(tmp_path, "f2d2[steps=1]", "f2d2[steps=3]")


def _sizes(folder: Path, *sizes: int) -> Path:
    """One method on several numbers of items."""
    write_rows(folder, [record(cell_id=f"c{n}", n_items=n, seed=0) for n in sizes])
    return folder


def test_no_row_is_lost_where_runs_differ_in_their_numbers_of_items(tmp_path: Path) -> None:
    new = _sizes(tmp_path / "new", 100, 200)
    for base, notes in ((_sizes(tmp_path / "some", 50), 1), (_sizes(tmp_path / "none"), 2)):
        frame = compare_runs(base, new)
        assert len(frame) == 2
        assert (frame["note"] == "only in new").sum() == notes


def test_methods_are_compared_seed_by_seed(tmp_path: Path) -> None:
    labels = {"a": "f2d2[steps=1]", "b": "f2d2[steps=2]"}
    rows = [
        record(cell_id=f"{name}{seed}", estimator_label=label, seed=seed)
        for name, label in labels.items()
        for seed in range(3)
    ]
    write_rows(tmp_path, rows)
    assert len(compare_methods(tmp_path, *labels.values())) == 3


def test_cells_of_one_run_only_and_changed_statuses_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [record(cell_id="x", task="gmm-2d"), record(cell_id="y", task="thin-2d")])
    broken = record(cell_id="x", task="gmm-2d", status="diverged", reason="no finite value")
    write_rows(tmp_path / "b", [broken, record(cell_id="z", task="digits")])
    notes = compare_runs(tmp_path / "a", tmp_path / "b").set_index("task")["note"].to_dict()
    assert notes == {"gmm-2d": "status changed", "thin-2d": "only in base", "digits": "only in new"}


def test_dequantisation_draws_are_compared_draw_by_draw(tmp_path: Path) -> None:
    ref = np.array([[0.0, 0.0], [10.0, np.nan]])
    for name, shift in (("a", 0.0), ("b", -2 * math.log(2))):
        write_rows(tmp_path / name, [record(cell_id="c", bpd=1.0)])
        (tmp_path / name / "items").mkdir()
        draws = np.array([[shift, shift], [10.0 + shift, 99.0]])
        arrays = {"log_prob": draws.mean(axis=0), "ref": ref[0], "log_prob_draws": draws, "ref_draws": ref}
        np.savez(tmp_path / name / "items" / "c.npz", valid=np.ones(2, dtype=bool), **arrays)
    assert compare_runs(tmp_path / "a", tmp_path / "b")["mae_diff"].iloc[0] == pytest.approx(1.0)


def test_a_folder_without_records_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="records"):
        compare_runs(tmp_path / "none", tmp_path / "none")


@pytest.mark.parametrize("says", [{"bpd_mae": 0.2}, {"bpd": 2.0, "bpd_ref": 1.0, "bpd_error": 1.0}])
def test_a_record_that_says_other_errors_than_its_items_claims_nothing(
    tmp_path: Path, says: dict[str, float]
) -> None:
    base, new = _run(tmp_path / "a", 0.1), _run(tmp_path / "b", 0.1)
    rows = [row | {"bpd_mae": 1.0} | says for row in read_rows(new)]
    write_rows(new, rows)
    row = compare_runs(base, new).iloc[0]
    assert "items that are not those of the record c" in row["note"]
    assert not row["significant"]
    assert row["n_paired"] == 0


OTHER: dict[str, Any] = {
    "model_hash": "retrained",
    "data_hash": "other rows",
    "ref_id": "another",
    "eps": 0.1,
    "dequant_draws": 4,
    "estimator_version": 2,
    "seed": 0,
}


@pytest.mark.parametrize("name", OTHER)
def test_only_seeds_of_one_thing_are_averaged(tmp_path: Path, name: str) -> None:
    known = {"model_hash": "m", "data_hash": "d", "ref_id": "r", "eps": 0.0, "dequant_draws": 1}
    known |= {"estimator_version": 1, "bpd": 1.0, "bpd_mae": 0.1}
    rows = [record(**known, cell_id=f"c{k}", seed=k, created_utc=f"2026-01-0{k + 2}") for k in range(2)]
    write_rows(tmp_path, rows)
    assert averaged(load(tmp_path))["n_seeds"].tolist() == [2.0]
    other = {"seed": 2, "bpd_mae": 0.7} | {name: OTHER[name]}
    write_rows(tmp_path, [*rows, record(**known | other, cell_id="old", created_utc="2026-01-01")])
    with pytest.warns(UserWarning, match=r"1 records are no further seeds .*, first old"):
        frame = averaged(load(tmp_path))
    assert frame[["n_seeds", "bpd_mae"]].values.tolist() == [[2.0, pytest.approx(0.1)]]
    write_rows(tmp_path, [*rows, record(**known | other, cell_id="new", created_utc="2026-01-09")])
    with pytest.warns(UserWarning, match=r"(1|2) records are no further seeds .*, first c0"):
        frame = averaged(load(tmp_path))
    assert frame["bpd_mae"].iloc[0] == pytest.approx(0.4 if name == "seed" else 0.7)
