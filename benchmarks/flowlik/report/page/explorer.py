"""What the page's explorer shows: a point for every result, with its costs, measures and where its record stands."""

from __future__ import annotations

import json
import math
from typing import Any, Final

import pandas as pd
from markupsafe import Markup

from flowlik.records.columns import BY_NAME, axis_label, head
from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.labels import as_dicts, method_named
from flowlik.report.page.svg import dark
from flowlik.report.recommend import usable_by_a_network

COSTS: Final = ("nfe_mean", "work", "forward_equivalents", "ms_per_sample")
MEASURES: Final = ("bpd_mae_all", "bpd_error", "spearman", "coverage95", "mass", "frechet")
LOGARITHMIC: Final = ("bpd_mae_all", "frechet")
DIGITS: Final = 4


def explorer_data(usable: pd.DataFrame, run_dir: str) -> Markup:
    """JSON of all points, to stand in a script element that is not run.

    Args:
        usable: rows with a result, as `flowlik.report.frame.averaged` gives them. run_dir: folder of the run, for the
            commands.
    """
    frame = frames.with_times(usable)
    frame = frame[frame["bpd"].notna() | frame["frechet"].notna()]
    for_networks = set(usable_by_a_network(frame).index)
    costs = [name for name in COSTS if frame[name].notna().any()]
    measures = [name for name in MEASURES if frame[name].notna().any()]
    data = {
        "run": run_dir,
        "costs": [{"label": axis_label(name), "head": head(name)} for name in costs],
        "measures": [
            {
                "label": axis_label(name).removesuffix(" ()"),
                "better": BY_NAME[name].better,
                "log": name in LOGARITHMIC,
            }
            for name in measures
        ],
        "methods": _methods(frame),
        "points": [
            _point(row, costs, measures, bool(index in for_networks))
            for index, row in zip(frame.index, as_dicts(frame), strict=True)
        ],
    }
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _methods(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Label, colour and colour in the dark of every method of the frame."""
    found = {name: method_named(str(name)) for name in dict.fromkeys(frame["method"])}
    return {name: [one.label, one.colour, dark(one.colour)] for name, one in found.items()}


def _point(row: dict[str, Any], costs: list[str], measures: list[str], for_networks: bool) -> dict[str, Any]:
    return {
        "task": row["task"],
        "split": labels.split_title(row["split"]),
        "method": row["method"],
        "name": row["row"],
        "line": f"{row['series']} · {row['model']}",
        "model": row["model"],
        "estimator": row["estimator_label"],
        "network": for_networks,
        "id": row["cell_id"],
        "row": f"row-{labels.slug(row['cell_id'])}" if row["cell_id"] else "",
        "x": [_short(row[name]) for name in costs],
        "y": [[_short(row.get(f"{name}{end}")) for end in ("", "_lo", "_hi")] for name in measures],
    }


def _short(value: Any) -> float | None:
    """A number in as many digits as anyone reads; None where there is none."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{DIGITS}g}")
