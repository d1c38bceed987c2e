"""Tables of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from flowlik.records.columns import head
from flowlik.report import labels, samples
from flowlik.report.tables.table import (
    Cell,
    Table,
    _cell,
    _head,
    _interval,
    _over_seeds,
    _title,
    _without_empty,
    seeds_note,
)


def _samples(frame: pd.DataFrame) -> Table | None:
    """Cells that were about their samples alone: they have a cost, samples, and no bits/dim of their own."""
    shown = frame[(frame["n_samples"] > 0) & frame["bpd"].isna()]
    if shown.empty:
        return None
    rows = []
    plain = {
        (row["model"], row["steps"]): row for row in labels.as_dicts(shown[shown["estimator"] == "f2d2"])
    }
    for row in labels.as_dicts(shown):
        extra = row["extra"]
        energy, error = extra.get("energy_distance"), extra.get("energy_distance_se") or math.nan
        bits, spread = extra.get("samples_bpd"), 1.96 * (extra.get("samples_bpd_se") or math.nan)
        distance = (
            _over_seeds(row, "frechet", extra.get("frechet_lo"), extra.get("frechet_hi"))
            if energy is None
            else _over_seeds(extra, "energy_distance", energy - 1.96 * error, energy + 1.96 * error)
        )
        rows.append(
            (
                *_head(row),
                _cell(row["vjp_mean"]),
                distance,
                _gain(row, plain.get((row["model"], row["steps"]))),
                *(_over_seeds(row, name) for name in ("kid", "precision", "recall")),
                _cell(bits)
                if bits is None
                else _over_seeds(extra, "samples_bpd", bits - spread, bits + spread),
            )
        )
    name = labels.distance_names(shown) if shown["frechet"].notna().any() else head("energy_distance")
    extractor = next((e for e in shown["extractor"] if e), "data space")
    return _without_empty(
        Table(
            _title(frame, "samples"),
            (
                *("method", "model", head("nfe_mean"), "vjps", name, "less than unguided by"),
                *map(head, ("kid", "precision", "recall", "samples_bpd")),
            ),
            tuple(rows),
            note=f"{shown['n_samples'].max():.0f} samples a row, {extractor}; brackets: 95 % intervals, of the gain "
            "over the unguided map paired by noise. Bits/dim of the samples as continuous data, under the exact "
            f"density or the converged teacher. {seeds_note(shown)}".strip(),
        )
    )


def _one_evaluation(frame: pd.DataFrame) -> Table | None:
    """Samples of one evaluation of every kind of few-step model and of the solved ODE, nearest first."""
    measured = samples.samples_measured(frame)
    few = samples.few_steps(measured)
    few = few[(few["sample_nfe"] == 1) & few["distance"].notna()]
    few = few.assign(unjudged=few["bpd_mae_all"].isna()).sort_values("unjudged", kind="stable")
    few = few.drop_duplicates(["method", "model"])
    if few.empty:
        return None
    solved = measured[(measured["estimator"] == "ode") & measured["distance"].notna()]
    shown = pd.concat([few, solved]).sort_values("distance", kind="stable")
    rows = labels.as_dicts(shown)
    without = next((row for row in rows if row["model"] == DATA_FREE), None)
    lines = tuple(
        (
            Cell(row["row"]),
            Cell(row["model"]),
            _cell(row["sample_nfe"]),
            _distance(row),
            _nearer(row, without),
            *(_interval(row, name, 2) for name in ("precision", "recall")),
            _cell(row["extra"].get("least_mode"), digits=2),
            _interval(row, "bpd_mae_all", 2),
            _cell(row["nfe_mean"]),
        )
        for row in rows
    )
    extractor = next((one for one in shown["extractor"] if one), "")
    name = labels.distance_name(extractor) if extractor else head("energy_distance")
    heads = (
        *("method", "model", "NFE of a sample", name, f"nearer than {DATA_FREE} by"),
        *map(head, ("precision", "recall", "least_mode", "bpd_mae_all")),
        "NFE of the likelihood",
    )
    note = (
        f"{shown['n_samples'].max():.0f} samples a row, {extractor or 'data space'}; brackets: "
        "95 % intervals, those of precision and recall of a share of so many, of a gain paired by noise where that was "
        f"kept. {_verdict(rows, without)} {seeds_note(shown)}"
    )
    title = _title(frame, "samples of one evaluation, and of the ODE")
    return _without_empty(Table(title, heads, lines, note=note.strip()))


DATA_FREE = "realuid-data-free"
WITH_DATA = ("realuid", "realuid-fine-tuned")


def _distance(row: dict[str, Any]) -> Cell:
    """The distance with its interval, or with its spread where several seeds are behind it."""
    source, name = (row["extra"], "energy_distance") if math.isnan(row["frechet"]) else (row, "frechet")
    return _over_seeds(source, name, row["distance_lo"], row["distance_hi"])


def _nearer(row: dict[str, Any], without: dict[str, Any] | None) -> Cell:
    """How much nearer a generator's samples are with real data than without."""
    if without is None or row["model"] not in WITH_DATA:
        return Cell("–")
    gain = without["distance"] - row["distance"]
    ours, theirs = (
        np.array(of["extra"].get("frechet_resampled") or [], dtype=float) for of in (row, without)
    )
    if len(ours) and ours.shape == theirs.shape and row["n_samples"] == without["n_samples"]:
        half = 1.96 * float(np.std(theirs - ours, ddof=1))
    else:
        half = math.hypot(*((of["distance_hi"] - of["distance_lo"]) / 2 for of in (row, without)))
    return _cell(gain, gain - half, gain + half)


def _verdict(rows: list[dict[str, Any]], without: dict[str, Any] | None) -> str:
    """Whether real data make the samples better by more than the intervals, in words."""
    found = []
    for row in rows:
        if without is None or row["model"] not in WITH_DATA:
            continue
        apart = row["distance_hi"] < without["distance_lo"]
        words = "better" if apart else "not better"
        found.append(f"{row['model']} is {words} than {DATA_FREE} by more than their intervals.")
    return " ".join(found)


def _gain(row: dict[str, Any], plain: dict[str, Any] | None) -> Cell:
    """How much nearer guided samples are than those of the same map from the same noise as it was."""
    if plain is None or row["estimator"] != "self-guidance":
        return Cell("–")
    ours, theirs = (np.array(of["extra"].get("frechet_resampled") or [], dtype=float) for of in (row, plain))
    if not len(ours) or ours.shape != theirs.shape or row["n_samples"] != plain["n_samples"]:
        return Cell("–")
    gain, half = plain["frechet"] - row["frechet"], 1.96 * float(np.std(theirs - ours, ddof=1))
    return _cell(gain, gain - half, gain + half)
