"""LaTeX tables are no wider than a text column or a page, whatever stands in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from fake_run import record, write_fake_run, write_rows

from flowlik.records.reading import read_records
from flowlik.report.tables.latex import COLUMN_GAP, WIDTHS, latex, text_width
from flowlik.report.tables.run import render
from flowlik.report.tables.table import Cell, Table

LONG = "shortcut_distillation_without_any_place_to_break_it_in_two"
SET = r"\\textcolor\{gray\}|\\shortstack\[[lr]\]|\\allowbreak"


def _rows(table: str) -> list[list[str]]:
    body = table.partition(r"\toprule")[2].partition(r"\bottomrule")[0].replace(r"\midrule", "")
    lines = [line for line in body.replace("\\\\\n", "\n").splitlines() if line.strip()]
    return [re.split(r"(?<!\\)&", line) for line in lines]


def _measured(table: str) -> float:
    """Points of a table: what its paragraphs are given, and the widest text of its other columns."""
    (spec,) = re.findall(r"\\begin\{tabular\}\{(.*)\}\n", table)
    kinds = re.findall(r"p\{([\d.]+)pt\}|([lr])(?=[lrp}]|$)", re.sub(r">\{.*?\}", "", spec))
    total = COLUMN_GAP * len(kinds)
    for k, (given, _) in enumerate(kinds):
        texts = [line for row in _rows(table) for line in re.split(r"\\\\", row[k])]
        plain = [re.sub(r"[{}\\$]", "", re.sub(r"\\[a-z]+", "M", re.sub(SET, "", text))) for text in texts]
        total += float(given) if given else max(map(text_width, plain))
    return total


def _tables(text: str) -> list[str]:
    return re.findall(r"\\begin\{table\*?\}.*?\\end\{table\*?\}", text, re.S)


def _awkward(tmp_path: Path) -> pd.DataFrame:
    known = {"bpd": 1.0, "bpd_ref": 1.0, "spearman": -0.5, "work": 1234567, "nfe_mean": 12345.678}
    interval = {"bpd_mae": 1.23456e-9, "bpd_mae_lo": 1.2e-9, "bpd_mae_hi": 1.3e-9}
    rows = [
        record(cell_id=f"{k}", model=f"{LONG}_{k}", task="t", steps=k + 1, n_items=30, mass=3.0)
        | known
        | interval
        | {"estimator_label": f"f2d2[steps={k + 1}]"}
        for k in range(60)
    ]
    write_rows(tmp_path, rows)
    return read_records(tmp_path)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "columns", [(), ("nfe_mean", "bpd", "bpd_mae", "bpd_error", "spearman", "mass", "flags")]
)
def test_no_table_is_wider_than_asked(tmp_path: Path, width: str, columns: tuple[str, ...]) -> None:
    found = _tables(render(_awkward(tmp_path), "latex", width=width, columns=columns))
    assert found
    assert all(_measured(table) <= WIDTHS[width] for table in found)
    assert all(
        table.startswith(r"\begin{table*}" if width == "page" else r"\begin{table}") for table in found
    )


def test_what_does_not_fit_goes_on_in_another_table_with_the_same_names() -> None:
    cells = [tuple(Cell(text, 1.0) for text in ["123456789012345"] * 9)] * 3
    rows = tuple((Cell(f"method {k}"), Cell("model"), *row) for k, row in enumerate(cells))
    table = Table("many", ("method", "model", *(f"measure {k}" for k in range(9))), rows)
    parts = _tables(latex(table, "column"))
    assert len(parts) > 1
    assert all(_measured(part) <= 345 for part in parts)
    assert all("method 2" in part for part in parts)
    assert [part.count(", continued.") for part in parts] == [0] + [1] * (len(parts) - 1)
    shown = re.findall(r"measure\\\\(\d)|measure (\d)", "".join(parts))
    assert [first or second for first, second in shown] == [str(k) for k in range(9)]


def test_lines_beyond_a_page_go_on_on_the_next() -> None:
    rows = tuple((Cell(f"method {k}"), Cell("model"), Cell("1", 1.0)) for k in range(100))
    parts = _tables(latex(Table("long", ("method", "model", "NFE"), rows), "column"))
    assert [len(_rows(part)) - 1 for part in parts] == [44, 44, 12]


def test_columns_methods_and_tasks_are_chosen_by_name(tmp_path: Path) -> None:
    write_fake_run(tmp_path, tasks=("gmm-2d", "thin-2d"), n=20)
    records = read_records(tmp_path)
    text = render(records, "latex", columns=["bpd_error", "nfe_mean"], methods=["f2d2"], tasks=["thin-2d"])
    (table,) = _tables(text)
    heads, *lines = _rows(table)
    assert [head.strip() for head in heads] == ["method", "model", "bias", "NFE"]
    assert {line[0].strip().partition(",")[0].partition("-")[0] for line in lines} == {"F2D2", "control"}
    assert "gmm-2d" not in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"columns": ["bits"]}, "nfe_mean, work, bpd_mae"),
        ({"methods": ["f3d3"]}, "f2d2"),
        ({"tasks": ["gmm-3d"]}, "gmm-2d"),
        ({"width": "3in"}, "column, page"),
    ],
)
def test_an_unknown_name_lists_the_valid_ones(
    tmp_path: Path, options: dict[str, str | list[str]], words: str
) -> None:
    write_rows(tmp_path, [record(task="gmm-2d", bpd=1.0)])
    with pytest.raises(ValueError, match=words) as found:
        render(read_records(tmp_path), "latex", **options)  # type: ignore[arg-type]
    assert "\n" not in str(found.value)


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex here: apt install texlive-latex-base"
)
@pytest.mark.parametrize("width", WIDTHS)
def test_latex_sets_every_table_without_a_line_too_long(tmp_path: Path, width: str) -> None:
    write_fake_run(tmp_path, tasks=("gmm-2d",), n=20)
    tables = render(read_records(tmp_path), "latex", width=width) + render(_awkward(tmp_path / "b"), "latex")
    begin = [r"\documentclass{article}", r"\usepackage{booktabs,array,xcolor}"]
    begin += [rf"\setlength{{\textwidth}}{{{WIDTHS[width]}pt}}", r"\begin{document}"]
    (tmp_path / "t.tex").write_text("\n".join([*begin, tables, r"\end{document}"]))
    command = ["pdflatex", "-interaction=nonstopmode", "-no-shell-escape", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    log = (tmp_path / "t.log").read_text(errors="replace")
    assert done.returncode == 0, [line for line in log.splitlines() if line.startswith("!")]
    assert "Overfull" not in log
    assert "too large" not in log
