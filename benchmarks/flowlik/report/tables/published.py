"""The paper's table: rows of a task on images beside what was published of the same method.

Published values come from `published.toml` and are marked as such in every format. They stand in columns of their own,
and where they are of another data set every one of them says of which.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flowlik.records.columns import head
from flowlik.report import labels, numbers
from flowlik.report.tables.table import Cell, Table, seeds_note

FILE: Final = Path(__file__).with_name("published.toml")
PLAIN_OPTIONS: Final = frozenset({"solver", "steps", "trace", "probes", "noise"})
"""Options that a row may name and still be the published rule."""

NOTHING: Final = Cell("–")


@dataclass(frozen=True, kw_only=True)
class Printed:
    """Values of one method at one number of steps; None where the paper gives none."""

    method: str
    steps: int
    bpd: float | None
    fid: float | None


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a paper printed of a data set; `same` where that is the task's own."""

    data: str
    same: bool
    source: str
    teacher: dict[str, Any]
    printed: tuple[Printed, ...]


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def paper_compared_with(task: str) -> Paper | None:
    """The published values that a task's rows are compared with; None for tasks without."""
    of = _file()["tasks"].get(task)
    if of is None:
        return None
    found = next(values for values in _file()["values"] if values["data"] == of["compared_with"])
    printed = tuple(
        Printed(method=method, steps=steps, bpd=bpd, fid=fid)
        for method in found["bpd"]
        for steps, bpd, fid in zip(found["steps"], found["bpd"][method], found["fid"][method], strict=True)
    )
    return Paper(
        data=found["data"],
        same=of["data"] == of["compared_with"],
        source=found["source"],
        teacher=found["teacher"],
        printed=printed,
    )


def published_method(row: dict[str, Any]) -> str | None:
    """The published method that a row of ours is, None for methods of no paper."""
    if not set(labels.parse_label(row["estimator_label"])) <= PLAIN_OPTIONS:
        return None
    # the same method on a network for two CPU cores
    row = {**row, "model": row["model"].removesuffix("-small")}
    for name, of in _file()["methods"].items():
        if all(row[column] == value for column, value in of.items()):
            return str(name)
    return None


# --- the table ----------------------------------------------------------------------------------------------
def with_published(frame: pd.DataFrame) -> list[Table]:
    """The table of one task and split, in a list; none but for test images of a task in `published.toml`.

    `frame` holds rows with bits/dim, prepared by `flowlik.report.frame`.
    """
    shown = frame[frame["method"] != "control"]
    paper = None if shown.empty else paper_compared_with(str(shown["task"].iloc[0]))
    if paper is None or shown["split"].iloc[0] != "test":
        return []
    rows = labels.as_dicts(
        shown.sort_values(["method", "series", "model", "steps"], ascending=[True] * 3 + [False])
    )
    extractors = sorted(set(shown["extractor"]) - {""})
    known = _matched(rows, paper)
    lines = [*_converged(frame, paper)]
    lines += [_line(row, known.get(k), paper, extractors) for k, row in enumerate(rows)]
    lines += _not_run(paper, known) if paper.same else []
    heads = (
        *("method", "model", head("nfe_mean"), head("forward_equivalents"), head("bpd")),
        *(_distance_head(extractors), f"published {head('bpd')}", "published FID"),
        *(head("bpd_error"), head("bpd_mae_all"), head("spearman")),
    )
    title = f"{shown['task'].iloc[0]}, {labels.split_title('test')}: beside published values"
    return [Table(title, heads, tuple(lines), names=2, note=_note(shown, paper, extractors))]


def _matched(rows: list[dict[str, Any]], paper: Paper) -> dict[int, Printed]:
    """The published value of each row by its place, where there is one."""
    values = {(one.method, one.steps): one for one in paper.printed}
    found = {}
    for k, row in enumerate(rows):
        method = published_method(row)
        if method is not None and (one := values.get((method, row["steps"]))) is not None:
            found[k] = one
    return found


def _converged(frame: pd.DataFrame, paper: Paper) -> Iterator[tuple[Cell, ...]]:
    """The line of the teacher's converged likelihood, where it is known."""
    row = labels.reference(frame)
    if row is None:
        return
    error = f" ± {numbers.number(row['ref_se'], 1)}" if row["ref_se"] > 0 else ""
    ours = Cell(f"{numbers.fixed(row['bpd_ref'], 3)}{error}", float(row["bpd_ref"]))
    printed = (_grey(paper.teacher["bpd"], paper), _grey(paper.teacher["fid"], paper))
    yield (Cell("converged"), Cell("teacher"), *[NOTHING] * 2, ours, NOTHING, *printed, *[NOTHING] * 3)


def _line(
    row: dict[str, Any], printed: Printed | None, paper: Paper, extractors: list[str]
) -> tuple[Cell, ...]:
    text = numbers.with_spread(numbers.number(row["frechet"]), row.get("frechet_sd"))
    if math.isfinite(row["frechet"]) and len(extractors) > 1:
        text += f" ({row['extractor']})"
    return (
        Cell(row["row"]),
        Cell(row["model"]),
        _cell(row["nfe_mean"]),
        _cell(row["forward_equivalents"]),
        Cell(numbers.with_spread(numbers.fixed(row["bpd"], 3), row.get("bpd_sd")), _value(row["bpd"])),
        Cell(text, _value(row["frechet"])),
        _grey(printed.bpd if printed else None, paper),
        _grey(printed.fid if printed else None, paper),
        _cell(row["bpd_error"], 2),
        _cell(row["bpd_mae_all"], 2),
        Cell(numbers.fixed(row["spearman"], 3), _value(row["spearman"])),
    )


def _not_run(paper: Paper, known: dict[int, Printed]) -> list[tuple[Cell, ...]]:
    """Published values of the task's own data set that this run has no row for."""
    rest = [one for one in paper.printed if one not in known.values()]
    lines = []
    for one in rest:
        words = f"{one.method}, {one.steps} step{'' if one.steps == 1 else 's'}"
        head = (Cell(words, published=True), Cell("not in this run", published=True))
        printed = (_grey(one.bpd, paper), _grey(one.fid, paper))
        lines.append((*head, *[NOTHING] * 4, *printed, *[NOTHING] * 3))
    return lines


def _grey(value: float | None, paper: Paper) -> Cell:
    """A published value; of another data set it says which, and is not sorted among numbers."""
    if value is None:
        return NOTHING
    text = numbers.fixed(value, 2)
    if paper.same:
        return Cell(text, value, published=True)
    return Cell(f"{text} on {paper.data}", published=True)


def _distance_head(extractors: list[str]) -> str:
    if len(extractors) != 1:
        return "Fréchet distance"
    return f"{labels.distance_name(extractors[0])} ({extractors[0]})"


def _note(shown: pd.DataFrame, paper: Paper, extractors: list[str]) -> str:
    samples = shown["n_samples"].max()
    words = [f"Grey: printed in {paper.source}; its teacher by {paper.teacher['how']}."]
    if not paper.same:
        words.append(f"Those values are of {paper.data} and other networks: not comparable with these rows.")
    elif extractors and not all(labels.distance_name(name) == "FID" for name in extractors):
        words.append("The published FID is of Inception features: not comparable with the distances here.")
    if samples > 0:
        words.append(f"Distances of {samples:.0f} samples.")
    judged = "Bias, mean |error| and Spearman: image by image against the teacher's converged likelihood"
    words.append(f"{judged}, over the images that have one; bits/dim over all images of a row.")
    if len(set(shown["n_items"])) > 1:
        least, most = shown["n_items"].min(), shown["n_items"].max()
        words.append(f"Rows are of {least:.0f} to {most:.0f} images.")
    return " ".join([*words, seeds_note(shown)]).strip()


def _cell(value: float, digits: int = 3) -> Cell:
    return Cell(numbers.number(value, digits), _value(value))


def _value(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
