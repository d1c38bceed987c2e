"""What a run ends with on the terminal: the best method of each task, and what has no result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import pandas as pd

BUDGET: Final = 8
"""Evaluations a sample that the best method may take."""

MOST_REASONS: Final = 5


def result_lines(folder: Path) -> list[str]:
    """Per task what `recommend` says at so many evaluations, then the cells without a result by reason."""
    from flowlik.report import frame as frames

    records = frames.load(folder)
    return [*_best(records), *_failed(records)]


def _best(records: pd.DataFrame) -> list[str]:
    from flowlik.report import frame as frames
    from flowlik.report import recommend as advice

    judged = advice.judged(frames.averaged(frames.usable(records)))
    lines = []
    for task in sorted(set(judged["task"])):
        if (judged.loc[judged["task"] == task, "method"] == "control").all():
            continue
        found = advice.recommend(judged, str(task), BUDGET)
        if found.best is None:
            lines.append(f"  {task}: no method within {BUDGET} evaluations")
            continue
        beware = "".join(f"; beware: {warning}" for warning in found.warnings())
        lines.append(f"  {task}: {found.best}{beware}")
    return (
        [f"best at {BUDGET} evaluations or fewer, mean |error| with its 95 % interval:", *lines]
        if lines
        else []
    )


def _failed(records: pd.DataFrame) -> list[str]:
    from flowlik.report.labels import as_dicts

    rows = as_dicts(records[records["status"] != "ok"])
    reasons = Counter((str(row["status"]), " ".join(str(row["reason"]).split())) for row in rows)
    lines = [
        f"  {count} {status}: {reason or 'no reason given'}"
        for (status, reason), count in reasons.most_common()
    ]
    more = len(lines) - MOST_REASONS
    if more > 0:
        lines = [*lines[:MOST_REASONS], f"  and {more} more reasons, in the report"]
    return ["without a result:", *lines] if lines else []
