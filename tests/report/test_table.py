"""Tables: known values in the published shape, and text that stays what it is in every format."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pandas as pd
import pytest
from fake_run import record, write_fake_run, write_rows

from flowlik.records.reading import read_records
from flowlik.report.tables import formats, run

CONTROL = {
    "estimator": "control-mean",
    "estimator_label": "control-mean",
    "family": "control",
    "steps": None,
}


def _records(tmp_path: Path, rows: list[dict[str, object]]) -> pd.DataFrame:
    write_rows(tmp_path, rows)
    return read_records(tmp_path)


def _known(tmp_path: Path) -> pd.DataFrame:
    published = {8: (2.38, 3.78), 4: (1.34, 4.37), 2: (1.63, 2.59), 1: (3.51, 3.02)}
    rows = [
        record(
            cell_id=f"f{n}",
            steps=n,
            estimator_label=f"f2d2[steps={n}]",
            bpd=bpd,
            frechet=distance,
            nfe_mean=n,
        )
        | {
            "bpd_mae": 0.08,
            "bpd_mae_lo": 0.07,
            "bpd_mae_hi": 0.095,
            "work": n,
            "forward_equivalents": 1.1 * n,
        }
        | {"spearman": 0.985, "bpd_ref": 3.12, "extractor": "inception-v3"}
        for n, (bpd, distance) in published.items()
    ]
    return _records(tmp_path, rows)


def test_discrete_data_have_a_bound_and_what_several_draws_say_together(tmp_path: Path) -> None:
    row = record(cell_id="a", bpd=2.834) | {"dequant_draws": 64, "bpd_mae": 0.01, "bpd_ref": 2.83}
    row["extra"] = {"bpd_iw": 2.7892, "bpd_iw_error": 0.0021}
    continuous = record(cell_id="b", bpd=1.0, split="teacher-samples") | {"bpd_mae": 0.01, "bpd_ref": 1.0}
    found = [t for t in run.tables(_records(tmp_path, [row, continuous])) if "accuracy and cost" in t.title]
    (discrete, other) = sorted(found, key=lambda table: "bound" not in table.note)
    assert "Bits/dim of discrete data are a bound" in discrete.note
    at = discrete.columns.index("bits/dim, importance-weighted, K draws")
    assert discrete.rows[0][at].text == "2.789 ± 0.002, K = 64"
    assert "bound" not in other.note
    assert not any("importance-weighted" in head for head in other.columns)


def test_rows_are_methods_and_columns_are_falling_steps(tmp_path: Path) -> None:
    by_steps = run.tables(_known(tmp_path))[0]
    assert by_steps.columns == ("method", "model", "8 steps", "4 steps", "2 steps", "1 step")
    assert [cell.text for cell in by_steps.rows[0]] == [
        *("F2D2", "meanflow-f2d2"),
        *("2.380 / 3.78", "1.340 / 4.37", "1.630 / 2.59", "3.510 / 3.02"),
    ]


def test_the_detail_holds_error_with_interval_rank_correlation_and_costs(tmp_path: Path) -> None:
    detail = run.tables(_known(tmp_path))[1]
    first = dict(zip(detail.columns, (cell.text for cell in detail.rows[0]), strict=True))
    assert first["method"] == "F2D2, 1 step"
    assert first["mean |error|"] == "0.080 [0.070, 0.095]"
    assert (first["Spearman"], first["NFE"], first["work"], first["forward-equivalents"]) == (
        "0.985",
        "1",
        "1",
        "1.10",
    )
    assert "mass" not in detail.columns
    assert "3.120" in detail.note


def test_an_error_above_the_constant_is_flagged(tmp_path: Path) -> None:
    rows = [
        record(cell_id="good", bpd=1.0, bpd_mae=0.1, spearman=0.9),
        record(cell_id="bad", bpd=1.0, bpd_mae=0.3, estimator_label="f2d2[steps=1]", steps=1),
        record(cell_id="control", bpd=1.0, bpd_mae=0.2, **CONTROL),
    ]
    detail = run.tables(_records(tmp_path, rows))[1]
    flags = {row[0].text: row[detail.columns.index("mean |error|")].flag for row in detail.rows}
    assert [bool(flags[name]) for name in ("F2D2, 4 steps", "F2D2, 1 step", "control-mean")] == [
        False,
        True,
        False,
    ]


def test_the_best_constant_is_what_an_error_has_to_beat(tmp_path: Path) -> None:
    median = CONTROL | {"estimator": "control-median", "estimator_label": "control-median"}
    rows = [
        record(cell_id="between", bpd=1.0, bpd_mae=0.19, spearman=0.9),
        record(cell_id="mean", bpd=1.0, bpd_mae=0.2, **CONTROL),
        record(cell_id="median", bpd=1.0, bpd_mae=0.18, **median),
    ]
    detail = run.tables(_records(tmp_path, rows))[1]
    flags = {row[0].text: row[detail.columns.index("mean |error|")].flag for row in detail.rows}
    assert [bool(flags[name]) for name in ("F2D2, 4 steps", "control-mean", "control-median")] == [
        True,
        False,
        False,
    ]


def test_tables_show_the_error_of_all_items(tmp_path: Path) -> None:
    known = {"bpd_mae_all": 0.5, "bpd_mae_all_lo": 0.4, "bpd_mae_all_hi": 0.6, "invalid_share": 0.4}
    rows = [
        record(cell_id="some", bpd=1.0, bpd_mae=0.1, bpd_mae_lo=0.09, bpd_mae_hi=0.11, **known),
        record(cell_id="all", bpd=1.0, bpd_mae=0.2, estimator_label="f2d2[steps=1]", steps=1),
    ]
    detail = run.tables(_records(tmp_path, rows))[1]
    texts = {row[0].text: row[detail.columns.index("mean |error|")].text for row in detail.rows}
    assert texts == {"F2D2, 4 steps": "0.50 [0.40, 0.60]", "F2D2, 1 step": "0.20"}


def test_nothing_is_flagged_where_the_truth_is_constant(tmp_path: Path) -> None:
    rows = [record(cell_id="a", bpd=1.0, bpd_mae=0.1), record(cell_id="c", bpd=1.0, bpd_mae=1e-6, **CONTROL)]
    detail = run.tables(_records(tmp_path, rows))[1]
    assert not any(cell.flag for row in detail.rows for cell in row)


def test_markdown_is_a_table_with_a_column_per_head(tmp_path: Path) -> None:
    text = run.render(_known(tmp_path), "md")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in lines[:3]}) == 1
    assert "2.380 / 3.78" in text


def test_latex_balances_its_environments_and_columns(tmp_path: Path) -> None:
    text = run.render(_known(tmp_path), "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"\begin{tabular}{llrrrr}" in text
    assert text.isascii()


def test_csv_has_a_line_for_every_record_with_raw_numbers(tmp_path: Path) -> None:
    write_fake_run(tmp_path, tasks=("gmm-2d",), n=20)
    records = read_records(tmp_path)
    lines = list(csv.DictReader(io.StringIO(run.render(records, "csv"))))
    assert len(lines) == len(records)
    one = next(line for line in lines if line["estimator_label"] == "f2d2[steps=8]")
    wanted = records[(records["estimator_label"] == "f2d2[steps=8]") & (records["model"] == one["model"])]
    assert float(one["bpd"]) == wanted["bpd"].iloc[0]
    assert {line["status"] for line in lines} == {"ok", "refused", "timeout", "skipped"}


def test_hostile_names_are_escaped(tmp_path: Path) -> None:
    rows = [record(task="<script>|`x`", model="50% & $x_1 \\end{tabular}", bpd=1.0, bpd_ref=1.0, nfe_mean=4)]
    records = _records(tmp_path, rows)
    markdown, latex = run.render(records, "md"), run.render(records, "latex")
    assert "<script>" not in markdown
    assert r"\|\`x\`" in markdown
    assert r"50\% \& \$x\_1 \textbackslash{}end\{tabular\}" in latex


@pytest.mark.parametrize(
    ("form", "text"), [("md", "No results yet."), ("latex", "% no results yet"), ("csv", "task,split")]
)
def test_no_records_say_so(form: str, text: str) -> None:
    assert run.render(pd.DataFrame(), form).startswith(text)


def test_an_unknown_format_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="md, latex, csv"):
        run.render(pd.DataFrame(), "docx")


def test_rows_without_numbers_survive(tmp_path: Path) -> None:
    rows = [record(cell_id="a", bpd=None), record(cell_id="b", status="ok", steps=None, task=None, dim=None)]
    for form in formats.FORMATS:
        assert run.render(_records(tmp_path, rows), form)


def test_three_files_are_written(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(bpd=1.0)])
    assert [p.name for p in run.write_tables(tmp_path)] == ["table.md", "table.tex", "table.csv"]
    assert "F2D2" in (tmp_path / "table.md").read_text()
