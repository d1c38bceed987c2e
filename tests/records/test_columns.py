"""The table of columns keeps its order, and every list that derives from it is sound."""

from __future__ import annotations

from flowlik.checks.reproduce import COUNTED
from flowlik.measures import MEASURES
from flowlik.records import columns
from flowlik.records.columns import BY_NAME, COLUMNS, DERIVED, EXTRA, TABLE, axis_label, head
from flowlik.report import compare, frame
from flowlik.report.tables.accuracy import shown
from flowlik.report.tables.columns import as_markdown

FIRST = """
schema_version run_id cell_id created_utc repeat
estimator estimator_label family params steps solver rtol atol trace probes noise
task model model_hash data_hash split n_items dim batch_size dtype device seed compiled estimator_version
status reason
nfe_mean nfe_max vjp_mean jvp_mean work wall_s_median wall_s_iqr cpu_s_median rounds forward_equivalents items_per_s
peak_bytes
eps bpd bpd_se bpd_ref ref_id ref_se bpd_error bpd_error_lo bpd_error_hi bpd_mae bpd_mae_lo bpd_mae_hi bpd_rmse
bpd_err_p95 spearman stderr_mean coverage95 invalid_share mass mass_se cycle_error dequant_draws
frechet frechet_se extractor n_samples kid precision recall
extra env_id
"""
"""Columns of the first records of schema 1: their order stays, others may come between."""


def test_the_first_columns_keep_their_order() -> None:
    assert [name for name in COLUMNS if name in FIRST.split()] == FIRST.split()
    assert columns.SCHEMA_VERSION == 1


def test_names_and_places_are_there_once() -> None:
    assert len(BY_NAME) == len(TABLE) + len(EXTRA) + len(DERIVED)
    placed = [column.csv for column in TABLE if column.csv is not None]
    assert len(placed) == len(set(placed))
    places = [column.place for column in shown() if column.place != columns.LAST]
    assert len(places) == len(set(places))


def test_groups_stand_together() -> None:
    assert tuple(name for group in columns.COLUMN_GROUPS.values() for name in group) == COLUMNS


def test_every_column_says_what_it_means_and_limits_are_in_order() -> None:
    for column in BY_NAME.values():
        assert column.meaning.endswith("."), column.name
        if column.low is not None and column.high is not None:
            assert column.low < column.high, column.name
        if column.better != "none" or (column.head and column.name != "flags"):  # flags are words on numbers
            assert column.kind == "number", column.name


def test_what_is_measured_counted_and_compared_comes_out_of_the_table() -> None:
    assert {"bpd_mae", "work", "mass", "frechet"} <= set(MEASURES)
    assert not {"task", "eps", "n_items"} & set(MEASURES)
    assert COUNTED == ("nfe_mean", "nfe_max", "vjp_mean", "jvp_mean", "work")
    assert set(compare.PAIRED) == {"bpd", "mae"}
    assert set(compare.OTHERS) == {"nfe", "work", "frechet"}
    assert frame.SPREAD == ("bpd", "frechet", "kid", "precision", "recall")
    assert frame.SPREAD_EXTRA == ("energy_distance", "samples_bpd")


def test_labels_hold_the_unit_unless_they_are_it() -> None:
    assert axis_label("bpd_mae") == "mean |error| (bits/dim)"
    assert axis_label("bpd") == "bits/dim"
    assert axis_label("nfe_mean", "\n") == "NFE\n(forwards per sample)"
    assert axis_label("samples_bpd") == "bits/dim of the samples"
    assert (head("bpd_mae"), head("kid")) == ("mean |error|", "kernel distance")


def test_the_list_has_every_column_and_no_empty_head() -> None:
    text = as_markdown()
    assert all(f"`{name}`" in text for name in (*COLUMNS, *(column.name for column in EXTRA)))
    assert "| column | meaning |" in text
    assert "| column | unit | better | meaning |" in text
