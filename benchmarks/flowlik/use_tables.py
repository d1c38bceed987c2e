"""Tables of what is measured beside a likelihood's accuracy: samples, guided or not, and the uses of a likelihood."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from flowlik import view
from flowlik.table import Cell, Table, seeds_note

FAMILIES = ("rescaled", "displaced", "rounded")


def use_tables(frame: pd.DataFrame) -> list[Table]:
    """The tables of one task and split that its records support."""
    makers = (_one_evaluation, _routes, _samples, _comparison, _outliers, _importance, _gradient, _training)
    return [table for make in makers if (table := make(frame)) is not None]


def _title(frame: pd.DataFrame, words: str) -> str:
    return f"{frame['task'].iloc[0]}: {words}"


def _cell(value: Any, low: Any = math.nan, high: Any = math.nan, digits: int = 3) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("–")
    text = view.number(float(value), digits)
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        text += f" [{view.number(float(low), digits)}, {view.number(float(high), digits)}]"
    return Cell(text, float(value))


def _over_seeds(row: dict[str, Any], name: str, low: Any = math.nan, high: Any = math.nan) -> Cell:
    """A number with its standard deviation over seeds; of a single seed with its interval, where it has one."""
    spread, value = row.get(f"{name}_sd"), row.get(name)
    if spread is None or value is None or math.isnan(spread):
        return _cell(value, low, high)
    return Cell(view.with_spread(view.number(value), spread), float(value))


def _head(row: dict[str, Any]) -> tuple[Cell, ...]:
    return Cell(row["row"]), Cell(row["model"]), _cell(row["nfe_mean"])


def _samples(frame: pd.DataFrame) -> Table | None:
    """Cells that were about their samples alone: they have a cost, samples, and no bits/dim of their own."""
    shown = frame[(frame["n_samples"] > 0) & frame["bpd"].isna()]
    if shown.empty:
        return None
    rows = []
    plain = {(row["model"], row["steps"]): row for row in view.as_dicts(shown[shown["estimator"] == "f2d2"])}
    for row in view.as_dicts(shown):
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
    name = view.distance_names(shown) if shown["frechet"].notna().any() else "energy distance"
    extractor = next((e for e in shown["extractor"] if e), "data space")
    return _without_empty(
        Table(
            _title(frame, "samples"),
            (
                *("method", "model", "NFE", "vjps", name, "less than unguided by", "kernel distance"),
                *("precision", "recall", "bits/dim of the samples"),
            ),
            tuple(rows),
            note=f"{shown['n_samples'].max():.0f} samples a row, {extractor}; brackets: 95 % intervals, of the gain "
            "over the unguided map paired by noise. Bits/dim of the samples as continuous data, under the exact "
            f"density or the converged teacher. {seeds_note(shown)}".strip(),
        )
    )


def _one_evaluation(frame: pd.DataFrame) -> Table | None:
    """Samples of one evaluation of every kind of few-step model and of the solved ODE, nearest first."""
    measured = view.samples_measured(frame)
    few = view.few_steps(measured)
    few = few[(few["sample_nfe"] == 1) & few["distance"].notna()]
    few = few.assign(unjudged=few["bpd_mae"].isna()).sort_values("unjudged", kind="stable")
    few = few.drop_duplicates(["method", "model"])
    if few.empty:
        return None
    solved = measured[(measured["estimator"] == "ode") & measured["distance"].notna()]
    shown = pd.concat([few, solved]).sort_values("distance", kind="stable")
    rows = view.as_dicts(shown)
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
            _interval(row, "bpd_mae", 2),
            _cell(row["nfe_mean"]),
        )
        for row in rows
    )
    extractor = next((one for one in shown["extractor"] if one), "")
    name = view.distance_name(extractor) if extractor else "energy distance"
    heads = (
        *(
            "method",
            "model",
            "NFE of a sample",
            name,
            f"nearer than {DATA_FREE} by",
            "precision",
            "recall",
            "least covered mode",
        ),
        *("mean |error|", "NFE of the likelihood"),
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


def _interval(row: dict[str, Any], name: str, digits: int = 3) -> Cell:
    return _cell(row[name], row[f"{name}_lo"], row[f"{name}_hi"], digits)


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


def _routes(frame: pd.DataFrame) -> Table | None:
    """How far the routes to a generator's likelihood agree."""
    rows = _known(frame, "routes")
    names = ("one_root_gap", "one_root_share", "folded_share", "lost_share", "mass", "flow_gap", "flow_bias")
    lines = tuple(
        (*_head(row)[:2], *(_cell(row["extra"]["routes"].get(name)) for name in names)) for row in rows
    )
    heads = (
        *("method", "model", "largest gap to the samples' own density", "samples with one root"),
        *("with roots of both signs", "without a root", "mass", "gap to the fake model's flow", "its mean"),
    )
    note = (
        "In float64; gaps in nats, against own-samples where there is one root, and against fake-flow on the items. "
        "Roots of both signs: the generator folds there."
    )
    title = _title(frame, "routes to a generator's likelihood")
    return _without_empty(Table(title, heads, lines, note=note)) if rows else None


def _training(frame: pd.DataFrame) -> Table | None:
    """Bits/dim along a model's training."""
    lines = []
    for row in _known(frame, "training"):
        curve = row["extra"]["training"]
        for k, step in enumerate(curve["step"]):
            bits, spread = curve["bpd"][k], 1.96 * curve["bpd_se"][k]
            gain = _cell(None)
            if k:
                half = 1.96 * curve["gain_se"][k]
                gain = _cell(curve["gain"][k], curve["gain"][k] - half, curve["gain"][k] + half)
            lines.append(
                (
                    *_head(row)[:2],
                    Cell(f"{step:,}", float(step)),
                    _cell(curve["cpu_hours"][k]),
                    _cell(bits, bits - spread, bits + spread),
                    gain,
                )
            )
    heads = (
        "method",
        "model",
        "steps",
        "processor hours",
        "bits/dim [95 %]",
        "gained since the last, same items [95 %]",
    )
    return Table(_title(frame, "bits/dim along training"), heads, tuple(lines)) if lines else None


def _gain(row: dict[str, Any], plain: dict[str, Any] | None) -> Cell:
    """How much nearer guided samples are than those of the same map from the same noise as it was."""
    if plain is None or row["estimator"] != "self-guidance":
        return Cell("–")
    ours, theirs = (np.array(of["extra"].get("frechet_resampled") or [], dtype=float) for of in (row, plain))
    if not len(ours) or ours.shape != theirs.shape or row["n_samples"] != plain["n_samples"]:
        return Cell("–")
    gain, half = plain["frechet"] - row["frechet"], 1.96 * float(np.std(theirs - ours, ddof=1))
    return _cell(gain, gain - half, gain + half)


def _known(frame: pd.DataFrame, use: str) -> list[dict[str, Any]]:
    return [row for row in view.as_dicts(frame) if row["extra"].get(use)]


def _comparison(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "comparison")
    found = []
    for row in rows:
        for family in FAMILIES:
            of = row["extra"]["comparison"].get(family)
            if of is None:
                continue
            tau = _cell(of.get("kendall"), of.get("kendall_lo"), of.get("kendall_hi"), 2)
            others = (
                _cell(of.get(name), digits=2)
                for name in ("spearman", "regret", "spread", "bias", "bias_spread")
            )
            found.append((*_head(row)[:2], Cell(family), _head(row)[2], tau, *others))
    if not found:
        return None
    heads = (
        *("method", "model", "ten models", "NFE", "Kendall's tau", "Spearman", "regret"),
        *("spread of the exact values", "bias", "spread of the bias"),
    )
    note = "Means over the items; regret, spreads and bias in bits/dim. Brackets: 95 % bootstrap intervals over items."
    return Table(
        _title(frame, "ten models ranked by their likelihood"), heads, tuple(found), names=3, note=note
    )


def _outliers(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "outliers")
    if not rows:
        return None
    sets = list(dict.fromkeys(name for row in rows for name in row["extra"]["outliers"]))
    measured = [n for n in sets if any("auroc" in row["extra"]["outliers"].get(n, {}) for row in rows)]
    lines = []
    for row in rows:
        of = [row["extra"]["outliers"].get(name, {}) for name in measured]
        lines.append(
            (*_head(row), *(_cell(o.get("auroc"), o.get("auroc_lo"), o.get("auroc_hi"), 2) for o in of))
        )
    missing = [rows[0]["extra"]["outliers"][name]["reason"] for name in sets if name not in measured]
    note = "AUROC of log p, test images against each foreign set; brackets: 95 % intervals. " + " ".join(
        f"{reason[0].upper()}{reason[1:]}." for reason in missing
    )
    heads = ("method", "model", "NFE", *measured)
    return Table(_title(frame, "foreign images"), heads, tuple(lines), note=note.strip())


def _importance(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "importance")
    if not rows:
        return None
    names = ("ess", "mass", "p", "odds", "log_odds_error", "sample_ess", "sample_log_mass")
    lines = tuple(
        (*_head(row), *(_cell(row["extra"]["importance"].get(name)) for name in names)) for row in rows
    )
    one = rows[0]["extra"]["importance"]
    note = (
        f"Exact weights: effective sample size {view.number(one['ess_exact'])}, P(A) {view.number(one['p_exact'])}, "
        f"odds {view.number(one['odds_exact'])}, log odds ± {view.number(one['log_odds_se'], 2)} from {one['points']} "
        "points. The last two weigh the estimator's own samples with the exact density."
    )
    heads = (
        *("method", "model", "NFE", "effective sample size", "mass", "P(A)", "odds of A and B"),
        *("error of the log odds", "own samples: effective sample size", "own samples: log of mass"),
    )
    return _without_empty(Table(_title(frame, "rare events by importance sampling"), heads, lines, note=note))


def _gradient(frame: pd.DataFrame) -> Table | None:
    rows = _known(frame, "gradient")
    if not rows:
        return None
    names = ("cosine", "cosine_p05", "error", "weight_cosine", "weight_error")
    lines = tuple(
        (*_head(row), *(_cell(row["extra"]["gradient"].get(name)) for name in names)) for row in rows
    )
    heads = (
        *("method", "model", "NFE", "cosine", "its 5th percentile", "relative error"),
        *("cosine in the weights", "relative error in the weights"),
    )
    note = (
        "In x against the exact score, means and medians over the items; in the weights against the converged "
        "likelihood of the network's own field."
    )
    return _without_empty(Table(_title(frame, "gradient of the estimate"), heads, lines, note=note))


def _without_empty(table: Table) -> Table:
    """The table without columns that hold nothing."""
    kept = [k for k in range(len(table.columns)) if any(row[k].text != "–" for row in table.rows)]
    rows = tuple(tuple(row[k] for k in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[k] for k in kept), rows, table.names, table.note)
