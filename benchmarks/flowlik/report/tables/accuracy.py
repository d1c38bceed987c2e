"""Tables of likelihoods: by steps, and every row in detail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import pandas as pd

from flowlik.measures.registry import own_columns
from flowlik.records.columns import BY_NAME, DERIVED, TABLE, Column
from flowlik.report import frame as frames
from flowlik.report import labels, numbers
from flowlik.report.tables.table import Cell, Table, seeds_note

MANY_STEPS: Final = 16
"""Fixed steps from which a solution stands in the column of the adaptive ones."""

MASS_WITHIN: Final = 0.05
"""How far from 1 a mass may be before the report marks it."""

LEAST_COVERAGE: Final = 0.9
"""Below as large a share of items in their own 95 % error bars a row is marked."""

FEW_ITEMS: Final = 200
"""Below as many items an error bar of a mean is worth a warning."""

CONSTANTS: Final = ("control-mean", "control-median")


def by_steps(frame: pd.DataFrame) -> Table:
    """Methods against steps for one task and split: bits/dim, and the Fréchet distance where it was measured, with
    their spread over seeds where there are several."""
    shown = frame[frame["method"] != "control"]
    few = shown["steps"] < MANY_STEPS
    steps = sorted({int(s) for s in shown.loc[few, "steps"]}, reverse=True)
    many = not few.all()
    cells: dict[tuple[str, str], dict[int | None, dict[str, Any]]] = {}
    for row in labels.as_dicts(shown):
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
    name = labels.distance_names(shown)
    note = f"Cells: bits/dim / {name} ({extractors})." if frechet else "Cells: bits/dim."
    return Table(
        title=f"{_title(frame)}: bits/dim{f' / {name}' if frechet else ''} by steps",
        columns=("method", "model", *([f"adaptive, ≥ {MANY_STEPS} steps or none"] if many else []), *heads),
        rows=tuple(rows),
        note=f"{_reference(frame)} {note} {seeds_note(shown)}".strip(),
    )


def in_detail(frame: pd.DataFrame, names: Sequence[str] = ()) -> Table:
    """One line per cell of one task and split, controls last; a column that holds nothing is left out.

    With `names` of columns these, in their order.
    """
    frame = frames.with_times(frame)
    varies = bool(frame["spearman"].notna().any())  # a constant is right where the truth is constant
    constant = frame.loc[frame["estimator"].isin(CONSTANTS), "bpd_mae_all"].min() if varies else math.nan
    frame = frame.assign(control=constant)
    frame["flags"] = [flags(row) for row in labels.as_dicts(frame)]
    rows = labels.as_dicts(frame)
    columns = [column for column in shown() if _holds(frame, column.name)]
    if names:
        known = {column.name: column for column in shown()}
        columns = [known[name] for name in names]
    lines = tuple(
        (
            Cell(row["row"]),
            Cell("" if row["method"] == "control" else row["model"]),
            *(_detail(column)(row) for column in columns),
        )
        for row in rows
    )
    return Table(
        title=f"{_title(frame)}: accuracy and cost",
        columns=("method", "model", *(column.head for column in columns)),
        rows=lines,
        note=" ".join(
            filter(
                None,
                (_reference(frame), _bound(frame), "Brackets: 95 % bootstrap intervals.", seeds_note(frame)),
            )
        ),
        more=tuple(k for k, column in enumerate(columns, start=2) if not (column.main or names)),
        ids=tuple(row["cell_id"] for row in rows),
    )


def shown() -> tuple[Column, ...]:
    """The columns of the table of accuracy and cost, in its order; those of registered measures too."""
    columns = (*TABLE, *DERIVED, BY_NAME["bpd_iw"], *own_columns())
    placed = [(column.place, column) for column in columns if column.head and column.place is not None]
    return tuple(column for _, column in sorted(placed, key=lambda pair: pair[0]))


def _holds(frame: pd.DataFrame, name: str) -> bool:
    """Whether a column says anything; the number of items only where rows differ in it."""
    if name == "flags":
        return bool((frame[name] != "").any())
    return bool(frame[name].notna().any()) and (name != "n_items" or len(set(frame[name])) > 1)


# ------------------------------------------------------------------------------------------------------------ cells
def _bpd_and_frechet(row: dict[str, Any] | None, frechet: bool) -> Cell:
    if row is None or math.isnan(row["bpd"]):
        return Cell("–")
    text = numbers.with_spread(numbers.fixed(row["bpd"], 3), row.get("bpd_sd"))
    distance = numbers.with_spread(numbers.number(row["frechet"]), row.get("frechet_sd"))
    return Cell(f"{text} / {distance}" if frechet else text, row["bpd"])


def _detail(column: Column) -> Callable[[dict[str, Any]], Cell]:
    """How a column's values are written."""
    special = {"bpd_mae": _error, "mass": mass_cell, "flags": _flags, "bpd_iw": _weighted}.get(column.name)
    if special is not None:
        return special
    if column.form == "count":
        return _count(column.name)
    return lambda row: _plain(column, row)


def _plain(column: Column, row: dict[str, Any]) -> Cell:
    """A number with its interval where the row has one, or with its standard deviation over seeds."""
    value, low, high = (row.get(f"{column.name}{end}", math.nan) for end in ("", "_lo", "_hi"))
    write = numbers.fixed if column.form == "fixed" else numbers.number
    text = write(value, column.digits)
    if math.isfinite(low) and math.isfinite(high) and high > low:
        text += f" [{write(low, column.digits)}, {write(high, column.digits)}]"
    return Cell(numbers.with_spread(text, row.get(f"{column.name}_sd")), _value(value))


def _error(row: dict[str, Any]) -> Cell:
    """The error of all items, those without an answer included."""
    cell = _plain(replace(BY_NAME["bpd_mae"], name="bpd_mae_all"), row)
    return replace(cell, flag="larger than that of a constant") if _worse_than_a_constant(row) else cell


def _worse_than_a_constant(row: dict[str, Any]) -> bool:
    return bool(row["method"] != "control" and row["bpd_mae_all"] > row["control"] > 0)


def flags(row: dict[str, Any]) -> str:
    """What to beware of in a row, in a few words."""
    worse = ["worse than a constant"] if _worse_than_a_constant(row) else []
    return ", ".join([*worse, *(short for short, _ in beware_of(row))])


def beware_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    """What to beware of in a row besides its error, each in a few words and in a sentence's."""
    found = []
    if _mass_is_off(row):
        mass = numbers.number(row["mass"])
        found.append((f"mass {mass}", f"the density's mass is {mass}, not 1"))
    if row["coverage95"] < LEAST_COVERAGE:
        cover = f"{100 * row['coverage95']:.0f} %"
        found.append((f"bars cover {cover}", f"its error bars cover {cover} of items, not 95 %"))
    if row["invalid_share"] > 0:
        share = f"{100 * row['invalid_share']:.2g} %"
        found.append((f"{share} unanswered", f"{share} of items are not answered"))
    if row["n_items"] < FEW_ITEMS:
        items = f"{row['n_items']:.0f} items"
        found.append((items, f"judged on {items} only"))
    return found


def _flags(row: dict[str, Any]) -> Cell:
    return Cell(row["flags"] or "–")


def _mass_is_off(row: dict[str, Any]) -> bool:
    return bool(abs(row["mass"] - 1) > MASS_WITHIN + 2 * _mass_error(row))


def _mass_error(row: dict[str, Any]) -> float:
    known = row.get("mass_se")
    return 0.0 if known is None or math.isnan(known) else float(known)


def mass_cell(row: dict[str, Any], digits: int | None = None) -> Cell:
    """The mass, with its standard error where it was sampled; marked where it differs from 1 by more than chance."""
    cell = Cell(numbers.number(row["mass"], digits or BY_NAME["mass"].digits), _value(row["mass"]))
    error = _mass_error(row)
    text = cell.text + (f" ± {numbers.number(error, 2)}" if error else "")
    return replace(cell, text=text, flag="not within 0.05 of 1" if _mass_is_off(row) else "")


def _count(column: str) -> Callable[[dict[str, Any]], Cell]:
    def cell(row: dict[str, Any]) -> Cell:
        value = row[column]
        whole = math.isfinite(value) and float(value).is_integer()
        return Cell(f"{int(value)}" if whole else numbers.number(value), _value(value))

    return cell


def _value(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _title(frame: pd.DataFrame) -> str:
    return f"{frame['task'].iloc[0]}, {labels.split_title(frame['split'].iloc[0])}"


def _weighted(row: dict[str, Any]) -> Cell:
    """What several draws say together, and how many they are."""
    value = row["bpd_iw"]
    if not math.isfinite(value):
        return _plain(BY_NAME["bpd_iw"], row)
    error = numbers.number(row["extra"].get("bpd_iw_error", math.nan), 1)
    return Cell(f"{numbers.fixed(value, 3)} ± {error}, K = {row['dequant_draws']:.0f}", value)


def _bound(frame: pd.DataFrame) -> str:
    """What bits/dim of discrete data are."""
    known = frame[frame["dequant_draws"].notna() & (frame["split"] != "teacher-samples")]
    return "Bits/dim of discrete data are a bound, from dequantisation noise." if len(known) else ""


def _reference(frame: pd.DataFrame) -> str:
    row = labels.reference(frame)
    if row is None:
        return "No reference."
    error = f" ± {numbers.number(row['ref_se'], 1)}" if row["ref_se"] > 0 else ""
    several = frame.loc[frame["bpd_ref"].notna(), "n_items"].min() < row["n_items"]
    fewer = " (cells on fewer items have their own)" if several else ""
    origin = f" ({row['ref_id']})" if row["ref_id"] else ""
    return f"Reference {numbers.fixed(row['bpd_ref'], 3)}{error} bits/dim{origin}, {row['n_items']:.0f} items{fewer}."
