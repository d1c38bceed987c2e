"""Tables of a run: the published shape (methods against steps, bits/dim / Fréchet) and one line per cell with its
accuracy and cost, as Markdown, LaTeX and CSV.

Nothing is measured here: `tables` arranges records, `render` writes them down, the report takes the same tables.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flowlik import view

FORMATS: Final = ("md", "latex", "csv")
MANY_STEPS: Final = 16
"""Fixed steps from which a solution stands in the column of the adaptive ones."""
MASS_WITHIN: Final = 0.05
"""How far from 1 a mass may be before the report marks it."""
_ALIASES: Final = {"markdown": "md", "tex": "latex"}

CSV_COLUMNS: Final[tuple[str, ...]] = (
    *(
        "task",
        "split",
        "method",
        "estimator",
        "estimator_label",
        "model",
        "steps",
        "status",
        "reason",
        "n_items",
    ),
    *("dim", "eps", "nfe_mean", "vjp_mean", "jvp_mean", "work", "forward_equivalents", "items_per_s"),
    *("wall_s_median", "wall_s_iqr", "peak_bytes", "bpd", "bpd_se", "bpd_ref", "ref_id", "ref_se"),
    *("bpd_error", "bpd_error_lo", "bpd_error_hi", "bpd_mae", "bpd_mae_lo", "bpd_mae_hi", "bpd_rmse"),
    *("bpd_err_p95", "spearman", "stderr_mean", "coverage95", "invalid_share", "mass", "cycle_error"),
    *("frechet", "frechet_se", "extractor", "n_samples", "dtype", "device", "batch_size", "seed", "repeat"),
    *("model_hash", "data_hash", "cell_id"),
)


@dataclass(frozen=True)
class Cell:
    """What a cell says, the number it is sorted by (None: by its text), what is wrong with it (the report marks it and
    shows these words), and whether it was printed in a paper and not measured here (shown in grey)."""

    text: str
    value: float | None = None
    flag: str = ""
    published: bool = False


@dataclass(frozen=True)
class Table:
    """Header and lines; the first `names` columns hold words, the others numbers. `note` stands under the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 2
    note: str = ""


def tables(records: pd.DataFrame) -> list[Table]:
    """Per task and split the published shape, the detailed one, that beside published values and those of samples and
    uses, where there are any."""
    from flowlik.published import beside_published
    from flowlik.use_tables import use_tables

    usable = view.averaged(view.usable(view.prepare(records)))
    found: list[Table] = []
    for task in sorted(usable["task"].unique()):
        of_task = usable[usable["task"] == task]
        for split in view.splits(of_task):
            frame = of_task[of_task["split"] == split]
            likelihoods = frame[frame["bpd"].notna()]
            found += [by_steps(likelihoods), in_detail(likelihoods)] if len(likelihoods) else []
            found += beside_published(likelihoods)
            found += use_tables(frame)
    return found


def by_steps(frame: pd.DataFrame) -> Table:
    """Methods against steps for one task and split: bits/dim, and the Fréchet distance where it was measured, with
    their spread over seeds where there are several."""
    shown = frame[frame["method"] != "control"]
    few = shown["steps"] < MANY_STEPS
    steps = sorted({int(s) for s in shown.loc[few, "steps"]}, reverse=True)
    many = not few.all()
    cells: dict[tuple[str, str], dict[int | None, dict[str, Any]]] = {}
    for row in view.as_dicts(shown):
        at = int(row["steps"]) if row["steps"] < MANY_STEPS else None
        cells.setdefault((row["row"] if at is None else row["series"], row["model"]), {})[at] = row
    frechet = bool(shown["frechet"].notna().any())
    rows = [
        (
            Cell(name),
            Cell(model),
            *([_bpd_and_frechet(by_step.get(None), frechet)] if many else []),
            *(_bpd_and_frechet(by_step.get(at), frechet) for at in steps),
        )
        for (name, model), by_step in cells.items()
    ]
    heads = [f"{at} step{'' if at == 1 else 's'}" for at in steps]
    extractors = ", ".join(sorted(set(shown["extractor"]) - {""}))
    name = view.distance_names(shown)
    note = f"Cells: bits/dim / {name} ({extractors})." if frechet else "Cells: bits/dim."
    return Table(
        title=f"{_title(frame)}: bits/dim{f' / {name}' if frechet else ''} by steps",
        columns=("method", "model", *([f"adaptive or ≥ {MANY_STEPS} steps"] if many else []), *heads),
        rows=tuple(rows),
        note=f"{_reference(frame)} {note} {seeds_note(shown)}".strip(),
    )


def in_detail(frame: pd.DataFrame) -> Table:
    """One line per cell of one task and split, controls last; a column that holds nothing is left out."""
    varies = bool(frame["spearman"].notna().any())  # a constant is right where the truth is constant
    constant = (
        frame.loc[frame["estimator"] == "control-mean", "bpd_mae"] if varies else frame["bpd_mae"].head(0)
    )
    rows = view.as_dicts(frame.assign(control=constant.iloc[0] if len(constant) else math.nan))
    columns = [
        (head, cell)
        for head, cell, needs in _DETAIL
        if frame[needs].notna().any() and (needs != "n_items" or len(set(frame[needs])) > 1)
    ]
    lines = tuple(
        (
            Cell(row["row"]),
            Cell("" if row["method"] == "control" else row["model"]),
            *(c(row) for _, c in columns),
        )
        for row in rows
    )
    return Table(
        title=f"{_title(frame)}: accuracy and cost",
        columns=("method", "model", *(head for head, _ in columns)),
        rows=lines,
        note=f"{_reference(frame)} Brackets: 95 % bootstrap intervals. {seeds_note(frame)}".strip(),
    )


def seeds_note(frame: pd.DataFrame) -> str:
    """What stands under a table whose numbers are means over seeds; empty where none is."""
    seeds = int(frame["n_seeds"].max()) if "n_seeds" in frame and len(frame) else 1
    if seeds < 2:
        return ""
    return f"Means over up to {seeds} seeds and repeats; ± is the standard deviation over them."


def render(df: pd.DataFrame, format: str) -> str:
    """The tables of records as text.

    Args:
        df: records as `read_records` gives them.
        format: `md`, `latex` or `csv` (one line per record, failed ones too; raw numbers).

    Raises:
        ValueError: the format is none of these.
    """
    known = _ALIASES.get(format, format)
    if known not in FORMATS:
        raise ValueError(f"unknown format {format!r} (valid: {', '.join(FORMATS)})")
    if known == "csv":
        return _csv(view.prepare(df))
    write = _markdown if known == "md" else _latex
    found = tables(df)
    return "\n".join(write(table) for table in found) if found else _nothing(known)


def write_tables(run_dir: Path) -> list[Path]:
    """Write `table.md`, `table.tex` and `table.csv` of a run into its folder; their paths."""
    records = view.load(run_dir)
    written = []
    for name, form in (("table.md", "md"), ("table.tex", "latex"), ("table.csv", "csv")):
        path = run_dir / name
        path.write_text(render(records, form), encoding="utf-8")
        written.append(path)
    return written


# ------------------------------------------------------------------------------------------------------------ cells


def _bpd_and_frechet(row: dict[str, Any] | None, frechet: bool) -> Cell:
    if row is None or math.isnan(row["bpd"]):
        return Cell("–")
    text = view.with_spread(view.fixed(row["bpd"], 3), row.get("bpd_sd"))
    distance = view.with_spread(view.number(row["frechet"]), row.get("frechet_sd"))
    return Cell(f"{text} / {distance}" if frechet else text, row["bpd"])


def _number(column: str, digits: int = 3) -> Callable[[dict[str, Any]], Cell]:
    return lambda row: Cell(view.number(row[column], digits), _value(row[column]))


def _fixed(column: str, places: int) -> Callable[[dict[str, Any]], Cell]:
    return lambda row: Cell(view.fixed(row[column], places), _value(row[column]))


def _with_spread(column: str, text: Callable[[float], str]) -> Callable[[dict[str, Any]], Cell]:
    return lambda row: Cell(view.with_spread(text(row[column]), row.get(f"{column}_sd")), _value(row[column]))


def _interval(column: str) -> Callable[[dict[str, Any]], Cell]:
    def cell(row: dict[str, Any]) -> Cell:
        value, low, high = row[column], row[f"{column}_lo"], row[f"{column}_hi"]
        text = view.number(value, 2)
        if math.isfinite(low) and math.isfinite(high) and high > low:
            text += f" [{view.number(low, 2)}, {view.number(high, 2)}]"
        return Cell(text, _value(value))

    return cell


def _error(row: dict[str, Any]) -> Cell:
    cell = _interval("bpd_mae")(row)
    worse = row["method"] != "control" and row["bpd_mae"] > row["control"] > 0
    return replace(cell, flag="larger than that of control-mean, a constant") if worse else cell


def mass_cell(row: dict[str, Any], digits: int = 4) -> Cell:
    """The mass, with its standard error where it was sampled; marked where it differs from 1 by more than chance."""
    cell = _number("mass", digits)(row)
    known = row.get("mass_se")
    error = 0.0 if known is None or math.isnan(known) else float(known)
    text = cell.text + (f" ± {view.number(error, 2)}" if error else "")
    off = abs(row["mass"] - 1) > MASS_WITHIN + 2 * error
    return replace(cell, text=text, flag="not within 0.05 of 1" if off else "")


def _count(column: str) -> Callable[[dict[str, Any]], Cell]:
    def cell(row: dict[str, Any]) -> Cell:
        value = row[column]
        whole = math.isfinite(value) and float(value).is_integer()
        return Cell(f"{int(value)}" if whole else view.number(value), _value(value))

    return cell


def _milliseconds(row: dict[str, Any]) -> Cell:
    rate = row["items_per_s"]
    value = 1e3 / rate if rate > 0 else math.nan
    return Cell(view.number(value), _value(value))


def _value(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


_DETAIL: Final[tuple[tuple[str, Callable[[dict[str, Any]], Cell], str], ...]] = (
    ("items", _count("n_items"), "n_items"),
    ("NFE", _count("nfe_mean"), "nfe_mean"),
    ("bits/dim", _with_spread("bpd", view.fixed), "bpd"),
    ("mean |error|", _error, "bpd_mae"),
    ("bias", _interval("bpd_error"), "bpd_error"),
    ("p95 |error|", _number("bpd_err_p95", 2), "bpd_err_p95"),
    ("Spearman", _fixed("spearman", 3), "spearman"),
    ("coverage", _fixed("coverage95", 2), "coverage95"),
    ("invalid", _number("invalid_share", 2), "invalid_share"),
    ("mass", mass_cell, "mass"),
    ("Fréchet", _with_spread("frechet", view.number), "frechet"),
    ("work", _count("work"), "work"),
    ("forward-equivalents", _number("forward_equivalents"), "forward_equivalents"),
    ("ms/sample", _milliseconds, "items_per_s"),
    ("cycle error", _number("cycle_error", 2), "cycle_error"),
)


def _title(frame: pd.DataFrame) -> str:
    return f"{frame['task'].iloc[0]}, {view.split_title(frame['split'].iloc[0])}"


def _reference(frame: pd.DataFrame) -> str:
    row = view.reference(frame)
    if row is None:
        return "No reference."
    error = f" ± {view.number(row['ref_se'], 1)}" if row["ref_se"] > 0 else ""
    several = frame.loc[frame["bpd_ref"].notna(), "n_items"].min() < row["n_items"]
    fewer = " (cells on fewer items have their own)" if several else ""
    origin = f" ({row['ref_id']})" if row["ref_id"] else ""
    return f"Reference {view.fixed(row['bpd_ref'], 3)}{error} bits/dim{origin}, {row['n_items']:.0f} items{fewer}."


# ---------------------------------------------------------------------------------------------------------- formats


def _nothing(known: str) -> str:
    return "No results yet.\n" if known == "md" else "% no results yet\n"


def _markdown(table: Table) -> str:
    lines = [[_md_cell(cell) for cell in row] for row in table.rows]
    heads = [_md(head) for head in table.columns]
    widths = [max(3, *(len(line[k]) for line in [heads, *lines])) for k in range(len(heads))]

    def line(texts: Sequence[str]) -> str:
        padded = [
            t.ljust(w) if k < table.names else t.rjust(w)
            for k, (t, w) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * w if k < table.names else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    body = "\n".join([line(heads), line(rule), *(line(texts) for texts in lines)])
    return f"### {_md(table.title)}\n\n{body}\n\n{_md(table.note)}\n"


def _md_cell(cell: Cell) -> str:
    text = _md(cell.text)
    return f"*{text}*" if cell.published and text else text


def _md(text: str) -> str:
    text = " ".join(text.split())
    return (
        re.sub(r"([\\`*|\[\]])", r"\\\1", text)
        .replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
    )


def _latex(table: Table) -> str:
    align = "l" * table.names + "r" * (len(table.columns) - table.names)
    heads = " & ".join(_tex(head) for head in table.columns)
    body = "\n".join(" & ".join(_tex_cell(cell) for cell in row) + r" \\" for row in table.rows)
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            r"\small",
            rf"\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            heads + r" \\",
            r"\midrule",
            *([body] if body else []),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


_TEX: Final = {
    **{"\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%"},
    **{
        "_": r"\_",
        "^": r"\textasciicircum{}",
        "~": r"\textasciitilde{}",
        "|": r"$|$",
        "<": r"$<$",
        ">": r"$>$",
    },
    **{"−": "$-$", "–": "--", "×": r"$\times$", "±": r"$\pm$", "·": r"$\cdot$", "∞": r"$\infty$"},
    **{"ρ": r"$\rho$", "…": r"\ldots{}", "≥": r"$\geq$", "≤": r"$\leq$", "é": r"\'e", "[": "{[}", "]": "{]}"},
}


def _tex_cell(cell: Cell) -> str:
    text = _tex(cell.text)
    return rf"\textcolor{{gray}}{{{text}}}" if cell.published and text else text


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


def _csv(frame: pd.DataFrame) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in view.as_dicts(frame):
        writer.writerow([_plain(row[name]) for name in CSV_COLUMNS])
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return ""
    return int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)
